"""One request and the answer to it: ASGI's `receive` and `send`, and `gateway.wire.asgi.Connection`.

    head of the request -> body -> received        (by the connection, as bytes come)
    head of the answer, kept until the first piece of its body -> body -> complete        (by the application)

An exchange ends when its answer is complete or its client is gone, whichever comes first. What the application says or asks after that
does nothing: the connection may be in the middle of another exchange by then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from gateway.errors import GatewayError, Headers, Unavailable, as_gateway_error, render
from gateway.processes.http.bounds import HIGH_WATER, MAX_UNWANTED_BYTES
from gateway.processes.http.head import STATUS_LINES
from gateway.processes.http.shared import Shared
from gateway.telemetry.record import new_request_id
from gateway.wire.asgi import Message, Scope

log = logging.getLogger("penstock.http")

# Headers of an answer that say how it is written.
_FRAMING: Final = frozenset((b"content-length", b"connection", b"transfer-encoding"))
# Larger pieces are not copied to stand in one piece with what comes before them.
_COPIED: Final = 16 << 10
# As numbers: looking for bytes by bytes takes far longer (see wire/sse.py).
_CR: Final = 0x0D
_LF: Final = 0x0A
# How the rest of an answer is written, where it is not a number of bytes that are still to come.
_CHUNKED: Final = -1
_UNTIL_CLOSE: Final = -2
_BODILESS: Final = -3


class Flow:
    """The client's socket, and whether either side must wait for the other."""

    def __init__(self, transport: Any, loop: Any) -> None:
        self.transport = transport
        self._loop = loop
        # Bytes wait in the transport above its high-water mark.
        self.full = False
        self._drained: asyncio.Future[None] | None = None
        self._reading = True

    def pause_reading(self) -> None:
        """Leave in the socket what comes."""
        if self._reading:
            self._reading = False
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Go on."""
        if not self._reading:
            self._reading = True
            self.transport.resume_reading()

    async def drain(self) -> None:
        """Wait until the transport is below its low-water mark, or gone."""
        while self.full:
            self._drained = self._loop.create_future()
            await self._drained

    def drained(self) -> None:
        """It is."""
        self.full = False
        waiter, self._drained = self._drained, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class Exchange:
    """See above. `minor`: HTTP/1.what the client speaks; `keep`: whether the connection is used again after the answer; `declared`: the
    request's content-length; `expects`: the client waits to be told to send the body; `done` is called when the answer is complete."""

    def __init__(
        self,
        shared: Shared,
        flow: Flow,
        head_only: bool,
        minor: int,
        keep: bool,
        declared: bytes,
        expects: bool,
        done: Callable[[Exchange], None],
    ) -> None:
        self._shared = shared
        self._flow = flow
        self._transport = flow.transport
        self._head_only = head_only
        self._minor = minor
        self.keep = keep
        self._declared = declared
        self._expects = expects
        self._done = done
        self.task: asyncio.Task[None] | None = None
        # The request's body: whether all of it is here, what the application was not given yet, how much there was of it.
        self.received = False
        self._delivered = False
        self._parts: list[bytes] = []
        self._waiting = 0
        self._size = 0
        self._waiter: asyncio.Future[None] | None = None
        # The answer: its head while it is kept, how much of its body is to come, how far it is.
        self._status = 0
        self._headers: Headers | None = None
        self._left = 0
        self.begun = False
        self.complete = False
        self.gone = False
        self._on_gone: Callable[[], None] | None = None

    # From the connection

    def feed(self, data: bytes) -> None:
        """A piece of the request's body."""
        self._size += len(data)
        if not (self.complete or self.gone):
            self._parts.append(data)
            self._waiting += len(data)

    def fed(self) -> None:
        """What came from the socket has been told of. A part is handed on when it is the last, or large."""
        if self._waiting >= HIGH_WATER:
            self._flow.pause_reading()
            if len(self._parts) > 1:
                self._parts = [b"".join(self._parts)]  # many small ones cost many times their size
            self._wake()

    def end_of_request(self) -> None:
        """Its body is whole."""
        self.received = True
        self._wake()

    def lost(self) -> None:
        """The client is gone, or what it sends is no request after all."""
        if self.complete or self.gone:
            return
        self.gone = True
        self._parts.clear()
        self._wake()
        on_gone, self._on_gone = self._on_gone, None
        if on_gone is not None:
            on_gone()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def run(self, scope: Scope) -> None:
        """Let the application answer; whatever it raises becomes an answer, or the visible end of one."""
        try:
            await self._shared.app(scope, self.receive, self.send)
            if not (self.complete or self.gone):
                log.error("%s %s was left without an answer", scope["method"], scope["path"])
                self._fail(GatewayError("The gateway failed to serve this request."))
        except asyncio.CancelledError:
            # By the server, which is on its way out; whoever has begun to answer has told the client himself.
            self._fail(Unavailable("The gateway is shutting down.", code="shutting_down"))
        except Exception as error:
            log.exception("%s %s: unforeseen", scope["method"], scope["path"])
            self._fail(as_gateway_error(error))
        finally:
            if self.task is not None:
                self._shared.tasks.discard(self.task)
                self.task = None

    def _fail(self, error: GatewayError) -> None:
        if self.complete or self.gone:
            return
        self.keep = False
        if self.begun:
            self._transport.close()  # the client sees that it is not whole
            return
        request_id = new_request_id()
        status, headers, content = render(error, request_id)
        self._headers = None
        self.start(status, [*headers, (b"x-request-id", request_id.encode())])
        self.end(content)

    # From the application: ASGI, and `gateway.wire.asgi.Connection`

    def watch(self, gone: Callable[[], None] | None) -> None:
        """See `Connection`."""
        if gone is not None and self.gone:
            gone()
        else:
            self._on_gone = gone

    def body(self) -> bytes | None:
        """See `Connection`."""
        if not self.received or self._waiting != self._size or self.complete or self.gone:
            return None
        self._delivered = True
        return self._take()

    def _take(self) -> bytes:
        parts, self._parts, self._waiting = self._parts, [], 0
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def receive(self) -> Message:
        """ASGI's; a part of the body is handed out when it is the last or large."""
        if self._expects:
            self._expects = False
            if not (self._size or self.received or self.begun or self.gone):
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not (self.complete or self.gone):
            if self.received and not self._delivered:
                self._delivered = True
                return {"type": "http.request", "body": self._take(), "more_body": False}
            if self._waiting >= HIGH_WATER:
                self._flow.resume_reading()
                return {"type": "http.request", "body": self._take(), "more_body": True}
            self._waiter = self._shared.loop.create_future()
            await self._waiter
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """ASGI's; the head of an answer is written with the first piece of its body."""
        kind = message["type"]
        if kind == "http.response.body":
            if not message.get("more_body"):
                self.end(message.get("body", b""))
            elif not self.write(message.get("body", b"")):
                await self._flow.drain()
        elif kind == "http.response.start":
            self.start(message["status"], message["headers"])
        else:
            raise RuntimeError(f"unknown ASGI message {kind!r}")

    async def drain(self) -> None:
        """See `Connection`."""
        await self._flow.drain()

    def start(self, status: int, headers: Headers) -> None:
        """The head of the answer; names in lower case, as ASGI has them."""
        if self.begun or self._headers is not None:
            raise RuntimeError("the answer has begun already")
        self._status = status
        self._headers = headers

    def write(self, block: bytes) -> bool:
        """See `Connection`."""
        if self.gone:
            return True
        if self.complete:
            raise RuntimeError("the answer is complete already")
        head = b""
        if not self.begun:
            head = self._head(-1)
            self.begun = True
        if self._left == _CHUNKED:
            if block:
                self._transport.write(b"%b%x\r\n%b\r\n" % (head, len(block), block))
            elif head:
                self._transport.write(head)
        elif self._left == _BODILESS:
            if head:
                self._transport.write(head)
        else:
            if self._left >= 0:
                if len(block) > self._left:
                    raise RuntimeError("the answer is longer than its content-length")
                self._left -= len(block)
            self._transport.write(head + block)
        return not self._flow.full

    def end(self, block: bytes) -> None:
        """The last piece of the body."""
        if self.gone:
            return
        if self.complete:
            raise RuntimeError("the answer is complete already")
        head = b"" if self.begun else self._head(len(block))
        if self._left == _CHUNKED:
            self._transport.write(b"%b%x\r\n%b\r\n0\r\n\r\n" % (head, len(block), block) if block else head + b"0\r\n\r\n")
        elif self._left == _BODILESS:
            if head:
                self._transport.write(head)
        else:
            if self._left >= 0 and len(block) != self._left:
                raise RuntimeError(f"the answer's last piece has {len(block)} bytes, its content-length leaves {self._left}")
            if len(block) > _COPIED and head:
                self._transport.write(head)
                self._transport.write(block)
            elif head or block:
                self._transport.write(head + block)
        self.begun = self.complete = True
        self._on_gone = None
        self._parts.clear()
        self._wake()
        self._done(self)

    def _head(self, whole: int) -> bytes:
        """The head's bytes; decides how the body is written. `whole`: its length where that is known by now."""
        headers = self._headers
        if headers is None:
            raise RuntimeError("the answer's body comes before its head")
        status = self._status
        parts = [STATUS_LINES[status], self._shared.date]
        left, close, told = _CHUNKED, not (self.keep and self._shared.life.keep and self._can_stay()), False
        for name, value in headers:
            parts += (name, b": ", value, b"\r\n")
            if name in _FRAMING:
                if name == b"content-length":
                    left = int(value)
                elif name == b"connection" and value.lower() == b"close":
                    close = told = True
                else:
                    raise RuntimeError("how an answer is framed is not the application's to say")
        told_of = b"".join(parts[2::4] + parts[4::4])  # names and values
        if _CR in told_of or _LF in told_of:
            raise RuntimeError("a header of the answer holds a line end")
        head = b"".join(parts)
        more = b"connection: close\r\n" if close and not told else b""
        if self._head_only or status == 204 or status == 304:
            left = _BODILESS
        elif left == _CHUNKED:
            if whole >= 0:
                left = whole
                more += b"content-length: %d\r\n" % whole
            elif self._minor == 0:
                left = _UNTIL_CLOSE
                more += b"" if close else b"connection: close\r\n"
                close = True
            else:
                more += b"transfer-encoding: chunked\r\n"
        head += more + b"\r\n"
        self._left, self.keep = left, not close
        return head

    def _can_stay(self) -> bool:
        """Whether the rest of a request that is answered before it is whole is worth reading on for."""
        if self.received:
            return True
        if self._expects or not self._declared:
            return False
        return int(self._declared) - self._size <= MAX_UNWANTED_BYTES
