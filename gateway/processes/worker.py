"""A worker: one event loop serving the socket that the parent opened. `python -m gateway.processes.worker LISTEN_FD CONTROL_FD`."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import signal
import socket
import sys
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import ClassVar

import msgspec
import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway import app, context, errors, log
from gateway.config import Settings
from gateway.plugin import BackendEnv, ServiceState
from gateway.processes import protocol

# A client's idle connection is kept open for so many seconds. Longer than the OpenAI SDKs' pools keep theirs idle (5 s).
KEEP_ALIVE_S = 75


# A request's line and headers together; the SDKs send about 1 kB.
MAX_HEAD_BYTES = 64 << 10


class _Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with bounds on a request's head, in time and in bytes, and answers of its own in OpenAI's shape."""

    head_s: ClassVar[float]
    _in_head = True
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
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
        self._refuse(msg, 400, "invalid_http")

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
        request_id = context.new_request_id()
        status, headers, content = errors.render(errors.InvalidRequest(message, status=status, code=code), request_id)
        lines = [b"HTTP/1.1 %d %s" % (status, HTTPStatus(status).phrase.encode()), *(name + b": " + value for name, value in headers)]
        lines += [b"x-request-id: " + request_id.encode(), b"connection: close", b"", content]
        self.transport.write(b"\r\n".join(lines))
        self.transport.close()


def _protocol(settings: Settings) -> type[_Protocol]:
    return type("Protocol", (_Protocol,), {"head_s": settings.timeouts.head_s})


class _Server(uvicorn.Server):
    """uvicorn that leaves signals to us (the parent decides when a worker stops) and says when it serves."""

    def __init__(self, config: uvicorn.Config, serving: Callable[[], None]) -> None:
        super().__init__(config)
        self._serving = serving

    def capture_signals(self) -> contextlib.nullcontext[None]:  # type: ignore[override]
        return contextlib.nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._serving()


async def serve(listener: socket.socket, control: socket.socket) -> None:
    """Serve until the parent says stop (SIGTERM) or is gone (the control socket ends)."""
    reader, writer = await protocol.streams(control)
    hello = protocol.to_worker(await reader.readline())
    assert isinstance(hello, protocol.Hello)
    settings = msgspec.convert(hello.settings, Settings)
    log.setup(settings.log.level, settings.log.format)
    states: dict[str, ServiceState] = {}
    server = _Server(
        uvicorn.Config(
            app.build(settings, BackendEnv(Path(hello.home), states)),
            loop="none",
            http=_protocol(settings),
            ws="none",
            proxy_headers=bool(settings.security.trusted_proxies),
            forwarded_allow_ips=settings.security.trusted_proxies,
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(settings.timeouts.drain_s),
        ),
        serving=lambda: writer.write(protocol.line(protocol.Serving())),
    )

    def stop() -> None:
        server.should_exit = True

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # a terminal's Ctrl-C reaches us too; the parent answers it
    listen = asyncio.create_task(_listen_to_parent(reader, states))
    _settle_garbage()
    try:
        await server.serve(sockets=[listener])
    finally:
        listen.cancel()
        writer.close()


def _settle_garbage() -> None:
    """What was imported stays: looking it through for garbage again and again costs 40 ms at a time and finds none.

    Requests make few cycles, so the collector may come less often (docs/performance.md has the effect)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


async def _listen_to_parent(reader: asyncio.StreamReader, states: dict[str, ServiceState]) -> None:
    while data := await reader.readline():
        message = protocol.to_worker(data)
        if isinstance(message, protocol.Services):
            states.clear()
            states.update(message.states)
    # The parent is gone, and with it the engine and whoever would replace us: serving on would only look alive.
    os._exit(1)


def main() -> None:
    """Entry point of the worker process; the descriptors are inherited."""
    listen_fd, control_fd = (int(argument) for argument in sys.argv[1:3])
    uvloop.run(serve(socket.socket(fileno=listen_fd), socket.socket(fileno=control_fd)))


if __name__ == "__main__":
    main()
