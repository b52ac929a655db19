"""A worker: one event loop serving the socket that the parent opened. `python -m gateway.processes.worker LISTEN_FD CONTROL_FD`."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from gateway import app, lifeline
from gateway.access import ledger
from gateway.access.keys import KeyList
from gateway.access.limits.rules import StoreFailed
from gateway.config import Settings
from gateway.lifecycle import Lifecycle
from gateway.plugin import BackendEnv, ServiceState
from gateway.processes import http, protocol
from gateway.processes.http import tls
from gateway.sentinel.sample import Sample
from gateway.serving.hostview import HostView
from gateway.supervision import listen, once, supervise
from gateway.telemetry import listing, log, metrics

REPORT_INTERVAL_S = 1.0
# Bytes that the parent may leave unread before it is told no more by itself.
MAX_UNREAD = 1 << 20
# How long the parent may take to say what is in the ledger.
LEDGER_LIMIT_S = 5.0


class Worker:
    """The server and its line to the parent."""

    def __init__(
        self,
        settings: Settings,
        home: Path,
        used: ledger.Rows,
        stored_keys: KeyList,
        teams: Mapping[str, str],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._settings = settings
        self._reader, self._writer = reader, writer
        self._lifecycle = Lifecycle()
        self._states: dict[str, ServiceState] = {}
        self._host_states: dict[tuple[str, str], str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count(1)
        self._questions: dict[int, asyncio.Future[ledger.Rows]] = {}
        env = BackendEnv(home, self._states, settings.timeouts.connect_s)
        self._gateway = app.build(settings, env, self._lifecycle, used, stored_keys, self._spent, teams)
        self._metrics = self._gateway.observer.metrics
        self._gateway.judged(self._judge)
        self._server = http.server(
            self._gateway,
            settings,
            self._lifecycle,
            lambda accepting: self._tell(protocol.Serving(accepting)),
            self._metrics.failed,
            tls=tls.context(settings.listen.tls),
            lifespan="on",
            proxy_headers=bool(settings.security.trusted_proxies),
            forwarded_allow_ips=settings.security.trusted_proxies,
        )

    def _judge(self, sample: Sample) -> None:
        """Have an answer judged; where the parent does not keep up it is left out."""
        if self._writer.transport.get_write_buffer_size() < MAX_UNREAD:
            self._tell(sample)
        else:
            self._metrics.add(metrics.UNJUDGED, ("full",))

    def _tell(self, message: protocol.ToParent) -> None:
        self._writer.write(protocol.line(message))

    async def _spent(self, key: str, first: str, last: str) -> ledger.Rows:
        """What the parent knows of it; raises StoreFailed or TimeoutError."""
        number = next(self._numbers)
        answer: asyncio.Future[ledger.Rows] = asyncio.get_running_loop().create_future()
        self._questions[number] = answer
        self._tell(protocol.Spent(number, key, first, last))
        try:
            async with asyncio.timeout(LEDGER_LIMIT_S):
                return await answer
        finally:
            del self._questions[number]

    def _answered(self, message: protocol.Ledger) -> None:
        answer = self._questions.get(message.number)
        if answer is None or answer.done():  # nobody waits for it any more
            return
        if message.rows is None:
            answer.set_exception(StoreFailed("it does not answer"))
        else:
            answer.set_result(ledger.unpacked(message.rows))

    def _report(self, number: int = 0) -> None:
        waiting = self._gateway.waiting()
        self._gateway.observer.flush()
        lifecycle, used = self._lifecycle, ledger.packed(self._gateway.usage.take())
        hosts = self._gateway.hosts()
        self._look(hosts)
        counts, examples = self._metrics.snapshot(), self._metrics.exemplars
        self._tell(
            protocol.Report(
                number,
                len(lifecycle.open),
                lifecycle.oldest_s(),
                lifeline.resident_bytes(),
                waiting,
                counts,
                hosts,
                used,
                examples,
                self._gateway.calls(),
            )
        )

    def _look(self, hosts: list[HostView]) -> None:
        """What is counted by looking."""
        count = self._metrics
        for backend, waiting in self._gateway.queued().items():
            count.put(metrics.QUEUED, waiting, (backend,))
        for host in hosts:
            if self._host_states.get((host.backend, host.id), host.state) != host.state:
                count.add(metrics.HOST_CHANGES, (host.backend, host.id, host.state))
            self._host_states[host.backend, host.id] = host.state
        if self._settings.redis.url is not None:
            count.put(metrics.KEY_LIST_AGE, self._gateway.keys.age_s())
        count.put(metrics.FILES, len(os.listdir("/proc/self/fd")))

    def _start(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._start(once("end", work, self._metrics.failed))

    async def serve(self, listener: socket.socket) -> None:
        """Until the parent says so, by word or by SIGTERM, or is gone."""
        loop = asyncio.get_running_loop()
        at_once = protocol.Retire(ready=False, grace_s=0.0, linger_s=0.0, limit_s=self._settings.timeouts.drain_s)
        loop.add_signal_handler(signal.SIGTERM, lambda: self._begin(self._server.retire(at_once)))
        loop.add_signal_handler(signal.SIGINT, lambda: None)  # a terminal's Ctrl-C reaches us too; the parent answers it
        listen(self._metrics.failed)
        self._start(supervise("line to the parent", self._listen, self._metrics.failed))
        self._start(supervise("report", self._report_forever, self._metrics.failed))
        _settle_garbage()
        try:
            await self._server.serve(sockets=[listener])
        finally:
            self._report()
            await self._writer.drain()
            for task in self._tasks:
                task.cancel()
            self._writer.close()

    async def _report_forever(self) -> None:
        while True:
            due = time.monotonic() + REPORT_INTERVAL_S
            await asyncio.sleep(REPORT_INTERVAL_S)
            self._metrics.put(metrics.LOOP_LAG, max(0.0, time.monotonic() - due))
            # What a parent that stands still does not read must not gather here; what was counted is in the next one.
            if self._writer.transport.get_write_buffer_size() < MAX_UNREAD:
                self._report()

    async def _line(self) -> bytes:
        try:
            return await self._reader.readline()
        except OSError:  # the other end broke off in the middle
            return b""

    async def _listen(self) -> None:
        while data := await self._line():
            message = protocol.to_worker(data)
            if isinstance(message, protocol.Services):
                self._states.clear()
                self._states.update(message.states)
            elif isinstance(message, protocol.Ask):
                self._report(message.number)
            elif isinstance(message, protocol.Find):
                self._gateway.observer.flush()
                self._tell(protocol.Found(message.number, self._gateway.observer.ring.find(message.name)))
            elif isinstance(message, protocol.List):
                self._gateway.observer.flush()
                ended = self._gateway.observer.ring.records()
                self._tell(protocol.Listed(message.number, listing.rows(self._lifecycle.open, ended, message.sought)))
            elif isinstance(message, protocol.Ledger):
                self._answered(message)
            elif isinstance(message, protocol.Drain):
                self._gateway.drain(frozenset(message.targets))
            elif isinstance(message, protocol.Doubt):
                self._gateway.doubt(message.doubted)
            elif isinstance(message, protocol.Retire):
                self._begin(self._server.retire(message))
        # The parent is gone, and with it the engine and whoever would replace us: serving on would only look alive.
        os._exit(1)


def _settle_garbage() -> None:
    """What was imported stays: looking it through for garbage again and again costs 40 ms at a time and finds none.

    Requests make few cycles, so the collector may come less often (docs/performance.md has the effect)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


async def serve(listener: socket.socket, control: socket.socket) -> None:
    """Hear who we are, then serve."""
    reader, writer = await protocol.streams(control)
    hello = protocol.to_worker(await reader.readline())
    assert isinstance(hello, protocol.Hello)
    settings = msgspec.convert(hello.settings, Settings)
    log.setup(settings.log.level, settings.log.format)
    used = ledger.unpacked(hello.usage)
    await Worker(settings, Path(hello.home), used, hello.stored_keys, hello.teams, reader, writer).serve(listener)


def main() -> None:
    """Entry point of the worker process; the descriptors are inherited."""
    listen_fd, control_fd = (int(argument) for argument in sys.argv[1:3])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the lower, soft limit is for programs that use select()
    uvloop.run(serve(socket.socket(fileno=listen_fd), socket.socket(fileno=control_fd)))


if __name__ == "__main__":
    main()
