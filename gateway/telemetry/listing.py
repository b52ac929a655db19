"""Requests in rows, for `penstock requests` and the console: those that are being answered, and those that a worker or the store still
remembers."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import msgspec

from gateway.telemetry.record import PROBES, Record, ending_of
from gateway.telemetry.ring import phase_in_words, started, summary

OPEN, FAILED, REFUSED, SLOW = "open", "failed", "refused", "slow"
STATES = (OPEN, FAILED, REFUSED, SLOW)
# At most so many rows at once.
MAX_LISTED = 500


class Sought(msgspec.Struct, frozen=True):
    """Which requests: one of STATES or all of them, of one key, model or host or all, that were open in the last so many seconds, and at
    most how many. `here`: of this gateway alone, whatever others have put into the store."""

    state: str = ""
    key: str | None = None
    since_s: float | None = None
    last: int = 50
    model: str | None = None
    host: str | None = None
    here: bool = False


class Row(msgspec.Struct, frozen=True):
    """One request; what `explain` says of it too has the same name there. Of one that is being answered `outcome` is `open`, and `why` says
    what it is at. `longest_wait_ms`: the longest that its client has waited for anything, be it the first event or the next. `host`: the
    one that was asked last, of `tried`."""

    id: str
    request_id: str
    at: str
    key: str
    model: str
    stream: bool
    status: int
    outcome: str
    why: str
    ms: float
    first_event_ms: float | None
    longest_wait_ms: float
    prompt_tokens: int | None
    completion_tokens: int | None
    verdict: str
    host: str = ""
    tried: int = 0


def rows(open: Collection[Record], ended: Iterable[Record], sought: Sought) -> list[Row]:
    """Those of a worker's own; see `ordered` for their order."""
    now = time.monotonic()
    found = [record for record in open if record.path not in PROBES]
    if sought.state != OPEN:
        found += ended
    found = [record for record in found if _is_sought(record, sought, now)]
    found.sort(key=(lambda record: _waited_s(record, now)) if sought.state == SLOW else (lambda record: record.started_at), reverse=True)
    return [_row(record, now) for record in found[: sought.last]]


def remembered(content: Mapping[str, Any], sought: Sought) -> Row | None:
    """The row of what `ring.summary` has made of a request; None where it is none of those that are sought."""
    hosts = [attempt["host"] for attempt in content["attempts"]]
    if (
        (sought.key is not None and content["key"] != sought.key)
        or (sought.model is not None and content["model"] != sought.model)
        or (sought.host is not None and sought.host not in hosts)
        or (sought.state in (FAILED, REFUSED) and ending_of(content["outcome"]) != sought.state)
    ):
        return None
    first_ms, gap_ms = content["first_event_ms"], content["largest_gap_ms"] or 0.0
    longest_ms = max(content["ms"] if first_ms is None else first_ms, gap_ms)
    host = hosts[-1] if hosts else ""
    return msgspec.convert({**content, "longest_wait_ms": longest_ms, "host": host, "tried": len(hosts)}, Row)


def ordered(found: Iterable[Row], sought: Sought) -> list[Row]:
    """The newest first, or those first whose clients have waited longest, and as many as are sought."""
    if sought.state == SLOW:
        return sorted(found, key=lambda row: row.longest_wait_ms, reverse=True)[: sought.last]
    return sorted(found, key=lambda row: row.at, reverse=True)[: sought.last]


def _is_sought(record: Record, sought: Sought, now: float) -> bool:
    if (sought.key is not None and record.key != sought.key) or (sought.model is not None and record.model != sought.model):
        return False
    if sought.host is not None and all(attempt.target != sought.host for attempt in record.attempts):
        return False
    if sought.since_s is not None and record.ended_at and record.ended_at < now - sought.since_s:
        return False
    return sought.state not in (FAILED, REFUSED) or bool(record.outcome and record.ending == sought.state)


def _waited_s(record: Record, now: float) -> float:
    until = record.first_event_at or record.ended_at or now
    return max(until - record.started_at, record.largest_gap_s)


def _row(record: Record, now: float) -> Row:
    if record.ended_at:
        found = remembered(summary(record), Sought())
        assert found is not None
        return found
    first = record.first_event_at
    return Row(
        record.call_id, record.request_id, started(record), record.key, record.model, record.stream, record.status, OPEN,
        phase_in_words(record.phase), _ms(now - record.started_at), _ms(first - record.started_at) if first else None,
        _ms(_waited_s(record, now)), None, None, "", record.target, len(record.attempts),
    )  # fmt: skip


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)
