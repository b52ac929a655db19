"""One exchange from the client's bytes to the client's bytes: body in, reply out, and a watch on everybody leaving."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from types import TracebackType
from typing import Literal, Self

from gateway import calls, context, errors
from gateway.config import Settings
from gateway.context import RequestContext
from gateway.dispatch import Dispatcher
from gateway.errors import ClientGone, GatewayError, GatewayTimeout, Unavailable
from gateway.plugin import AttemptFailed, Endpoint, Reply
from gateway.wire import body
from gateway.wire.asgi import App, Receive, Scope, Send

log = logging.getLogger("penstock.relay")

_NUMBER = re.compile(rb'"sequence_number":\s*(\d{1,9})\b')

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # NGINX in front of us must not collect events
]


class Watch:
    """Cancels the task that entered it when the client leaves, or when the engine keeps silent in mid-stream for too long.

    Time spent waiting for a slow client is not the engine's silence: `to_client` stops the clock, `to_engine` starts it again. How long
    a client may leave its answer unread is the kernel's to watch (TCP_USER_TIMEOUT on the listening socket).
    """

    def __init__(self, receive: Receive, silence_s: float) -> None:
        self._receive = receive
        self._silence_s = silence_s
        self._since: float | None = None
        self._ended = False
        self._timer: asyncio.TimerHandle | None = None
        self.reason: Literal["client gone", "engine silent"] | None = None

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._watcher = self._loop.create_task(self._until_disconnect())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()
        self._watcher.cancel()
        if self._timer is not None:
            self._timer.cancel()
        if kind is asyncio.CancelledError and self.reason is not None and self._task.uncancel() == 0:
            if self.reason == "client gone":
                raise ClientGone from None
            raise GatewayTimeout(f"The engine sent nothing for {self._silence_s:g} s.") from None

    def end(self) -> None:
        """The answer is complete: whatever happens to the connection now is no concern of this request."""
        self._ended = True

    def to_engine(self) -> None:
        """From now on the engine's silence counts."""
        self._since = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._silence_s, self._check)

    def to_client(self) -> None:
        """From now on it is the client we wait for."""
        self._since = None

    def _check(self) -> None:
        silent = 0.0 if self._since is None else self._loop.time() - self._since
        if silent >= self._silence_s:
            self._cancel("engine silent")
        else:
            self._timer = self._loop.call_later(self._silence_s - silent, self._check)

    async def _until_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._cancel("client gone")

    def _cancel(self, reason: Literal["client gone", "engine silent"]) -> None:
        if not self._ended and self.reason is None:
            self.reason = reason
            self._task.cancel()


def exchange(endpoint: Endpoint, dispatcher: Dispatcher, settings: Settings) -> App:
    """The ASGI handler of one endpoint: the endpoint is data, the path through the gateway is this one."""
    limit_bytes, limit_s = settings.security.body_limit_mb << 20, settings.timeouts.body_s
    silence_s = settings.timeouts.between_tokens_s

    async def handle(scope: Scope, receive: Receive, send: Send) -> None:
        record = context.of(scope)
        raw = await body.read(receive, limit_bytes, limit_s, context.header(scope, b"content-length"))
        call = calls.parse(endpoint, raw, context.header(scope, b"content-type") or b"")
        del raw
        record.call_id, record.model, record.stream = call.id, call.model, call.stream
        try:
            with Watch(receive, silence_s) as watch:
                reply = await dispatcher.send(call, record)
                record.first_event_at = time.monotonic()
                try:
                    if reply.events is None:
                        await _whole(reply, send, watch)
                    else:
                        await _stream(reply, send, watch, record)
                finally:
                    reply.close()
                    record.usage = reply.usage
        except (AttemptFailed, errors.GatewayError) as error:
            if not record.status:
                raise  # nothing has been sent: the errors middleware answers
            record.outcome = error.cause if isinstance(error, AttemptFailed) else type(error).__name__
            log.info("%s ended early: %s", record.request_id, error)

    return handle


async def _whole(reply: Reply, send: Send, watch: Watch) -> None:
    headers = [(b"content-type", reply.content_type), (b"content-length", b"%d" % len(reply.body))]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    watch.end()
    await send({"type": "http.response.body", "body": reply.body})


async def _stream(reply: Reply, send: Send, watch: Watch, record: RequestContext) -> None:
    """Event by event to the client. What breaks after the first event ends in an honest error event, never in `[DONE]`."""
    assert reply.events is not None
    await send({"type": "http.response.start", "status": reply.status, "headers": list(_STREAM_HEADERS)})
    block = last = b""
    try:
        watch.to_engine()
        async for block in reply.events:
            watch.to_client()
            await send({"type": "http.response.body", "body": block, "more_body": True})
            watch.to_engine()
    except BaseException as error:
        last = errors.event(_reason(error, watch), record.request_id, record.shape, _next_number(block))
        raise
    finally:
        watch.end()
        if watch.reason != "client gone":
            await send({"type": "http.response.body", "body": last})


def _reason(error: BaseException, watch: Watch) -> GatewayError:
    """Why a stream ends here; a client must be told, since a stream that just stops looks like success to the SDKs."""
    if isinstance(error, AttemptFailed):
        return error.error
    if isinstance(error, asyncio.CancelledError):
        if watch.reason == "engine silent":
            return GatewayTimeout("The engine stopped sending in the middle of the answer.")
        return Unavailable("The gateway is shutting down.")
    return errors.as_gateway_error(error)


def _next_number(block: bytes) -> int:
    """The number of the event after `block`, in streams that number their events."""
    found = _NUMBER.findall(block)
    return int(found[-1]) + 1 if found else 0
