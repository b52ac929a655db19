"""Log lines: readable on a terminal, one JSON object a line in a pipe. No prompt, no answer, no key is ever in one."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import msgspec

from gateway.telemetry.record import PHASES, Record

_encoder = msgspec.json.Encoder()
_requests = logging.getLogger("penstock.request")
_KINDS = 1000
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
    "target": "the host that answered, or was asked last",
    "attempts": "how many hosts were asked",
    "continuations": "how often an answer that had begun went on elsewhere",
    "first_event_ms": "until the answer began",
    "phases_ms": "where the time went; they add up to `ms`",
    "prompt_tokens": "as the engine counted",
    "completion_tokens": "as the engine counted, or the events that passed",
    "key": "the key's name",
    "outcome": "what went wrong, or nothing",
}


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
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
    The line of a request is never left out, nor what was logged with `extra={"always": True}`."""

    def __init__(self, most: int = 20, window_s: float = 10.0) -> None:
        super().__init__()
        self._most = most
        self._window_s = window_s
        # Logger and template -> when the window began, and how many there were in it.
        self._seen: dict[tuple[str, str], list[float]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is written."""
        if record.name == _requests.name or getattr(record, "always", False):
            return True
        seen = self._seen.setdefault((record.name, str(record.msg)), [record.created, 0.0])
        if record.created - seen[0] >= self._window_s:
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
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")


def setup(level: str, format: str) -> None:
    """Send the gateway's log to standard error; `auto` means JSON unless that is a terminal."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Bounded())
    readable = format == "text" or (format == "auto" and sys.stderr.isatty())
    handler.setFormatter(_Text() if readable else _Json())
    # uvicorn speaks only of what went wrong under us: a start that failed, an exception that nobody caught.
    for name, threshold in (("penstock", level.upper()), ("uvicorn.error", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(threshold)
        logger.propagate = False


def request(record: Record) -> None:
    """The one line of a request, when its body has ended."""
    if not _requests.isEnabledFor(logging.INFO):
        return
    elapsed_ms = (record.ended_at - record.started_at) * 1e3
    fields: dict[str, Any] = {
        "request_id": record.request_id,
        "trace_id": record.trace.id,
        "client": record.client,
        "status": record.status,
        "ms": round(elapsed_ms, 1),
    }
    if record.model:
        fields.update(model=record.model, stream=record.stream, target=record.target, attempts=record.attempts, id=record.call_id)
    if record.continuations:
        fields["continuations"] = record.continuations
    if record.first_event_at:
        fields["first_event_ms"] = round((record.first_event_at - record.started_at) * 1e3, 1)
    if record.usage is not None:
        fields.update(prompt_tokens=record.usage.prompt_tokens, completion_tokens=record.usage.completion_tokens)
    if record.key:
        fields["key"] = record.key
    if record.outcome:
        fields["outcome"] = record.outcome
    if record.model:
        fields["phases_ms"] = {name: round(spent * 1e3, 2) for name, spent in zip(PHASES, record.phases, strict=True) if spent}
    tokens = f" {record.usage.prompt_tokens}+{record.usage.completion_tokens} tokens" if record.usage is not None else ""
    outcome = f" {record.outcome}" if record.outcome else ""
    _requests.info(
        "%s %s %d %.1f ms%s%s %s",
        record.method, record.target_sent, record.status, elapsed_ms, tokens, outcome, record.request_id,
        extra={"fields": fields},
    )  # fmt: skip
