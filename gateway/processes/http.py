"""uvicorn, with what it lacks for a server that strangers talk to and that must be able to leave: bounds on a request's head, refusals in
OpenAI's shape, and an end in which nobody is cut off who could have been answered."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, ClassVar

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway import errors
from gateway.config import Settings
from gateway.lifecycle import Lifecycle
from gateway.processes.protocol import Retire
from gateway.telemetry.record import new_request_id
from gateway.wire.asgi import App

log = logging.getLogger("penstock.worker")

# A client's idle connection is kept open for so many seconds. Longer than the OpenAI SDKs' pools keep theirs idle (5 s).
KEEP_ALIVE_S = 75
# A request's line and headers together; the SDKs send about 1 kB.
MAX_HEAD_BYTES = 64 << 10
# An answer that is ended gets so long to tell its client.
LAST_WORDS_S = 1.0


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with bounds on a request's head, in time and in bytes, and answers of its own in OpenAI's shape."""

    head_s: ClassVar[float]
    life: ClassVar[Lifecycle]
    idle_since = 0.0
    _in_head = True
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there, and has a while to say what it wants."""
        super().connection_made(transport)
        self.idle_since = time.monotonic()
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """A client is gone."""
        self._stop_waiting()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """A request's head begins."""
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        """It has ended, and the request is on its way into the app."""
        self._in_head = False
        super().on_headers_complete()
        if not self.life.keep and self.cycle is not None:
            self.cycle.keep_alive = False  # said in the answer, so that the client does not try this connection again

    def on_response_complete(self) -> None:
        """The connection is idle again."""
        self.idle_since = time.monotonic()
        super().on_response_complete()

    def data_received(self, data: bytes) -> None:
        """Bytes from the client, through the parser and past the bounds."""
        super().data_received(data)
        if not self._in_head:
            self._stop_waiting()
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(f"The request's head is larger than {MAX_HEAD_BYTES >> 10} kB.", 431, "request_head_too_large")
        elif self._head_timer is None:  # the next request of a connection that is kept open
            self._wait_for_head()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is told so in OpenAI's shape."""
        self._refuse(msg, 400, "invalid_http")

    def rest(self, idle_s: float) -> None:
        """Close the connection if nothing was under way on it for so long."""
        idle = self.cycle is None or self.cycle.response_complete
        if idle and not self._head_bytes_pending() and time.monotonic() - self.idle_since >= idle_s:
            self.transport.close()

    def _head_bytes_pending(self) -> bool:
        return self._in_head and self._head_bytes > 0

    def _wait_for_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_s, self._head_too_slow)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_too_slow(self) -> None:
        if self._head_bytes:
            self._refuse(f"The request's head did not arrive within {self.head_s:g} s.", 408, "request_timeout")
        else:  # somebody connected and said nothing
            self.transport.close()

    def _refuse(self, message: str, status: int, code: str) -> None:
        self._stop_waiting()
        if self.transport.is_closing():
            return
        request_id = new_request_id()
        status, headers, content = errors.render(errors.InvalidRequest(message, status=status, code=code), request_id)
        lines = [b"HTTP/1.1 %d %s" % (status, HTTPStatus(status).phrase.encode()), *(name + b": " + value for name, value in headers)]
        lines += [b"x-request-id: " + request_id.encode(), b"connection: close", b"", content]
        self.transport.write(b"\r\n".join(lines))
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn that leaves signals to the parent, says when it serves, and ends as it is told to."""

    def __init__(self, config: uvicorn.Config, life: Lifecycle, serving: Callable[[bool], None]) -> None:
        super().__init__(config)
        self._life = life
        self._serving = serving
        self._order: Retire | None = None

    def capture_signals(self) -> contextlib.nullcontext[None]:  # type: ignore[override]
        """The parent decides when a worker stops."""
        return contextlib.nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say so once connections are accepted."""
        await super().startup(sockets)
        if self.started:
            self._serving(True)

    async def retire(self, order: Retire) -> None:
        """Begin to end. A second, more impatient order replaces the first."""
        self._order = order
        self._life.ready, self._life.keep = order.ready, False
        await asyncio.sleep(order.grace_s)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """No new connections; open answers finish, idle connections go, and what takes too long is ended in words."""
        self._life.keep = False
        for server in self.servers:
            server.close()
        for listener in sockets or ():
            listener.close()
        self._serving(False)
        began = time.monotonic()
        while self.server_state.connections or self.server_state.tasks:
            order = self._order or Retire(False, 0.0, 0.0, 0.0)
            if time.monotonic() - began >= order.limit_s:
                break
            for connection in list(self.server_state.connections):
                connection.rest(order.linger_s)  # type: ignore[union-attr]
            await asyncio.sleep(0.05)
        await self._end_the_rest()
        await self.lifespan.shutdown()

    async def _end_the_rest(self) -> None:
        tasks = set(self.server_state.tasks)
        if tasks:
            log.warning("%d open answers are ended; the oldest has run for %.1f s", len(self._life.open), self._life.oldest_s())
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=LAST_WORDS_S)
        for connection in list(self.server_state.connections):
            connection.transport.close()  # what is written already still goes out
        await asyncio.sleep(0)


def server(app: App, settings: Settings, life: Lifecycle, serving: Callable[[bool], None], **more: Any) -> Server:
    """A server of `app`, to be run with `serve(sockets=[...])`."""
    protocol = type("BoundProtocol", (Protocol,), {"head_s": settings.timeouts.head_s, "life": life})
    options: dict[str, Any] = {
        "loop": "none",
        "http": protocol,
        "ws": "none",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "timeout_keep_alive": KEEP_ALIVE_S,
        **more,
    }
    return Server(uvicorn.Config(app, **options), life, serving)
