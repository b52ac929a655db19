"""The process tree as the operator sees it: what the admin API shows and changes, asked of every worker when somebody wants to know."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from gateway import lifeline
from gateway.access import keys, ledger
from gateway.access.callers import Known
from gateway.access.limits.rules import StoreFailed
from gateway.admin import secret
from gateway.admin.contract import GRAVITY, Reloaded, WorkerView
from gateway.config import Settings
from gateway.processes import protocol
from gateway.processes.alerts import Alerts
from gateway.processes.fleet import Worker
from gateway.processes.sentinel import Sentinel
from gateway.processes.tree import Tree
from gateway.serving import registry
from gateway.serving.hostview import HostView
from gateway.supervision import once
from gateway.telemetry import exposition, metrics
from gateway.telemetry.listing import OPEN, Row, Sought, ordered
from gateway.telemetry.metrics import Snapshot

if TYPE_CHECKING:
    from gateway.store.admin import AdminStore
    from gateway.store.callers import CallerStore

_log = logging.getLogger("penstock.parent")

# How long a worker may take to answer before what it reported last is shown.
REPORT_LIMIT_S = 1.0


class View:
    """Implements `admin.contract.Operated`, where each method is described."""

    def __init__(self, tree: Tree, home: Path, reload: Callable[[str], Awaitable[Reloaded]]) -> None:
        self._tree = tree
        self._home = home
        self._key_hash: str | None = None
        self._reload = reload
        self._numbers = itertools.count(1)
        self._stored: AdminStore | None = None
        self._answering: set[asyncio.Task[None]] = set()
        tree.asked = self._asked
        tree.callers.store = self._caller_store
        self.sentinel = Sentinel(lambda: self.settings, tree.counts.own, tree.doubt)
        tree.judge = self.sentinel.take
        self.alerts = Alerts(lambda: self.settings, tree.usage, tree.callers, self.stored_keys, tree.counts.own)

    @property
    def settings(self) -> Settings:
        """Those in force."""
        return self._tree.plan.settings

    def made_key_hash(self) -> str | None:
        """See `Operated`. Made when it is needed, which a reload may change; an attempt that failed is made again at the next request."""
        if self._key_hash is None:
            try:
                self._key_hash = keys.hashed(secret.make(self._home))
            except (OSError, ValueError) as error:
                _log.error("no admin key can be kept, so nobody can use the admin API: %s; mend it, or set admin.key_hash", error)
        return self._key_hash

    async def aclose(self) -> None:
        """Tell nobody any more, and close the connection to Redis."""
        await self.alerts.aclose()
        await self.sentinel.aclose()
        if self._stored is not None:
            await self._stored.aclose()

    async def reload(self, why: str) -> Reloaded:
        """See `Operated`. A key that was made is looked up again too: it may have been deleted to have another one made."""
        self._key_hash = None
        return await self._reload(why)

    async def look(self) -> tuple[Sequence[WorkerView], Snapshot]:
        """See `Operated`. A worker that does not answer in time is shown as it was."""
        question = protocol.Ask(next(self._numbers))
        answers = [worker.ask(question) for worker in self._tree.workers if worker.serving or worker.retiring]
        if answers:
            await asyncio.wait(answers, timeout=REPORT_LIMIT_S)
        for answer in answers:
            answer.cancel()
        workers = self._tree.workers
        views = [_view(worker) for worker in workers]
        return views, self._snapshot(views, [worker.report.counts for worker in workers if worker.report is not None])

    def _snapshot(self, views: Sequence[WorkerView], living: list[Snapshot]) -> Snapshot:
        counts = self._tree.counts.total(living)
        counts[metrics.OPEN.name] = {"": [float(sum(view.open for view in views))]}
        counts[metrics.BUDGET_USED.name] = self.alerts.shares
        counts[metrics.DOUBTED.name] = self.sentinel.gauges()
        counts[metrics.WORKERS.name] = {}
        for view in views:
            counts[metrics.WORKERS.name].setdefault(str(view.generation), [0.0])[0] += view.state != "starting"
        workers = float(sum(view.resident_bytes for view in views))
        counts[metrics.MEMORY.name] = {
            "parent": [float(lifeline.resident_bytes())],
            "workers": [workers],
            "sentinel": [float(self.sentinel.resident_bytes)],
        }
        counts.update(exposition.of_hosts((row.backend, row.id, row.state, row.in_flight, row.stats, row.role) for row in self.reported()))
        return counts

    def exemplars(self) -> metrics.Exemplars:
        """See `Operated`."""
        return exposition.latest(worker.report.exemplars for worker in self._tree.workers if worker.report is not None)

    async def hosts(self) -> Sequence[HostView]:
        """See `Operated`. What several workers know of a host is added up; of their states the gravest is shown."""
        await self.look()
        return self.reported()

    def reported(self) -> list[HostView]:
        """The same as the workers have last reported it."""
        found: dict[tuple[str, str], HostView] = {}
        for worker in self._tree.fleets[-1].workers:
            for row in worker.report.hosts if worker.report is not None else ():
                before = found.get((row.backend, row.id))
                if before is not None:
                    capacity = None if row.capacity is None or before.capacity is None else row.capacity + before.capacity
                    graver = max(before, row, key=lambda view: GRAVITY.index(view.state))
                    row = msgspec.structs.replace(
                        graver,
                        in_flight=before.in_flight + row.in_flight,
                        capacity=capacity,
                        moved=before.moved + row.moved,
                        broke=before.broke + row.broke,
                    )
                found[row.backend, row.id] = row
        return list(found.values())

    async def drain(self, target: str, drained: bool) -> bool:
        """See `Operated`."""
        if target not in {row.id for row in await self.hosts()}:
            return False
        self._tree.drain(target, drained)
        word = "drained by the operator" if drained else "back by the operator's word"
        _log.info("host %s is %s", target, word, extra={"fields": {"host": target}})
        return True

    def effective(self) -> list[dict[str, Any]]:
        """See `Operated`."""
        return registry.rows(self._tree.plan.loaded)

    def judged(self) -> dict[str, Any]:
        """See `Operated`."""
        return self.sentinel.shown()

    async def find(self, name: str) -> dict[str, Any] | None:
        """See `Operated`. What its answer broke is known here."""
        found = await self._find(name)
        broken = self.sentinel.of(found["id"]) if found is not None else {}
        return {**found, "bad_output": broken} if found is not None and broken else found

    async def _find(self, name: str) -> dict[str, Any] | None:
        question = protocol.Find(next(self._numbers), name)
        waiting = {worker.ask(question) for worker in self._tree.workers if worker.serving or worker.retiring}
        known: list[dict[str, Any]] = []
        deadline = time.monotonic() + REPORT_LIMIT_S
        try:
            while waiting and (left_s := deadline - time.monotonic()) > 0:
                done, waiting = await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                for answer in done:
                    found = None if answer.cancelled() else answer.result()
                    if isinstance(found, protocol.Found) and found.record is not None:
                        known.append(found.record)
                        if found.record["id"] == name:  # there is no other of our own id
                            return found.record
        finally:
            for answer in waiting:
                answer.cancel()
        if known:  # several workers may have answered requests of one client's id
            newest = max(known, key=lambda record: record["at"])
            also = [other["id"] for other in known if other is not newest]
            return {**newest, "also": [*newest.get("also", ()), *also]} if also else newest
        stored = self.stored_keys()
        return await stored.request(name) if stored is not None else None  # of another gateway, or of a worker that has ended

    async def requests(self, sought: Sought) -> list[Row]:
        """See `Operated`. Of one that has ended at this gateway its own worker's word is taken, else that of the store."""
        question = protocol.List(next(self._numbers), sought)
        answers = [worker.ask(question) for worker in self._tree.workers if worker.serving or worker.retiring]
        done: set[asyncio.Future[protocol.Answer]] = set()
        if answers:
            done, _ = await asyncio.wait(answers, timeout=REPORT_LIMIT_S)
        for answer in answers:
            answer.cancel()
        told = [answer.result() for answer in done if not answer.cancelled()]
        found = [row for listed in told if isinstance(listed, protocol.Listed) for row in listed.rows]
        stored = self.stored_keys()
        if stored is not None and sought.state != OPEN and not sought.here:
            known = {row.id for row in found}
            with contextlib.suppress(StoreFailed):  # what is known here is worth showing all the same
                found += [row for row in await stored.requests(sought) if row.id not in known]
        return ordered(found, sought)

    def stored_keys(self) -> AdminStore | None:
        """See `Operated`."""
        if self._stored is None and self.settings.redis.url is not None:
            from gateway.store.admin import AdminStore  # 0.1 s that only a gateway with Redis has to spend, once

            self._stored = AdminStore(self.settings, self._tree.counts.own)
            self._tree.stored_keys = self._stored.known
        return self._stored

    def _caller_store(self) -> CallerStore | None:
        stored = self.stored_keys()
        return stored.callers if stored is not None else None

    async def callers(self) -> Known:
        """See `Operated`."""
        await self.look()  # so that who has just called is in it
        return await self._tree.callers.known()

    def _asked(self, worker: Worker, question: protocol.Spent) -> None:
        task = once("ledger of a key", self._answer(worker, question), self._tree.counts.own.failed)
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer(self, worker: Worker, question: protocol.Spent) -> None:
        """Tell a worker what is in the ledger of one key."""
        key, first, last = question.key, question.first, question.last
        rows: dict[str, dict[str, int]] | None = None
        with contextlib.suppress(StoreFailed):
            if (stored := self.stored_keys()) is not None:
                found = await stored.usage_of(key, list(self.settings.models), first, last)
            else:
                await self.look()  # so that what has just ended is in it
                found = {place: row for place, row in self._tree.usage.rows.items() if place[1] == key and first <= place[0] <= last}
            rows = ledger.packed(found)
        worker.send(protocol.Ledger(question.number, rows))

    async def usage(self, first: str, last: str) -> ledger.Rows:
        """See `Operated`."""
        await self.look()  # so that what has just ended is in it
        stored = self.stored_keys()
        if stored is not None:
            return await stored.usage(first, last)
        return {place: found for place, found in self._tree.usage.rows.items() if first <= place[0] <= last}


def _view(worker: Worker) -> WorkerView:
    state = "retiring" if worker.retiring else "serving" if worker.serving else "starting"
    report = worker.report or protocol.Report(0, 0, 0.0, 0, "", {}, [])
    up_s = time.monotonic() - worker.started_at
    return WorkerView(
        worker.process.pid, worker.generation, state, up_s, report.open, report.oldest_s, report.resident_bytes, report.waiting
    )
