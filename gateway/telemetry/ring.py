"""What happened to each of the last requests, for `penstock explain`: a bounded ring in every worker, without a prompt or a key in it."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from gateway.access.limits.rules import NANO, SECOND, SLOTS, Limit, State, Unit
from gateway.serving.balance.cached import Placement
from gateway.serving.balance.hosts import Standing, in_words
from gateway.serving.balance.queue import Ticket
from gateway.telemetry.record import OUTCOMES, PHASES, Attempt, Record
from gateway.wire.visible import visible

# Kept in each worker; about 3 kB each.
KEPT = 2000
# Of those that a limit or an unknown key has refused: whoever asks in a loop must not push out what else there was.
KEPT_REFUSED = 500
# Of requests that share a client's id so many are shown.
MOST_FOUND = 20


def summary(record: Record) -> dict[str, Any]:
    """A finished request as plain values; times in milliseconds."""
    usage = record.usage
    return {
        "verdict": verdict(record),
        "id": record.call_id,
        "request_id": record.request_id,
        "trace_id": record.trace.id,
        "at": started(record),
        "method": record.method,
        "path": record.path,
        "client": record.client,
        "key": record.key,
        "model": record.model,
        "stream": record.stream,
        "status": record.status,
        "outcome": record.outcome,
        "error": record.error,
        "why": record.why,
        "ms": _ms(record.ended_at - record.started_at),
        "phases_ms": {name: _ms(seconds) for name, seconds in zip(PHASES, record.phases, strict=True) if seconds},
        "first_event_ms": _ms(record.first_event_at - record.started_at) if record.first_event_at else None,
        "largest_gap_ms": _ms(record.largest_gap_s) if record.events else None,
        "attempts": [
            {
                "host": attempt.target,
                "began_ms": _ms(attempt.started_at - record.started_at),
                "first_event_ms": _ms(attempt.first_at - record.started_at) if attempt.first_at else None,
                "ended_ms": _ms(attempt.ended_at - record.started_at) if attempt.ended_at else None,
                "result": attempt.result,
                "continues": attempt.continues,
                **_prefilled(attempt, record),
                **_placed(attempt.placement),
                "considered": [_considered(standing, attempt) for standing in attempt.considered],
            }
            for attempt in record.attempts
        ],
        "waited": _waited(record.ticket) if record.ticket is not None else None,
        "affinity": record.affinity,
        "ignored": record.ignored,
        "continuations": record.continuations,
        "limits": [_limit(limit, reserved, state, limit is record.refused_by) for limit, reserved, state in record.limits],
        "prompt_tokens": usage.prompt_tokens if usage is not None else None,
        "cached_tokens": usage.cached_tokens if usage is not None else None,
        "completion_tokens": usage.completion_tokens if usage is not None else None,
        "finish_reasons": list(record.finishes),
        "cost": record.cost,
        **({"reasked": [record.reasked, record.reask_result]} if record.reasked else {}),
    }


def started(record: Record) -> str:
    """When it came, for people; to the millisecond, so that rows have an order."""
    at = time.time() - time.monotonic() + record.started_at
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(at))}.{int(at % 1 * 1000):03}Z"


def phase_in_words(phase: int) -> str:
    """What a request is at (one of PHASES, by its number)."""
    return _WORDS[PHASES[phase]]


def _waited(ticket: Ticket) -> dict[str, Any]:
    """How it stood in the queue, and why it got no place."""
    return {
        "class": ticket.priority,
        "client_waits_s": ticket.patience_s or None,
        "by": ticket.named_by,
        "ignored": list(ticket.ignored),
        "shed": ticket.shed,
    }


def _prefilled(attempt: Attempt, record: Record) -> dict[str, Any]:
    """The other half of a pair."""
    half = attempt.prefill
    if half is None:
        return {}
    done = _ms(half.ended_at - record.started_at) if half.ended_at else None
    return {"role": "decode", "prefill": {"host": half.target, "role": "prefill", "result": half.result, "ended_ms": done}}


def _placed(placement: Placement | None) -> dict[str, Any]:
    """What the host was expected to have of the prompt, and where the conversation was before."""
    if placement is None:
        return {}
    found: dict[str, Any] = {"expected_tokens": placement.expected_tokens, "cached_tokens": placement.cached_tokens}
    if placement.evicted:
        found["evicted"] = True
    if placement.moved_from:
        found["moved_from"], found["moved_tokens"] = placement.moved_from, placement.moved_tokens
    return found


def verdict(record: Record) -> str:
    """What to know of a request before all else: who has refused it or why it failed, or what took its time."""
    outcome = record.outcome
    if outcome == "unauthorized":
        return f"refused: {record.why}"
    if outcome == "limited":
        return f"refused by a limit: {record.why}"
    if outcome == "refused":
        return f"refused as the client's own fault{f' ({record.error})' if record.error else ''}{f': {record.why}' if record.why else ''}"
    spent: dict[str, float] = {}
    for name, seconds in zip(PHASES, record.phases, strict=True):
        spent[_WHOSE[name]] = spent.get(_WHOSE[name], 0.0) + seconds
    most = max(spent, key=lambda name: spent[name])
    whole = sum(spent.values())
    share = f"{most}: {spent[most] / whole:.0%} of the time" if whole else ""
    if outcome == "ok":
        return share
    if outcome == "client_gone":
        return f"the client left after {whole:.1f} s; {share}"
    return f"failed: {record.why or OUTCOMES.get(outcome, outcome)}; {share}"


def _limit(limit: Limit, reserved: float, state: State, refused: bool) -> dict[str, Any]:
    """One limit as it stood: of what may be used at once, or in a period, how much was left, and when nothing of it will be used."""
    left, renewed = state
    most = limit.burst or limit.amount
    if limit.unit is Unit.MONEY:
        most, reserved, left = most / NANO, reserved / NANO, left / NANO
    return {
        "limit": limit.label,
        "reserved": reserved,
        "left": left,
        "most": most,
        "full": round(min(max(1.0 - left / most, 0.0), 1.0), 4),
        "renewed_s": round(renewed / SECOND, 3) if limit.kind != SLOTS else None,
        "refused": refused,
    }


def _considered(standing: Standing, attempt: Attempt) -> list[str]:
    """A host's id, and how it stood when one was picked."""
    target, in_flight = standing[0], standing[1]
    state, why = in_words(standing, attempt.started_at, 0.0)
    half = attempt.prefill
    picked = ", picked" if target.id == attempt.target or (half is not None and target.id == half.target) else ""
    role = f"{target.role}: " if target.role else ""
    return [target.id, f"{role}{state}{f' ({why})' if why else ''}, weight {target.weight:g}, {in_flight} in flight{picked}"]


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)


