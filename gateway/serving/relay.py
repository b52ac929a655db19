"""From a reply that has begun to the client's last byte: whole answers, and streams event by event with honest endings."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from typing import Final

from gateway import errors
from gateway.config import Timeouts
from gateway.errors import GatewayError, Unavailable
from gateway.plugin import AttemptFailed, Reply, Verdict
from gateway.serving.dispatch import Dispatcher, Exchange, reason
from gateway.serving.kept import Kept
from gateway.telemetry.log import about
from gateway.telemetry.record import CLIENT, GENERATE, Attempt
from gateway.wire.asgi import Connection, Send

log = logging.getLogger("penstock.relay")

_NUMBER = re.compile(rb'"sequence_number":\s*(\d{1,9})\b')

# How much of an answer is kept so that it could be continued; a longer one that breaks ends in an error event.
MAX_KEPT_BYTES: Final = 4 << 20
# And of one that is only looked at when it has ended (`gateway.sentinel`).
MAX_HELD_BYTES: Final = 1 << 20
# What is kept is packed once in so many blocks, plus one, and at once after a block that is larger than this: what is not packed yet is not
# counted either.
PACKED_EVERY: Final = 0xF
_LARGE: Final = 64 << 10
# What stands in a stream where another host took over; to every client a comment.
_CONTINUED = b": continued on another host\n\n"
# And while nothing has come yet, where `timeouts.keepalive_s` is set.
_WAITING = b": waiting for the engine\n\n"

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # NGINX in front of us must not collect events
]


async def whole(exchange: Exchange, attempt: Attempt, send: Send) -> None:
    """A JSON answer."""
    reply = attempt.reply
    assert reply is not None
    try:
        headers = [(b"content-type", reply.content_type), (b"content-length", b"%d" % len(reply.body))]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        exchange.watch.end()
        if exchange.record.sampled:
            exchange.record.answer = reply.body
        await send({"type": "http.response.body", "body": reply.body})
    finally:
        attempt.end(Verdict.OK)  # the engine has done its work, whatever became of the client


class Stream:
    """Event by event to the client. What breaks after the first event is continued on another host where that can be done without a seam,
    and otherwise ends in an honest error event, never in `[DONE]`."""

    def __init__(self, exchange: Exchange, dispatcher: Dispatcher, timeouts: Timeouts, connection: Connection | None, send: Send) -> None:
        self._exchange = exchange
        # Where the server is ours an event costs no coroutine on its way to the client.
        self._connection = connection
        self._dispatcher = dispatcher
        self._silence_s = timeouts.between_tokens_s
        self._keepalive_s = timeouts.keepalive_s
        self._send = send
        # What the client was given, while the answer may have to be continued; nothing is decoded before that happens.
        self._kept = Kept() if exchange.terms.keep or exchange.record.sampled else None
        self._most = MAX_KEPT_BYTES if exchange.terms.keep else MAX_HELD_BYTES
        self._last = b""

    async def run(self) -> None:
        """From the first attempt to the answer's end; raises what ended it early, when the client has been told."""
        send, watch, record = self._send, self._exchange.watch, self._exchange.record
        attempt: Attempt | None = None
        last = b""
        try:
            attempt = await (self._dispatcher.begin(self._exchange) if self._keepalive_s is None else self._begin_and_keep_alive())
            if not record.status:
                await send({"type": "http.response.start", "status": 200, "headers": list(_STREAM_HEADERS)})
            while True:
                reply = attempt.reply
                assert reply is not None
                try:
                    await self._relay(attempt, reply)
                    if record.sampled and self._kept is not None:
                        record.answer = self._kept
                    attempt.end(Verdict.OK)
                    return
                except (AttemptFailed, asyncio.CancelledError) as error:
                    failure = watch.as_failure(error, "The engine stopped sending in the middle of the answer.")
                    watch.to_client()
                    host, why = attempt.host, reason(failure, attempt.target)
                    attempt.end(failure.verdict, failure.cause, why)
                    resumed = await self._resume(attempt, reply)
                    if resumed is None:
                        if host is not None:
                            host.broke += 1
                        raise failure from None
                    if resumed.host is not None:  # else there are only closing words to come, which are no host's
                        if host is not None:
                            host.moved += 1
                        self._say_moved(attempt.target, resumed.target, why)
                        await send({"type": "http.response.body", "body": _CONTINUED, "more_body": True})
                    attempt = resumed
        except BaseException as error:
            last = errors.event(_reason(error), record.request_id, record.shape, _next_number(self._last))
            raise
        finally:
            watch.end()
            if attempt is not None:
                attempt.end(None, "given up")
            if record.status and watch.reason != "client gone":
                await send({"type": "http.response.body", "body": last})

    def _say_moved(self, before: str, after: str, why: str) -> None:
        """Nobody but the operator has noticed."""
        record = self._exchange.record
        log.info("%s goes on at %s: %s has left it (%s)", record.request_id, after, before, why, extra=about(record, after, why))

    async def _begin_and_keep_alive(self) -> Attempt:
        """The same as `Dispatcher.begin`, with comments for the client while it takes long: from the first of them on the answer is a 200,
        and a refusal can only be an event of it."""
        keeper = asyncio.get_running_loop().create_task(self._keep_alive())
        try:
            return await self._dispatcher.begin(self._exchange)
        finally:
            keeper.cancel()  # which says nothing more; to wait for it here would lose the failure (docs/performance.md#compiled)

    async def _keep_alive(self) -> None:
        assert self._keepalive_s is not None
        while True:
            await asyncio.sleep(self._keepalive_s)
            if not self._exchange.record.status:
                await self._send({"type": "http.response.start", "status": 200, "headers": list(_STREAM_HEADERS)})
            await self._send({"type": "http.response.body", "body": _WAITING, "more_body": True})

    async def _relay(self, attempt: Attempt, reply: Reply) -> None:
        record, watch, send = self._exchange.record, self._exchange.watch, self._send
        host, kept, connection = attempt.host, self._kept, self._connection
        fresh, most = kept.fresh if kept is not None else [], self._most
        silence_s = self._silence_s
        clock = time.monotonic
        after, blocked, largest, count = clock(), 0.0, record.largest_gap_s, 0
        block = self._last
        held, attempt.held = attempt.held, b""
        try:
            while True:
                if held:  # which was read before it was sure that it is to be relayed
                    block, held = held, b""
                else:
                    watch.to_engine(after + silence_s)
                    block = await reply.next()
                if not block:
                    return
                before = clock()
                if count and before - after > largest:
                    largest = before - after
                watch.to_client()
                self._last = block
                if connection is not None and connection.write(block):
                    after = before  # nobody waited
                else:
                    if connection is not None:
                        await connection.drain()
                    else:
                        await send({"type": "http.response.body", "body": block, "more_body": True})
                    after = clock()
                    blocked += after - before
                count += 1
                if host is not None:
                    host.last_event_at = after
                if kept is not None:
                    fresh.append(block)
                    if not count & PACKED_EVERY or len(block) > _LARGE:
                        kept.pack()
                        if kept.size > most:
                            self._kept = kept = None
        finally:
            # Time that the client took is no time of the engine's.
            record.enter(GENERATE)
            record.phases[GENERATE] -= blocked
            record.phases[CLIENT] += blocked
            record.largest_gap_s, record.events = largest, record.events + count

    async def _resume(self, broken: Attempt, reply: Reply) -> Attempt | None:
        if self._kept is None or not self._exchange.terms.keep:
            return None
        return await self._dispatcher.resume(self._exchange, broken, reply, self._kept.whole())


def _reason(error: BaseException) -> GatewayError:
    """Why a stream ends here; a client must be told, since a stream that just stops looks like success to the SDKs."""
    if isinstance(error, AttemptFailed):
        return error.error
    if isinstance(error, asyncio.CancelledError):
        return Unavailable("The gateway is shutting down.", code="shutting_down")
    return errors.as_gateway_error(error)


def _next_number(block: bytes) -> int:
    """The number of the event after `block`, in streams that number their events."""
    found = _NUMBER.findall(block)
    return int(found[-1]) + 1 if found else 0
