"""The workers of one generation of settings: started together, replaced when they die, retired together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import msgspec

from gateway.access.keys import KeyList
from gateway.config import Settings
from gateway.plugin import ServiceState
from gateway.processes import children, protocol
from gateway.processes.usage import Usage
from gateway.telemetry import metrics
from gateway.telemetry.metrics import Metrics, Snapshot

log = logging.getLogger("penstock.parent")

# Beyond what a worker was allowed, before it is killed.
_PATIENCE_S = 5.0


_COUNTED = frozenset(family.name for family in metrics.FAMILIES if family.kind != "gauge")


class Counts:
    """Counts that outlive the workers who made them: what was counted does not go back because somebody died."""

    def __init__(self) -> None:
        self.own = Metrics()
        self._past: Snapshot = {}

    def keep(self, counts: Snapshot) -> None:
        """The last word of a worker that has ended."""
        self._past = metrics.merge([self._past, {name: series for name, series in counts.items() if name in _COUNTED}])

    def total(self, living: list[Snapshot]) -> Snapshot:
        """Everybody's, the dead included."""
        return metrics.merge([self._past, self.own.snapshot(), *living])


class Worker:
    """One worker as the parent knows it."""

    def __init__(self, process: asyncio.subprocess.Process, writer: asyncio.StreamWriter, generation: int) -> None:
        self.process = process
        self.writer = writer
        self.generation = generation
        self.started_at = time.monotonic()
        self.serving = False
        self.retiring = False
        self.report: protocol.Report | None = None
        self.found: protocol.Found | None = None

    def tell(self, message: protocol.ToWorker) -> None:
        """Send it a line; one that is dead does not hear it."""
        with contextlib.suppress(OSError):
            self.writer.write(protocol.line(message))


class Fleet:
    """`settings.listen.workers` workers on one listening socket."""

    def __init__(
        self,
        generation: int,
        settings: Settings,
        home: Path,
        listener: socket.socket,
        states: Mapping[str, ServiceState],
        counts: Counts,
        usage: Usage,
        stored_keys: Callable[[], KeyList],
    ) -> None:
        self.generation = generation
        self.settings = settings
        self._home = home
        self._listener = listener
        self._states = states
        self._counts = counts
        self._usage = usage
        self._stored_keys = stored_keys
        self.drained: list[str] = []
        self.workers: set[Worker] = set()
        self._serving = asyncio.Event()
        self._retiring = False
        self._keepers: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start every worker; whoever ends is replaced, with back-off."""
        ended = partial(_ended, self._counts)
        self._keepers = [
            asyncio.create_task(children.keep(self._one_life, ended, lambda: not self._retiring))
            for _ in range(self.settings.listen.workers)
        ]

    @property
    def retired(self) -> bool:
        """Whether it has been told to end."""
        return self._retiring

    async def serving(self) -> None:
        """Wait until every worker accepts connections."""
        await self._serving.wait()

    async def closed(self, limit_s: float) -> None:
        """Wait until no worker accepts connections any more, at most so long."""
        deadline = time.monotonic() + limit_s
        while any(worker.serving for worker in self.workers) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    def tell(self, message: protocol.ToWorker) -> None:
        """Send a line to every worker."""
        for worker in self.workers:
            worker.tell(message)

    def services(self, states: Mapping[str, ServiceState]) -> None:
        """Tell how the services are now, also to workers to come."""
        self._states = states
        self.tell(protocol.Services(dict(states)))

    def drain(self, targets: list[str]) -> None:
        """Tell which targets get no new requests, also to workers to come."""
        self.drained = targets
        self.tell(protocol.Drain(targets))

    async def retire(self, order: protocol.Retire) -> None:
        """Have every worker end; returns when they have. May be called again with less patience."""
        self._retiring = True
        for worker in self.workers:
            worker.retiring = True
            worker.tell(order)
        deadline = time.monotonic() + order.grace_s + order.limit_s + _PATIENCE_S
        while self.workers and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    async def _one_life(self) -> int:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await children.spawn(
                [sys.executable, "-m", "gateway.processes.worker", str(self._listener.fileno()), str(theirs.fileno())],
                os.environ,
                [self._listener.fileno(), theirs.fileno()],
            )
        reader, writer = await protocol.streams(ours)
        worker = Worker(process, writer, self.generation)
        try:
            worker.tell(protocol.Hello(msgspec.to_builtins(self.settings), str(self._home), self._usage.recent(), self._stored_keys()))
            worker.tell(protocol.Services(dict(self._states)))
            worker.tell(protocol.Drain(self.drained))
            self.workers.add(worker)
            while data := await reader.readline():
                message = protocol.to_parent(data)
                if isinstance(message, protocol.Report):
                    worker.report = message
                    self._usage.take(message.usage)
                elif isinstance(message, protocol.Found):
                    worker.found = message
                else:
                    worker.serving = message.accepting
                    if sum(found.serving for found in self.workers) >= self.settings.listen.workers:
                        self._serving.set()
            return await process.wait()
        finally:
            self.workers.discard(worker)
            if worker.report is not None:
                self._counts.keep(worker.report.counts)
            await asyncio.shield(children.end(process, 0.0 if worker.retiring else _PATIENCE_S))
            writer.close()


def _ended(counts: Counts, how: str, delay_s: float) -> None:
    counts.own.add(metrics.WORKER_ENDS)
    log.error("a worker ended (%s); the next one starts in %g s", how, delay_s)
