"""Log lines: readable on a terminal, one JSON object a line in a pipe. No prompt, no answer, no key is ever in one."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from gateway.telemetry.lines import Line, Phases
from gateway.telemetry.record import PROBES, Record
from gateway.telemetry.stderr import Stderr
from gateway.wire.visible import visible

_encoder = msgspec.json.Encoder()
_requests = logging.getLogger("penstock.request")
_KINDS = 1000
# What every line has.
_OWN = frozenset(["time", "level", "logger", "message"])
# Fields that a readable line shows where its words do not.
_SHOWN = ("request_id", "host", "cause", "key", "model")
# What the line of a request says, beside time, level, logger and message; docs/observability.md shows this table.
FIELDS = {
    "request_id": "the client's own, or ours",
    "trace_id": "32 hex digits",
    "client": "address",
    "status": "HTTP status; 499 where the client left before there was one",
    "ms": "from the first byte to the last",
    "id": "the answer's id, by which `penstock explain` finds it",
    "model": "as the client called it",
    "stream": "whether it asked for events",
    "host": "the one that answered, or was asked last",
    "attempts": "how many hosts were asked",
    "reasked": "what was wrong with an answer that was to be asked for once more, and what came of it",
    "continuations": "how often an answer that had begun went on elsewhere",
    "first_event_ms": "until the answer began",
    "phases_ms": "where the time went; they add up to `ms`",
    "prompt_tokens": "as the engine counted",
    "completion_tokens": "as the engine counted, or the events that passed",
    "key": "the key's name",
    "outcome": "how it ended: see the table of outcomes",
    "error": "the error's own code, where there is one",
    "cause": "why it ended so, where there is more to say",
}


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _clock.stamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _encoder.encode(line).decode()


class Bounded(logging.Filter):
    """When things go wrong they go wrong often: of one kind of line so many are written in a while, and then how many more there were.
    What was logged with `extra={"always": True}` is never left out."""

    def __init__(self, most: int = 20, window_s: float = 10.0) -> None:
        super().__init__()
        self._most = most
        self._window_s = window_s
        # Logger and template -> when the window began, and how many there were in it.
        self._seen: dict[tuple[str, str], list[float]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is written."""
        if getattr(record, "always", False):
            return True
        seen = self._seen.setdefault((record.name, str(record.msg)), [record.created, 0.0])
        if not 0 <= record.created - seen[0] < self._window_s:  # a clock may be set back
            left_out = int(seen[1]) - self._most
            seen[:] = [record.created, 0.0]
            if left_out > 0:
                record.msg = f"{record.getMessage()} (and {left_out} more like it before)"
                record.args = None
        seen[1] += 1
        if len(self._seen) > _KINDS:
            self._seen.clear()
        return seen[1] <= self._most


class _Text(logging.Formatter):
    """What stands in a line's fields and not in its words is set behind them."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        line = super().formatMessage(record)
        fields: dict[str, Any] = getattr(record, "fields", {})
        for name in _SHOWN:
            value = str(fields.get(name, ""))
            if value and value not in line:
                line += f" {name}={value}"
        return visible(line)


def about(record: Record, host: str = "", cause: str = "") -> dict[str, Any]:
    """What a line about a request says beside its words: the `extra` of a logger's call."""
    known = {"request_id": record.request_id, "host": host, "cause": cause, "key": record.key, "model": record.model}
    return {"fields": {name: value for name, value in known.items() if value}}