class _Shelf:
    """So many records, found by our own id or by the client's."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[str, Record] = OrderedDict()
        # A client's id may stand for many requests: the same client's, or another's who took it too.
        self._ids: dict[str, list[str]] = {}

    def keep(self, record: Record) -> None:
        """One more; the oldest makes room."""
        call_id = record.call_id or record.span
        self._kept[call_id] = record
        self._ids.setdefault(record.request_id, []).append(call_id)
        if len(self._kept) > self._size:
            call_id, old = self._kept.popitem(last=False)
            named = self._ids[old.request_id]
            named.remove(call_id)
            if not named:
                del self._ids[old.request_id]

    def records(self) -> list[Record]:
        """All of them, the oldest first."""
        return list(self._kept.values())

    def find(self, name: str) -> list[Record]:
        """The request of our id, or those of a client's id, newest first."""
        own = self._kept.get(name)
        if own is not None:
            return [own]
        return [self._kept[call_id] for call_id in reversed(self._ids.get(name, [])[-MOST_FOUND:])]


class Ring:
    """The last requests. Records are kept as they are and put into words when somebody asks."""

    def __init__(self, size: int = KEPT, refused: int = KEPT_REFUSED) -> None:
        self._answered = _Shelf(size)
        self._refused = _Shelf(refused)
        # Who else wants to know, where several gateways share a store.
        self.share: Callable[[Record], None] | None = None

    def keep(self, record: Record) -> None:
        """A request that has ended, if it was one for a model, or would have been had its key been known."""
        if record.outcome == "unauthorized":
            self._refused.keep(record)
            return
        if not record.model:
            return
        (self._refused if record.outcome == "limited" else self._answered).keep(record)
        if self.share is not None:
            self.share(record)

    def records(self) -> list[Record]:
        """All that are kept."""
        return self._answered.records() + self._refused.records()

    def find(self, name: str) -> dict[str, Any] | None:
        """The request of our id, or the newest of a client's id; `also` names the others, newest first."""
        same = self._answered.find(name) + self._refused.find(name)
        if not same:
            return None
        same.sort(key=lambda record: record.started_at, reverse=True)
        also = [record.call_id for record in same[1:MOST_FOUND] if record.call_id]
        return {**summary(same[0]), "also": also} if also else summary(same[0])


