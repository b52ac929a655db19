"""The parent: it owns the listening socket, the signals, the services and the workers, and outlives none of them.

It serves no request itself. A worker that dies is replaced; a service that dies is restarted with back-off; when the parent dies, by
whatever signal, the ends of its pipes tell everybody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import msgspec

from gateway.config import Settings
from gateway.errors import ConfigError
from gateway.lifeline import Backoff
from gateway.plugin import Service, ServiceState
from gateway.processes import children, protocol

log = logging.getLogger("penstock.parent")

Observer = Callable[[str, ServiceState], None]
_STATE_LINE_LIMIT = 1 << 16


def listen(settings: Settings) -> socket.socket:
    """The public listening socket, shared by all workers; raises ConfigError when the address cannot be had."""
    host, port = settings.listen.host, settings.listen.port
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # A client that has left what it was sent unread (or unacknowledged) for so long is cut off by the kernel, in whatever phase it is:
        # for us it has left. Accepted sockets inherit this.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(settings.timeouts.client_s * 1000))
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        raise ConfigError("listen", f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    listener.setblocking(False)
    return listener


class Parent:
    """Runs workers and services until it is told to stop."""

    def __init__(self, settings: Settings, home: Path, services: list[Service], listener: socket.socket, observe: Observer) -> None:
        self._settings = settings
        self._home = home
        self._services = services
        self._listener = listener
        self._observe = observe
        self._states: dict[str, ServiceState] = {service.name: ServiceState() for service in services}
        self._workers: set[asyncio.StreamWriter] = set()
        self._stopping = asyncio.Event()
        self.serving = asyncio.Event()

    async def run(self) -> None:
        """Until SIGTERM or SIGINT: then the workers finish what they have begun, and the services end after them."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        workers = [asyncio.create_task(_keep(self._one_worker, _worker_ended)) for _ in range(self._settings.listen.workers)]
        services = [
            asyncio.create_task(_keep(partial(self._one_service, service), partial(self._service_ended, service.name)))
            for service in self._services
        ]
        await self._stopping.wait()
        log.info("stopping: open answers may take up to %g s", self._settings.timeouts.drain_s)
        await _cancel(workers)
        await _cancel(services)

    async def _one_worker(self) -> int:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await children.spawn(
                [sys.executable, "-m", "gateway.processes.worker", str(self._listener.fileno()), str(theirs.fileno())],
                os.environ,
                [self._listener.fileno(), theirs.fileno()],
            )
        reader, writer = await protocol.streams(ours)
        try:
            settings = msgspec.to_builtins(self._settings)
            writer.write(protocol.line(protocol.Hello(settings, str(self._home))))
            writer.write(protocol.line(protocol.Services(self._states)))
            self._workers.add(writer)
            while data := await reader.readline():
                protocol.to_parent(data)
                self.serving.set()
            return await process.wait()
        finally:
            self._workers.discard(writer)
            await asyncio.shield(children.end(process, self._settings.timeouts.drain_s + 5.0))
            writer.close()

    async def _one_service(self, service: Service) -> int:
        status, theirs = os.pipe()
        try:
            process = await children.spawn(service.argv, {**os.environ, **service.environment, "PENSTOCK_STATUS_FD": str(theirs)}, [theirs])
        finally:
            os.close(theirs)
        reader = asyncio.StreamReader(limit=_STATE_LINE_LIMIT)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(status, "rb", 0)
        )
        try:
            while data := await reader.readline():
                with contextlib.suppress(msgspec.DecodeError):
                    self._tell(service.name, msgspec.json.decode(data, type=ServiceState))
            return await process.wait()
        finally:
            await asyncio.shield(children.end(process, service.grace_s))
            transport.close()

    def _service_ended(self, name: str, how: str, delay_s: float) -> None:
        self._tell(name, ServiceState("restarting", f"its supervisor ended ({how})", eta_s=delay_s + 30.0))

    def _tell(self, name: str, state: ServiceState) -> None:
        self._states = {**self._states, name: state}
        news = protocol.line(protocol.Services(self._states))
        for writer in self._workers:
            writer.write(news)
        self._observe(name, state)


async def _keep(one_life: Callable[[], Awaitable[int]], ended: Callable[[str, float], None]) -> None:
    """Run a child again and again, with back-off; whatever ends one life, or keeps it from beginning, is not the end of the loop."""
    backoff = Backoff()
    while True:
        started = time.monotonic()
        try:
            how = _how(await one_life())
        except (OSError, ValueError, msgspec.MsgspecError) as error:  # no process to be had, or one that talks nonsense
            how = f"{type(error).__name__}: {error}"
        delay_s = backoff.next(time.monotonic() - started)
        ended(how, delay_s)
        await asyncio.sleep(delay_s)


def _worker_ended(how: str, delay_s: float) -> None:
    log.error("a worker ended (%s); the next one starts in %g s", how, delay_s)


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _how(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
