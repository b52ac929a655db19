"""HTTP/1.1 to one host: a pool of connections, each a parser (httptools, the one uvicorn uses) between a socket and one response.

A connection carries one exchange at a time:

    idle -> waiting (request written) -> reading (head is there) -> ended -> idle      any of them -> closed

What ends in `closed` before the body has ended raises ConnectionLost at whoever waits. Time is kept here for connecting, and for the end
of a body that nobody reads; how long a silence may last is the caller's to decide, who cancels.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from backends.sglang_dsv3.transport.contract import (
    CLOSED_S,
    FINISH_S,
    KEEP_ALIVE_S,
    MAX_HEAD_BYTES,
    ConnectFailed,
    ConnectionLost,
    Options,
    Unanswered,
)

# How much of a body may wait to be read before the socket is left alone: a paced stream never gets there, a long answer for a slow client
# does, and then it is the engine that waits.
HIGH_WATER = 256 << 10
# Larger requests are written piece by piece, as the engine takes them.
PIECE = 256 << 10
_FRAMING = (b"content-length", b"transfer-encoding")
_FRAMING_LENGTHS = (14, 17)


class Http1:
    """Pooled connections to one `http://` host."""

    def __init__(self, url: str, options: Options) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        lines = [f"host: {parts.netloc}", *(f"{name}: {value}" for name, value in options.headers.items())]
        self._common = "".join([f"{line}\r\n" for line in lines])
        self._idle: deque[Connection] = deque()
        # Those that wait for the end of a body that nobody reads.
        self.ending: set[Connection] = set()
        self._closed = False

    async def send(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        connect_s: float = 5.0,
        fresh: bool = False,
    ) -> Connection:
        """See `Transport`."""
        more = "".join([f"{name}: {value}\r\n" for name, value in headers.items()]) if headers else ""
        head = f"{method} {path} HTTP/1.1\r\n{self._common}{more}content-length: {len(body)}\r\n\r\n".encode("latin-1")
        now = time.monotonic()
        connection = None if fresh else self._reuse(now)
        used = connection is not None
        if connection is None:
            connection = await self._connect(connect_s)
            now = time.monotonic()
        connection.begin(now, used)
        if len(body) <= PIECE:
            connection.write(head, body)
        else:
            await connection.write_pieces(head, body)
        return connection

    def _reuse(self, now: float) -> Connection | None:
        """The connection that was idle for the shortest time, if it is still open at the other end; older ones go."""
        idle = self._idle
        while idle and idle[0].idle_since < now - KEEP_ALIVE_S:
            idle.popleft().cut()
        while idle:
            connection = idle.pop()
            if connection.open:
                return connection
        return None

    async def _connect(self, connect_s: float) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(connect_s):
                _, connection = await loop.create_connection(lambda: Connection(self), self._host, self._port)
        except TimeoutError:
            raise ConnectFailed(f"no connection within {connect_s:g} s") from None
        except OSError as error:
            number = error.errno or 0  # a name that is not resolved has others, below 0
            raise ConnectFailed(os.strerror(number) if number > 0 else error.strerror or str(error)) from None
        return connection

    def put_back(self, connection: Connection) -> None:
        """A connection whose exchange is over."""
        if self._closed:
            connection.cut()
        else:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        """A connection that was closed while it was idle."""
        if connection in self._idle:
            self._idle.remove(connection)

    async def aclose(self) -> None:
        """Close what is idle, or about to be."""
        self._closed = True
        for connection in [*self._idle, *self.ending]:
            connection.cut()
        self._idle.clear()


class Connection(asyncio.Protocol):
    """One socket. It is the Response of its current exchange, which saves an object a request."""

    __slots__ = (
        "_framed",
        "_heard",
        "_keep",
        "_loop",
        "_lost",
        "_parser",
        "_parts",
        "_paused",
        "_pool",
        "_size",
        "_timer",
        "_transport",
        "_unbodied",
        "_used",
        "_waiter",
        "_writable",
        "complete",
        "connected_at",
        "headed",
        "idle_since",
        "status",
    )  # fmt: skip

    def __init__(self, pool: Http1) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._parser: Any = None
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        # What is left of a body that nobody reads is waited for until this rings.
        self._timer: asyncio.TimerHandle | None = None
        self._lost: Exception | None = None
        self._parts: list[bytes] = []
        # Bytes of the body that wait to be read, and bytes since then that were none of the body's.
        self._size = 0
        self._unbodied = 0
        self._paused = False
        # Whether there was an exchange before this one, and whether a byte of its answer has come.
        self._used = False
        self._heard = False
        # Whether the connection may be used again, and whether the body's end is marked.
        self._keep = False
        self._framed = False
        self.headed = False
        self.complete = False
        self.status = 0
        self.idle_since = 0.0
        self.connected_at = 0.0

    @property
    def open(self) -> bool:
        """Whether, for all we know, the other end is listening."""
        return self._lost is None

    def begin(self, now: float, used: bool) -> None:
        """One more exchange on it, which was `used` for another before."""
        self._used = used
        self._heard = False
        self._size = self._unbodied = 0
        self._paused = self._keep = self._framed = self.headed = self.complete = False
        self.status = 0
        self.connected_at = now
        # A parser is for one response: a peer that sends a second one nobody asked for must not be believed.
        self._parser = httptools.HttpResponseParser(self)

    def write(self, head: bytes, body: bytes) -> None:
        """A whole request in one write."""
        assert self._transport is not None
        if body:
            self._transport.writelines((head, body))
        else:
            self._transport.write(head)

    async def write_pieces(self, head: bytes, body: bytes) -> None:
        """A large one as the engine takes it; given up where its answer is there already."""
        assert self._transport is not None
        try:
            self._transport.write(head)
            view = memoryview(body)
            for start in range(0, len(body), PIECE):
                if self._writable is not None:
                    await self._writable
                if self._lost is not None or self.headed:  # it has heard enough
                    self._keep = False
                    return
                self._transport.write(view[start : start + PIECE])
        except BaseException:
            self.cut()
            raise

    async def head(self) -> None:
        """See `Response`."""
        while not self.headed:
            if self._lost is not None:
                early = self._used and not self._heard and time.monotonic() - self.connected_at < CLOSED_S
                raise (Unanswered if early else ConnectionLost)(str(self._lost))
            self._waiter = self._loop.create_future()
            await self._waiter

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)
        elif self._timer is not None:
            self._parts.clear()
            self._size = 0
            if self.complete or self._lost is not None:
                self._settle()
                self.close()

    def _settle(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._pool.ending.discard(self)

    async def read(self) -> bytes:
        """See `Response`."""
        while not self._parts:
            if self.complete:
                return b""
            if self._lost is not None:
                raise ConnectionLost(str(self._lost))
            self._waiter = self._loop.create_future()
            await self._waiter
        parts = self._parts
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        self._size = 0
        if self._paused:
            self._paused = False
            if self._transport is not None:
                self._transport.resume_reading()
        return data

    @property
    def ended(self) -> bool:
        """See `Response`."""
        return self.complete and not self._parts

    def close(self) -> None:
        """See `Response`."""
        if self._parser is None:
            return
        self._parser = None
        if self.complete and self._keep and self._lost is None:
            self._parts.clear()
            if self._paused and self._transport is not None:
                self._transport.resume_reading()
            self._pool.put_back(self)
        else:
            self.cut()

    def finish(self) -> None:
        """See `Response`."""
        if self.complete or self._lost is not None:
            self.close()
        elif self._timer is None and self._parser is not None:
            self._parts.clear()
            self._size = 0
            self._timer = self._loop.call_later(FINISH_S, self.cut)
            self._pool.ending.add(self)

    def cut(self) -> None:
        """Close the socket at once, whatever is on it."""
        self._parser = None
        self._settle()
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is there."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Bytes from the socket, through the parser."""
        if self._parser is None or self.complete:
            self._fail("bytes that no request asked for")
            return
        self._heard = True
        size = self._size
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._unparsed(error)
            return
        if self._size > size:
            self._unbodied = 1
            if self._size > HIGH_WATER and not self._paused and self._transport is not None:
                self._paused = True
                self._transport.pause_reading()
        else:
            self._unbodied += len(data)
            if self._unbodied > MAX_HEAD_BYTES:
                self._fail(f"more than {MAX_HEAD_BYTES >> 10} kB of head")
                return
        self._wake()

    def _unparsed(self, error: Exception) -> None:
        if self.complete:  # what follows a whole answer does not change it
            self._keep = False
            self._wake()
        else:
            self._fail(f"this is no HTTP/1.1 response: {error}")

    def _fail(self, reason: str) -> None:
        if self._lost is None:
            self._lost = ConnectionLost(reason)
        self.cut()
        self._wake()

    def eof_received(self) -> bool:
        """The peer has closed its side; a body that has no length ends with it."""
        self._lost = self._lost or ConnectionLost("the peer closed the connection")
        if self.headed and not self._framed:
            self.complete = True
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone."""
        self._transport = None
        self._lost = self._lost or exc or ConnectionLost("the connection was cut")
        if self._parser is None:
            self._pool.forget(self)
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._wake()

    def pause_writing(self) -> None:
        """The engine takes the request more slowly than we have it."""
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        """It has caught up."""
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    # httptools

    def on_message_begin(self) -> None:
        """A second response to one request: nobody asked for it, and what it says must not become part of the first."""
        if self.complete:
            raise ValueError("a second response")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Of a response's headers only that matters which marks the body's end."""
        if len(name) in _FRAMING_LENGTHS and not self.headed and name.lower() in _FRAMING:
            self._framed = True

    def on_headers_complete(self) -> None:
        """The head is there, unless it is a mere `100 Continue`."""
        self.status = self._parser.get_status_code()
        if self.status >= 200:
            self.headed = True
            self._keep = self._parser.should_keep_alive()

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        self._parts.append(data)
        self._size += len(data)

    def on_message_complete(self) -> None:
        """The response is whole (or was an informational one)."""
        self.complete = self.headed
