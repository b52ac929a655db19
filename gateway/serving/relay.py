"""One exchange from the client's bytes to the client's bytes: body in, reply out, and a watch on everybody leaving."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from types import TracebackType
from typing import Literal, Self

from gateway import errors
from gateway.config import Settings
from gateway.errors import ClientGone, GatewayError, GatewayTimeout, Unavailable
from gateway.plugin import AttemptFailed, Call, Endpoint, Verdict
from gateway.serving import calls
from gateway.serving.dispatch import Attempt, Dispatcher
from gateway.telemetry.record import CLIENT, GENERATE, Record
from gateway.wire import body
from gateway.wire.asgi import App, Receive, Scope, Send, header
from gateway.wire.memory import BodyMemory
from gateway.wire.structure import LARGE_BYTES

log = logging.getLogger("penstock.relay")

_NUMBER = re.compile(rb'"sequence_number":\s*(\d{1,9})\b')

# How much of an answer is kept so that it could be continued; a longer one that breaks ends in an error event.
MAX_KEPT_BYTES = 4 << 20
# What stands in a stream where another host took over; to every client a comment.
_CONTINUED = b": continued on another host\n\n"

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
        if kind is asyncio.CancelledError and self.reason == "client gone" and self._task.uncancel() == 0:
            raise ClientGone from None

    def end(self) -> None:
        """The answer is complete: whatever happens to the connection now is no concern of this request."""
        self._ended = True

    def to_engine(self) -> float:
        """From now on the engine's silence counts; the time."""
        self._since = now = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._silence_s, self._check)
        return now

    def to_client(self) -> None:
        """From now on it is the client we wait for."""
        self._since = None

    def as_failure(self, error: BaseException) -> AttemptFailed:
        """What broke an answer: the failure itself, or the engine's silence; anybody else's cancellation is raised again."""
        if isinstance(error, AttemptFailed):
            return error
        if self.reason != "engine silent" or self._task.uncancel() > 0:
            raise error
        self.reason = None
        if self._watcher.done():  # both at once: then there is nobody to go on for
            self.reason = "client gone"
            raise ClientGone
        return AttemptFailed("timeout", GatewayTimeout("The engine stopped sending in the middle of the answer."))

    def _check(self) -> None:
        self._timer = None
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


def exchange(endpoint: Endpoint, dispatcher: Dispatcher, settings: Settings, memory: BodyMemory) -> App:
    """The ASGI handler of one endpoint: the endpoint is data, the path through the gateway is this one."""
    limit_bytes, limit_s = settings.security.body_limit_mb << 20, settings.timeouts.body_s
    silence_s = settings.timeouts.between_tokens_s

    async def handle(scope: Scope, receive: Receive, send: Send) -> None:
        record = Record.of(scope)
        with memory.lease(record.key) as lease:
            encoding = header(scope, b"content-encoding") or b""
            raw = await body.read(receive, limit_bytes, limit_s, header(scope, b"content-length"), lease, encoding)
            kind = header(scope, b"content-type") or b""
            call = calls.parse(endpoint, raw, kind) if len(raw) <= LARGE_BYTES else await calls.parse_large(endpoint, raw, kind)
            del raw
            record.call_id, record.model, record.stream = call.id, call.model, call.stream
            try:
                with Watch(receive, silence_s) as watch:
                    attempt = await dispatcher.send(call, record)
                    record.first_event_at = record.mark
                    if attempt.reply.events is None:
                        await _whole(attempt, send, watch, record)
                    else:
                        await _Stream(call, dispatcher, send, watch, record).run(attempt)
            except (AttemptFailed, errors.GatewayError) as error:
                if not record.status:
                    raise  # nothing has been sent: the errors middleware answers
                record.outcome = error.cause if isinstance(error, AttemptFailed) else type(error).__name__
                log.info("%s ended early: %s", record.request_id, error)

    return handle


async def _whole(attempt: Attempt, send: Send, watch: Watch, record: Record) -> None:
    reply = attempt.reply
    record.enter(CLIENT)
    try:
        headers = [(b"content-type", reply.content_type), (b"content-length", b"%d" % len(reply.body))]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        watch.end()
        await send({"type": "http.response.body", "body": reply.body})
    finally:
        attempt.end(Verdict.OK)  # the engine has done its work, whatever became of the client
        record.usage, record.finishes = reply.usage, reply.finishes
        record.tried[-1].ended_at = record.tried[-1].first_at


