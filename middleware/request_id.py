"""Outermost: the request's context, the headers that every answer carries, and its log line and counts when the body has ended."""

from __future__ import annotations

import time
from collections.abc import Awaitable

from gateway.errors import Headers
from gateway.lifecycle import Lifecycle
from gateway.telemetry.observe import Observer
from gateway.telemetry.record import KEY, Record
from gateway.wire.asgi import App, Message, Receive, Scope, Send
from gateway.wire.error import Shape

# The version of OpenAI's API that has been in force since it began to say one.
_VERSION = (b"openai-version", b"2020-10-01")


def _headers(record: Record) -> Headers:
    """`openai-processing-ms` is the time until the answer began, which for a stream is its first event."""
    request_id = record.request_id.encode("latin-1")
    headers = [
        (b"x-request-id", request_id),
        (b"x-trace-id", record.trace.id.encode()),
        (b"openai-processing-ms", b"%d" % ((time.monotonic() - record.started_at) * 1000)),
        _VERSION,
        *record.headers,
    ]
    if record.shape is Shape.ANTHROPIC:
        headers.append((b"request-id", request_id))  # where Anthropic's SDKs look
    return headers


class RequestId:
    """Makes the Record; nothing below may be without it. `sampling`: which traces are recorded, see `wire.trace.Trace`."""

    def __init__(self, app: App, observer: Observer, lifecycle: Lifecycle, sampling: int) -> None:
        self._app = app
        self._observer = observer
        self._open = lifecycle.open
        self._sampling = sampling

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = scope[KEY] = Record(scope, self._sampling)
        self._open.add(record)

        # No coroutine of its own: what `send` returns is awaited.
        def send_with_headers(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_headers(record)]
                record.status = message["status"]
            return send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            self._open.discard(record)
            record.ended_at = record.enter(record.phase)
            self._observer.ended(record)
