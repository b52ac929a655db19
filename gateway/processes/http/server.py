"""uvicorn's server with connections of our own, and an end in which nobody is cut off who could have been answered."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import ssl
import sys
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE

from gateway.config import Settings
from gateway.lifecycle import Lifecycle
from gateway.processes.http.bounds import LINGER_S, SPARE_DESCRIPTORS
from gateway.processes.http.connection import Connection
from gateway.processes.http.shared import Shared
from gateway.processes.protocol import Retire
from gateway.supervision import Failed, uncounted
from gateway.wire.asgi import App

log = logging.getLogger("penstock.worker")

BACKLOG = 2048
# An answer that is ended gets so long to tell its client.
LAST_WORDS_S = 1.0
# While there are too many connections those that were unused for so long are closed.
SHED_AFTER_S = 0.5
# The server looks at its connections once in so many of its turns of 0.1 s.
_TURNS = 5


class Server(uvicorn.Server):
    """uvicorn that leaves signals to the parent, says when it serves, and ends as it is told to."""

    def __init__(
        self,
        config: uvicorn.Config,
        settings: Settings,
        life: Lifecycle,
        serving: Callable[[bool], None],
        failed: Failed,
        tls: ssl.SSLContext | None,
    ) -> None:
        super().__init__(config)
        self._life = life
        self._serving = serving
        self._failed = failed
        self._tls = tls
        self._head_s = settings.timeouts.head_s
        self._order: Retire | None = None
        config.load()
        self.shared = Shared(config.loaded_app, life, self._head_s, _most())

    def capture_signals(self) -> contextlib.nullcontext[None]:  # type: ignore[override]
        """The parent decides when a worker stops."""
        return contextlib.nullcontext()

    def connection(self) -> Connection:
        """For a client that has just come."""
        return Connection(self.shared)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the application, accept connections, and say so."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILURE)
        loop = self.shared.loop = asyncio.get_running_loop()
        self.shared.tick()
        more: dict[str, Any] = {}
        if self._tls is not None:
            more = {"ssl": self._tls, "ssl_handshake_timeout": self._head_s, "ssl_shutdown_timeout": LINGER_S}
        self.servers = [
            await loop.create_server(self.connection, sock=listener, backlog=BACKLOG, **more)  # type: ignore[arg-type]
            for listener in sockets or ()
        ]
        self.started = True
        self._serving(True)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second; whether to exit."""
        if counter % _TURNS == 0:
            try:
                self._look()
            except Exception:  # whatever it is, it is no reason to cut everybody off
                self._failed("connections")
                log.exception("the task 'connections' has failed")
        return self.should_exit

    def _look(self) -> None:
        """One clock for everybody, instead of a timer a request."""
        self.shared.tick()
        now = self.shared.loop.time()
        connections = list(self.shared.connections)
        for connection in connections:
            connection.look(now)
        if len(connections) > self.shared.most:  # those that nobody uses make room, the longest unused first
            idle = sorted(connections, key=lambda connection: connection.idle_s(now, heads=False))
            for connection in idle[self.shared.most * 3 // 4 :]:
                if connection.idle_s(now, heads=False) >= SHED_AFTER_S:
                    connection.close()

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
        while self.shared.connections or self.shared.tasks:
            order = self._order or Retire(False, 0.0, 0.0, 0.0)
            if time.monotonic() - began >= order.limit_s:
                break
            self._look()
            now = self.shared.loop.time()
            for connection in list(self.shared.connections):
                if connection.idle_s(now) >= order.linger_s:
                    connection.close()
            await asyncio.sleep(0.05)
        await self._end_the_rest()
        await self.lifespan.shutdown()

    async def _end_the_rest(self) -> None:
        tasks = set(self.shared.tasks)
        if tasks:
            log.warning("%d open answers are ended; the oldest has run for %.1f s", len(self._life.open), self._life.oldest_s())
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=LAST_WORDS_S)
        for connection in list(self.shared.connections):
            connection.close()
        await asyncio.sleep(0)


def _most() -> int:
    """How many connections can be served at once: each may need a descriptor of its own and one towards an engine, and a quarter as many
    clients are told that there are too many."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return 1 << 20
    return max(8, (limit - SPARE_DESCRIPTORS) * 4 // 9)


def server(
    app: App,
    settings: Settings,
    life: Lifecycle,
    serving: Callable[[bool], None],
    failed: Failed = uncounted,
    tls: ssl.SSLContext | None = None,
    **more: Any,
) -> Server:
    """A server of `app`, to be run with `serve(sockets=[...])`; `serving` is told when it accepts connections and when no more, `failed`
    what has failed in the background."""
    config = uvicorn.Config(app, loop="none", http=Connection, ws="none", log_config=None, **more)  # type: ignore[arg-type]
    return Server(config, settings, life, serving, failed, tls)