class _Stream:
    """Event by event to the client. What breaks after the first event is continued on another host where that can be done without a seam,
    and otherwise ends in an honest error event, never in `[DONE]`."""

    def __init__(self, call: Call, dispatcher: Dispatcher, send: Send, watch: Watch, record: Record) -> None:
        self._call = call
        self._dispatcher = dispatcher
        self._send = send
        self._watch = watch
        self._record = record
        # What the client was given, while the answer may have to be continued; nothing is decoded before that happens.
        self._kept: list[bytes] | None = [] if call.keep else None
        self._kept_bytes = 0
        self._last = b""

    async def run(self, attempt: Attempt) -> None:
        """To the answer's end; raises what ended it early, when the client has been told."""
        send, watch, record = self._send, self._watch, self._record
        await send({"type": "http.response.start", "status": attempt.reply.status, "headers": list(_STREAM_HEADERS)})
        last = b""
        try:
            while True:
                try:
                    await self._relay(attempt)
                    attempt.end(Verdict.OK)
                    return
                except (AttemptFailed, asyncio.CancelledError) as error:
                    failure = watch.as_failure(error)
                    watch.to_client()
                    attempt.end(failure.verdict)
                    record.tried[-1].result, record.tried[-1].ended_at = failure.cause, time.monotonic()
                    resumed = await self._resume(attempt)
                    if resumed is None:
                        raise failure from None
                    log.warning("%s goes on at %s after %s", record.request_id, record.target, failure)
                    attempt = resumed
                    await send({"type": "http.response.body", "body": _CONTINUED, "more_body": True})
        except BaseException as error:
            last = errors.event(_reason(error), record.request_id, record.shape, _next_number(self._last))
            raise
        finally:
            watch.end()
            attempt.end(None)
            record.usage, record.finishes = attempt.reply.usage, attempt.reply.finishes
            record.tried[-1].ended_at = record.tried[-1].ended_at or time.monotonic()
            if watch.reason != "client gone":
                await send({"type": "http.response.body", "body": last})

    async def _relay(self, attempt: Attempt) -> None:
        send, watch, host, kept, record = self._send, self._watch, attempt.host, self._kept, self._record
        assert attempt.reply.events is not None
        clock = time.monotonic
        watch.to_engine()
        after, blocked, largest, count = record.mark, 0.0, record.largest_gap_s, 0
        try:
            async for block in attempt.reply.events:
                before = clock()
                if count and before - after > largest:
                    largest = before - after
                watch.to_client()
                await send({"type": "http.response.body", "body": block, "more_body": True})
                now = watch.to_engine()
                after = clock()
                blocked += after - before
                count += 1
                self._last = block
                if host is not None:
                    host.last_event_at = now
                if kept is not None:
                    kept.append(block)
                    self._kept_bytes += len(block)
                    if self._kept_bytes > MAX_KEPT_BYTES:
                        self._kept = kept = None
        finally:
            # Time that the client took is no time of the engine's.
            record.enter(GENERATE)
            record.phases[GENERATE] -= blocked
            record.phases[CLIENT] += blocked
            record.largest_gap_s, record.events = largest, record.events + count

    async def _resume(self, broken: Attempt) -> Attempt | None:
        if self._kept is None:
            return None
        return await self._dispatcher.resume(broken, self._call, b"".join(self._kept), broken.reply.usage, self._record)


def _reason(error: BaseException) -> GatewayError:
    """Why a stream ends here; a client must be told, since a stream that just stops looks like success to the SDKs."""
    if isinstance(error, AttemptFailed):
        return error.error
    if isinstance(error, asyncio.CancelledError):
        return Unavailable("The gateway is shutting down.")
    return errors.as_gateway_error(error)


def _next_number(block: bytes) -> int:
    """The number of the event after `block`, in streams that number their events."""
    found = _NUMBER.findall(block)
    return int(found[-1]) + 1 if found else 0
