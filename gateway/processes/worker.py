"""A worker: one event loop serving the socket that the parent opened. `python -m gateway.processes.worker LISTEN_FD CONTROL_FD`."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

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


class _Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, whose one answer of its own (to what is no HTTP) comes in OpenAI's shape too, with a request id."""

    def send_400_response(self, msg: str) -> None:
        request_id = context.new_request_id()
        status, headers, content = errors.render(errors.InvalidRequest(msg, code="invalid_http"), request_id)
        lines = [b"HTTP/1.1 %d Bad Request" % status, *(name + b": " + value for name, value in headers)]
        lines += [b"x-request-id: " + request_id.encode(), b"connection: close", b"", content]
        self.transport.write(b"\r\n".join(lines))
        self.transport.close()


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
            http=_Protocol,
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
    try:
        await server.serve(sockets=[listener])
    finally:
        listen.cancel()
        writer.close()


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