def setup(level: str, format: str) -> None:
    """Send the gateway's log to standard error; `auto` means JSON unless that is a terminal."""
    handler = Stderr(sys.stderr)
    handler.addFilter(Bounded())
    readable = format == "text" or (format == "auto" and sys.stderr.isatty())
    handler.setFormatter(_Text() if readable else _Json())
    # uvicorn speaks only of what went wrong under us: a start that failed, an exception that nobody caught.
    for name, threshold in (("penstock", level.upper()), ("uvicorn.error", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(threshold)
        logger.propagate = False


def requests(records: Sequence[Record], every: bool) -> None:
    """One line for each request that has ended, all of them in one write: an error where its client saw something go wrong, else for
    information, of a probe for whoever looks for faults of ours. Without `every` errors alone, and of these no more than of other lines."""
    level = _requests.getEffectiveLevel()
    if not every or level > logging.INFO:
        records = [record for record in records if record.outcome != "ok" and record.failed]
    silent: frozenset[str] = frozenset() if level <= logging.DEBUG else PROBES
    if level > logging.ERROR:
        return
    offset = time.time() - time.monotonic()
    if not every:
        for record in records:
            if record.path not in silent:
                fields = msgspec.to_builtins(_line(record, offset))
                _requests.error("%s", fields["message"], extra={"fields": {name: fields[name] for name in fields if name not in _OWN}})
        return
    for handler in _requests.handlers or logging.getLogger("penstock").handlers:
        readable = not isinstance(handler.formatter, _Json)
        if readable:
            text = "".join([f"{_readable(record, offset)}\n" for record in records if record.path not in silent])
        else:
            text = _encoder.encode_lines([_line(record, offset) for record in records if record.path not in silent]).decode()
        if text and isinstance(handler, Stderr):
            handler.write(text, len(records))


class _Clock:
    """The time as all our lines write it; a second is put into words once."""

    def __init__(self) -> None:
        self._second = 0
        self._words = ""

    def stamp(self, seconds: float) -> str:
        """`2026-11-25T12:00:00.123Z`."""
        whole = int(seconds)
        if whole != self._second:
            self._second, self._words = whole, time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(whole))
        return f"{self._words}{int((seconds - whole) * 1000):03d}Z"


_clock = _Clock()


def _rounded(seconds: float) -> float:
    """Milliseconds to a hundredth; `round` would write the number down and read it again."""
    return int(seconds * 1e5 + 0.5) / 100


def _tenths(seconds: float) -> str:
    """Milliseconds with one digit behind the point; formatting a float takes several times as long."""
    tenths = int(seconds * 1e4 + 0.5)
    return f"{tenths // 10}.{tenths % 10}"


def _message(record: Record) -> str:
    usage = record.usage
    tokens = f" {usage.prompt_tokens}+{usage.completion_tokens} tokens" if usage is not None else ""
    outcome = f" {record.outcome}" if record.outcome != "ok" else ""
    took = _tenths(record.ended_at - record.started_at)
    return f"{record.method} {record.url} {record.status} {took} ms{tokens}{outcome} {record.request_id}"


def _readable(record: Record, offset: float) -> str:
    at = time.strftime("%H:%M:%S", time.localtime(offset + record.ended_at))
    line = f"{at} {'E' if record.outcome != 'ok' and record.failed else 'I'} {_message(record)}"
    if record.key:
        line = f"{line} key={record.key}"
    if record.model:
        line = f"{line} model={record.model}"
    if record.attempts:
        line = f"{line} host={record.attempts[-1].target}"
    if record.first_event_at and record.stream:
        line = f"{line} first={(record.first_event_at - record.started_at) * 1e3:.1f}"
    if record.why:
        line = f"{line} cause={record.why}"
    return visible(line)


def _line(record: Record, offset: float) -> Line:
    usage, started_at = record.usage, record.started_at
    asks = bool(record.model)
    return Line(
        _clock.stamp(offset + record.ended_at),
        "error" if record.outcome != "ok" and record.failed else "info",
        "penstock.request",
        _message(record),
        record.request_id,
        record.trace.id,
        record.client,
        record.status,
        record.outcome,
        _rounded(record.ended_at - started_at),
        record.error,
        record.why,
        record.key,
        record.model,
        record.stream if asks else None,
        record.attempts[-1].target if record.attempts else "",
        len(record.attempts) if asks else None,
        record.call_id if asks else None,
        Phases(*[_rounded(spent) if spent else None for spent in record.phases]) if asks else None,
        record.continuations,
        _rounded(record.first_event_at - started_at) if record.first_event_at else None,
        usage.prompt_tokens if usage is not None else None,
        usage.completion_tokens if usage is not None else None,
        f"{record.reasked}: {record.reask_result}" if record.reasked else "",
    )
