"""The whole gateway in one event loop with no sockets: bytes go in at the server's protocol and at the host's, in pieces of our choosing.

What it does is exactly repeatable, so that what it costs can be counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gateway import app, config
from gateway.lifecycle import Lifecycle
from gateway.plugin import BackendEnv
from gateway.processes import http

PIECES = Callable[[bytes], Sequence[bytes]]


class Pipe(asyncio.Transport):
    """A transport that keeps what is written, and tells who wants to know."""

    def __init__(self, heard: Callable[[bytes], None] | None = None) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.written = bytearray()
        self._heard = heard
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data
        if self._heard is not None:
            self._heard(bytes(data))

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        self._closing = True

    abort = close

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        pass


class Loop(asyncio.SelectorEventLoop):
    """A loop in which every connection leads to the scripted host: what it answers comes one piece a turn."""

    answer: PIECES = staticmethod(lambda request: ())

    async def create_connection(self, factory: Callable[[], Any], *args: Any, **more: Any) -> Any:  # type: ignore[override]
        protocol = factory()
        pipe = Pipe(lambda request: self._say(protocol, list(self.answer(request))))
        protocol.connection_made(pipe)
        return pipe, protocol

    def _say(self, protocol: asyncio.Protocol, pieces: list[bytes]) -> None:
        if pieces:
            self.call_soon(self._next, protocol, pieces)

    def _next(self, protocol: asyncio.Protocol, pieces: list[bytes]) -> None:
        protocol.data_received(pieces.pop(0))
        self._say(protocol, pieces)


class Gateway:
    """The worker's own server protocol in front of the app in front of one host."""

    def __init__(self, loop: Loop, overrides: Mapping[str, Any] | None = None) -> None:
        self.loop = loop
        asyncio.set_event_loop(loop)
        hosts = [{"url": "http://10.0.0.1:30000"}]
        one_host = {"models": {"deepseek-v3": {"backend": "dsv3"}}, "backends": {"dsv3": {"kind": "sglang_dsv3", "hosts": hosts}}}
        settings = config.load(environment={}, overrides=overrides or one_host).settings
        self.lifecycle = Lifecycle()
        self._app = app.build(settings, BackendEnv(Path("/nonexistent")), self.lifecycle)
        self.server = http.server(self._app, settings, self.lifecycle, lambda accepting: None, lifespan="off", proxy_headers=False)
        self.server.shared.loop = loop
        self.client = Pipe()
        self._connection = self.server.connection()
        self._connection.connection_made(self.client)

    def exchange(self, request: bytes, ending: bytes, observed: bool = True) -> bytes:
        """What the client gets for a request, up to `ending`. `observed`: it is in the metrics and in the log, too, before this returns."""
        self.client.written.clear()

        async def until() -> None:
            self._connection.data_received(request)
            while not self.client.written.endswith(ending) or self.lifecycle.open:
                await asyncio.sleep(0)
            if observed:
                self.observe()

        self.loop.run_until_complete(asyncio.wait_for(until(), 10))
        return bytes(self.client.written)

    def observe(self) -> None:
        """What a worker does a few milliseconds later, with many requests at a time."""
        self._app.observer.flush()

    def close(self) -> None:
        self._connection.connection_lost(None)
        pending = asyncio.all_tasks(self.loop)
        for task in pending:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        self.loop.close()
        asyncio.set_event_loop(None)
