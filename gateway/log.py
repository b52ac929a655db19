"""Log lines: readable on a terminal, one JSON object a line in a pipe. No prompt, no answer, no key is ever in one."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import msgspec

from gateway.context import RequestContext

_encoder = msgspec.json.Encoder()
_requests = logging.getLogger("penstock.request")


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


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")


def setup(level: str, format: str) -> None:
    """Send the gateway's log to standard error; `auto` means JSON unless that is a terminal."""
    handler = logging.StreamHandler(sys.stderr)
    readable = format == "text" or (format == "auto" and sys.stderr.isatty())
    handler.setFormatter(_Text() if readable else _Json())
    # uvicorn speaks only of what went wrong under us: a start that failed, an exception that nobody caught.
    for name, threshold in (("penstock", level.upper()), ("uvicorn.error", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(threshold)
        logger.propagate = False


def request(record: RequestContext) -> None:
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
    tokens = f" {record.usage.prompt_tokens}+{record.usage.completion_tokens} tokens" if record.usage is not None else ""
    outcome = f" {record.outcome}" if record.outcome else ""
    _requests.info(
        "%s %s %d %.1f ms%s%s %s",
        record.method, record.target_sent, record.status, elapsed_ms, tokens, outcome, record.request_id,
        extra={"fields": fields},
    )  # fmt: skip