def readable(found: dict[str, Any]) -> str:
    """One screen for a person."""
    lines = [
        *([found["verdict"], ""] if found.get("verdict") else []),
        f"{found['id'] or found['request_id']}  {found['method']} {found['path']}  {found['status']}  {found['outcome']}",
        f"  {found['at']}  from {found['client']}  key {found['key'] or '-'}  {found['model']}  {'stream' if found['stream'] else ''}",
        f"  request id {found['request_id']}   trace {found['trace_id']}",
        f"  bound by {found.get('affinity') or 'none'}" + _left_out(found.get("ignored", [])),
        "",
        f"  {found['ms']:>10.1f} ms in all"
        + (f", the first event after {found['first_event_ms']:.1f} ms" if found["first_event_ms"] is not None and found["stream"] else ""),
    ]
    for name, spent in found["phases_ms"].items():
        share = spent / found["ms"] if found["ms"] else 0.0
        lines.append(f"  {spent:>10.1f} ms {_WORDS[name]:<42} {'#' * round(share * 30)}")
    if (waited := found.get("waited")) is not None:
        lines += ["", *_waited_in_words(waited)]
    for number, attempt in enumerate(found["attempts"], 1):
        lines.append("")
        on = "goes on at" if attempt.get("continues") else "on"
        lines.append(f"  attempt {number} after {attempt['began_ms']:.1f} ms {on} {attempt['host']}: {attempt['result']}")
        half = attempt.get("prefill")
        if half is not None:
            until = f", until {half['ended_ms']:.1f} ms" if half["ended_ms"] is not None else ""
            lines.append(f"      it decodes; {half['host']} prefills: {half['result']}{until}")
        if attempt.get("expected_tokens") or attempt.get("cached_tokens"):
            had = attempt["cached_tokens"]
            lines.append(f"      about {attempt['expected_tokens']} tokens expected in its cache, {'?' if had is None else had} were there")
        if attempt.get("evicted"):
            lines.append("      more of it was there before, and has left its cache since, as its engine says")
        if attempt.get("moved_from"):
            to = half["host"] if half is not None else attempt["host"]
            lines.append(f"      this conversation moved from {attempt['moved_from']} to {to} and paid {attempt['moved_tokens']} tokens")
        lines += [f"      {host:<32} {why}" for host, why in attempt["considered"]]
    if found["continuations"]:
        times = f", {found['continuations']} times" if found["continuations"] > 1 else ""
        lines.append(f"  continued on another host{times}")
    if found.get("reasked"):
        wrong, result = found["reasked"]
        lines.append(f"  its first answer had bad output ({wrong}), to be asked for once more: {result}")
    lines += [f"  bad output: {rule} ({how})" for rule, how in found.get("bad_output", {}).items()]
    if found["limits"]:
        lines.append("")
        lines += [_limit_in_words(row) for row in found["limits"]]
    if found["prompt_tokens"] is not None:
        cached = f" ({found['cached_tokens']} cached)" if found["cached_tokens"] else ""
        ended = f", ended by {', '.join(found['finish_reasons'])}" if found["finish_reasons"] else ""
        cost = f", cost {found['cost']:.6f}" if found["cost"] else ""
        lines += ["", f"  {found['prompt_tokens']}{cached} prompt and {found['completion_tokens']} completion tokens{ended}{cost}"]
        if found["largest_gap_ms"]:
            lines.append(f"  the longest the engine took between two events: {found['largest_gap_ms']:.1f} ms")
    if found.get("also"):
        lines += ["", f"  other requests of the same request id: {', '.join(found['also'])}"]
    return "\n".join(visible(line) for line in lines)


def _waited_in_words(waited: dict[str, Any]) -> Iterator[str]:
    yield f"  waited for a place in class {waited['class']}" + (f"; shed: {waited['shed']}" if waited["shed"] else "")
    if waited["client_waits_s"] is not None:
        yield f"      its client waits {waited['client_waits_s']:g} s ({waited['by']})"
    if waited["ignored"]:
        yield f"      ignored, as no time that a client waits: {', '.join(waited['ignored'])}"


def _left_out(names: list[str]) -> str:
    return f"; no name of a session, and ignored: {', '.join(names)}" if names else ""


def _limit_in_words(row: dict[str, Any]) -> str:
    took = "refused" if row.get("refused") else f"took {row['reserved']:.6g}"
    line = f"  {row['limit']:<44} {took}, {row['left']:.6g} left"
    if "most" in row:
        line = f"{line} of {row['most']:.6g}, {row['full']:.0%} full"
        if row["renewed_s"] is not None:
            line = f"{line}, unused again in {row['renewed_s']:.1f} s"
    return line


# Whose time a phase is.
_WHOSE = {
    "read": "the client",
    "limits": "deciding limits",
    "queue": "waiting for a host",
    "retry": "attempts that failed",
    "connect": "connecting",
    "first_token": "the engine",
    "generate": "the engine",
    "answer": "the engine",
    "client": "the client",
}
_WORDS = {
    "read": "reading the request",
    "limits": "deciding limits",
    "queue": "waiting for a host",
    "retry": "attempts that failed",
    "connect": "connecting",
    "first_token": "engine: queue and prefill",
    "generate": "engine: generating",
    "answer": "engine: the whole answer",
    "client": "waiting for the client to read",
}
