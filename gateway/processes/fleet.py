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
from gateway.processes.callers import Callers
from gateway.processes.usage import Usage
from gateway.sentinel.sample import Sample
from gateway.supervision import supervise
from gateway.telemetry import exposition, metrics
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
        """The last counts of a worker that has ended."""
        self._past = exposition.merge([self._past, {name: series for name, series in counts.items() if name in _COUNTED}])

    def total(self, living: list[Snapshot]) -> Snapshot:
        """Everybody's, the dead included."""
        return exposition.merge([self._past, self.own.snapshot(), *living])


class Worker:
    """One worker as the parent knows it. `serving`: it accepts connections; `retiring`: it was sent an order to end."""

    def __init__(self, process: asyncio.subprocess.Process, writer: asyncio.StreamWriter, generation: int) -> None:
        self.process = process
        self.generation = generation
        self.started_at = time.monotonic()
        self.serving = False
        self.retiring = False
        self.report: protocol.Report | None = None
        self._writer = writer
        self._questions: dict[int, asyncio.Future[protocol.Answer]] = {}

    def send(self, message: protocol.ToWorker) -> None:
        """Send it a line; one that is dead does not hear it."""
        with contextlib.suppress(OSError):
            self._writer.write(protocol.line(message))

    def ask(self, question: protocol.Question) -> asyncio.Future[protocol.Answer]:
        """The answer to come; cancelled when the worker ends without one. Whoever waits no more cancels it."""
        answer: asyncio.Future[protocol.Answer] = asyncio.get_running_loop().create_future()
        self._questions[question.number] = answer
        answer.add_done_callback(lambda _: self._questions.pop(question.number, None))
        self.send(question)
        return answer

    def answered(self, message: protocol.Answer) -> None:
        """It has said something that somebody may wait for."""
        answer = self._questions.get(message.number)
        if answer is not None and not answer.done():
            answer.set_result(message)

    def close(self) -> None:
        """It has ended: nobody waits for its answers any more."""
        for answer in list(self._questions.values()):
            answer.cancel()
        self._writer.close()


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
        callers: Callers,
        stored_keys: Callable[[], KeyList],
        asked: Callable[[Worker, protocol.Spent], None],
    ) -> None:
        self.generation = generation
        self.settings = settings
        self._home = home
        self._listener = listener
        self._states = states
        self._counts = counts
        self._usage = usage
        self._callers = callers
        self._drained: list[str] = []
        self._doubt = protocol.Doubt({})
        # Who judges answers.
        self.judge: Callable[[Sample], None] = lambda sample: None
        self._stored_keys = stored_keys
        self._asked = asked
        self.workers: set[Worker] = set()
        # Whether every worker has been accepting connections at the same time, and whether none does now.
        self._all_serve = asyncio.Event()
        self._none_serves = asyncio.Event()
        self._none_serves.set()
        self._stop = asyncio.Event()
        self._order: protocol.Retire | None = None
        self._keepers: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start every worker; whoever ends is replaced, with back-off."""
        keep = partial(children.keep, self._one_life, partial(_ended, self._counts), self._stop)
        self._keepers = [supervise("worker", keep, self._counts.own.failed) for _ in range(self.settings.listen.workers)]

    @property
    def retired(self) -> bool:
        """Whether it was ordered to end."""
        return self._order is not None

    async def serving(self) -> None:
        """Wait until every worker accepts connections."""
        await self._all_serve.wait()

    async def closed(self, limit_s: float) -> None:
        """Wait until no worker accepts connections any more, at most so long."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._none_serves.wait(), limit_s)

    def send(self, message: protocol.ToWorker) -> None:
        """Send a line to every worker."""
        for worker in self.workers:
            worker.send(message)

    def services(self, states: Mapping[str, ServiceState]) -> None:
        """Every worker learns how the services are now; those to come as well."""
        self._states = states
        self.send(protocol.Services(dict(states)))

    def drain(self, targets: list[str]) -> None:
        """Every worker learns which targets get no new requests; those to come as well."""
        self._drained = targets
        self.send(protocol.Drain(targets))

    def doubt(self, doubted: dict[str, dict[str, str]]) -> None:
        """Every worker learns whose answers are under alert; those to come as well."""
        self._doubt = protocol.Doubt(doubted)
        self.send(self._doubt)

    async def retire(self, order: protocol.Retire) -> None:
        """Have every worker end; returns when they have. May be called again with less patience."""
        self._order = order
        self._stop.set()
        for worker in self.workers:
            self._dismiss(worker, order)
        if self._keepers:
            await asyncio.wait(self._keepers, timeout=order.grace_s + order.limit_s + _PATIENCE_S)
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    def _dismiss(self, worker: Worker, order: protocol.Retire) -> None:
        worker.retiring = True
        worker.send(order)

    async def _one_life(self) -> int:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await children.spawn(
                # -P: the code that we run, and not what the current folder may hold under its names.
                [sys.executable, "-P", "-m", "gateway.processes.worker", str(self._listener.fileno()), str(theirs.fileno())],
                os.environ,
                [self._listener.fileno(), theirs.fileno()],
            )
        reader, writer = await protocol.streams(ours)
        worker = Worker(process, writer, self.generation)
        try:
            used, teams = self._usage.recent(), self._callers.teams()
            worker.send(protocol.Hello(msgspec.to_builtins(self.settings), str(self._home), used, self._stored_keys(), teams))
            worker.send(protocol.Services(dict(self._states)))
            worker.send(protocol.Drain(self._drained))
            worker.send(self._doubt)
            self.workers.add(worker)
            if self._order is not None:  # which came while this one was being started
                self._dismiss(worker, self._order)
            while data := await reader.readline():
                self._heard(worker, protocol.to_parent(data))
            return await process.wait()
        finally:
            self.workers.discard(worker)
            self._count_serving()
            worker.close()
            if worker.report is not None:
                self._counts.keep(worker.report.counts)
            await asyncio.shield(children.end(process, 0.0 if worker.retiring else _PATIENCE_S))

    def _heard(self, worker: Worker, message: protocol.ToParent) -> None:
        if isinstance(message, protocol.Serving):
            worker.serving = message.accepting
            self._count_serving()
            return
        if isinstance(message, Sample):
            self.judge(message)
            return
        if isinstance(message, protocol.Spent):
            self._asked(worker, message)
            return
        if isinstance(message, protocol.Report):
            worker.report = message
            self._usage.take(message.usage)
            self._callers.take(message.calls)
        worker.answered(message)

    def _count_serving(self) -> None:
        count = sum(worker.serving for worker in self.workers)
        if count >= self.settings.listen.workers:
            self._all_serve.set()
        (self._none_serves.clear if count else self._none_serves.set)()


def _ended(counts: Counts, how: str, delay_s: float) -> None:
    counts.own.add(metrics.WORKER_ENDS)
    log.error("a worker ended (%s); the next one starts in %g s", how, delay_s)
