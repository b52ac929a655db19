"""The parent: it owns the listening sockets, the signals, the services, the workers and the operator's door, and outlives none of them.

It serves no client. A worker that dies is replaced; a service that dies is restarted; when the parent dies, by whatever signal, the ends of
its pipes tell everybody else. A reload is a second generation of workers on the same socket, and the end of the first.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from gateway import lifeline
from gateway.access import ledger
from gateway.access.keys import KeyList
from gateway.admin import door as admin
from gateway.admin.door import Reloaded, WorkerView
from gateway.config import Loaded, Settings, admin_address
from gateway.errors import ConfigError
from gateway.life import Life
from gateway.plugin import Service, ServiceState
from gateway.processes import protocol
from gateway.processes.fleet import Counts, Fleet
from gateway.processes.services import Observer, Services
from gateway.processes.usage import Usage
from gateway.serving import registry
from gateway.serving.pool import HostView
from gateway.telemetry import log, metrics
from gateway.telemetry.metrics import Snapshot

if TYPE_CHECKING:
    from gateway.processes import http
    from gateway.store.admin import AdminStore

_log = logging.getLogger("penstock.parent")

# A worker imports and opens for half a second; one that takes longer than this will not come.
START_LIMIT_S = 30.0
# A worker that is told to end closes its listener within this time, or is too busy to matter.
CLOSE_LIMIT_S = 2.0
# How long the operator's door waits for a worker's numbers before it shows the last known ones.
REPORT_LIMIT_S = 1.0
# Connections to a generation that is replaced are closed after this silence: clients of the OpenAI SDKs close theirs after 5 s.
LINGER_S = 6.0


class Plan(msgspec.Struct, frozen=True):
    """A configuration that can be served: checked, and with what it wants run."""

    loaded: Loaded
    services: Sequence[Service]

    @property
    def settings(self) -> Settings:
        """The settings alone."""
        return self.loaded.settings


def listen(host: str, port: int, where: str, client_s: float | None = None) -> socket.socket:
    """A listening socket; raises ConfigError naming the setting `where` when the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if client_s is not None:
            # A client that has left what it was sent unread (or unacknowledged) for so long is cut off by the kernel, in whatever phase it
            # is: for us it has left. Accepted sockets inherit this.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(client_s * 1000))
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        raise ConfigError(where, f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    listener.setblocking(False)
    return listener


class Parent:
    """Runs workers and services until it is told to stop."""

    def __init__(
        self,
        plan: Plan,
        home: Path,
        listener: socket.socket,
        door: socket.socket | None,
        load: Callable[[], Awaitable[Plan]],
        observe: Observer,
    ) -> None:
        self._plan = plan
        self._home = home
        self._listener = listener
        self._door = door
        self._load = load
        self._observe = observe
        self._counts = Counts()
        self._usage = Usage(home, plan.settings.limits)
        self._admin_store: AdminStore | None = None
        self._services = Services(self._told)
        self._fleets: list[Fleet] = []
        self._reloading = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._grace_s = 0.0
        self._asked = 0
        self._drained: set[str] = set()
        self.serving = asyncio.Event()

    @property
    def settings(self) -> Settings:
        """Those in force."""
        return self._plan.settings

    async def run(self) -> None:
        """Until SIGTERM or SIGINT; a second one is impatient. SIGHUP reloads."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, lambda: self._stop(self.settings.timeouts.grace_s))
        loop.add_signal_handler(signal.SIGINT, lambda: self._stop(0.0))  # who presses Ctrl-C has no load balancer to wait for
        loop.add_signal_handler(signal.SIGHUP, lambda: self._background(self.reload("SIGHUP")))
        if self.settings.redis.url is None:
            self._usage.read()
        self._background(self._usage.write_forever())
        await self._services.change(self._plan.services)
        fleet = Fleet(1, self.settings, self._home, self._listener, self._services.states, self._counts, self._usage, self._known_keys)
        self._fleets.append(fleet)
        fleet.start()
        self._background(self._announce(fleet))
        door = self._open_door()
        if (store := self._shared_store()) is not None:
            store.open()
        await self._stopping.wait()
        await self._end()
        await self._services.aclose()
        if door is not None:
            await door.retire(protocol.Retire(ready=False, grace_s=0.0, linger_s=0.0, limit_s=0.5))
            await self._door_served
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._usage.write()
        if self._admin_store is not None:
            await self._admin_store.aclose()

    def _background(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _announce(self, fleet: Fleet) -> None:
        await fleet.serving()
        lifeline.tell_manager("READY=1")
        self.serving.set()

    def _open_door(self) -> http.Server | None:
        if self._door is None:
            return None
        from gateway.processes import http  # 0.1 s, during which the workers start already

        server = http.server(
            admin.build(self), self.settings, Life(self.settings), lambda accepting: None, lifespan="off", proxy_headers=False
        )
        self._door_served = asyncio.create_task(server.serve(sockets=[self._door]))
        return server

    # Stopping

    def _stop(self, grace_s: float) -> None:
        if self._stopping.is_set():
            self._hurry.set()
        self._grace_s = grace_s
        self._stopping.set()

    async def _end(self) -> None:
        """Say that we go, serve on for the grace, let answers finish, end the rest."""
        lifeline.tell_manager("STOPPING=1")
        timeouts = self.settings.timeouts
        _log.info("stopping: serving on for %g s, then open answers may take up to %g s", self._grace_s, timeouts.drain_s)
        asyncio.get_running_loop().call_later(self._grace_s, self._listener.close)
        order = protocol.Retire(ready=False, grace_s=self._grace_s, linger_s=0.0, limit_s=timeouts.drain_s)
        ends = asyncio.create_task(self._retire(order))
        hurry = asyncio.create_task(self._hurry.wait())
        waits: list[asyncio.Task[Any]] = [ends, hurry]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not ends.done():
            _log.warning("stopping at once")
            self._listener.close()
            await self._retire(protocol.Retire(ready=False, grace_s=0.0, linger_s=0.0, limit_s=0.0))
        await ends

    async def _retire(self, order: protocol.Retire) -> None:
        await asyncio.gather(*(fleet.retire(order) for fleet in self._fleets))

    # Reloading

    async def reload(self, why: str) -> Reloaded:
        """See `admin.Operated`."""
        async with self._reloading:
            generation = self._fleets[-1].generation
            if self._stopping.is_set():
                return Reloaded(False, generation, "the gateway is stopping")
            lifeline.tell_manager(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                plan = await self._load()
                _refuse_moves(self.settings, plan.settings)
                await self._roll(plan, generation + 1)
            except ConfigError as error:
                self._counts.own.add(metrics.RELOADS, ("refused",))
                _log.error("reload (%s) refused, nothing has changed: %s", why, error)
                return Reloaded(False, generation, str(error))
            finally:
                lifeline.tell_manager("READY=1")
            self._counts.own.add(metrics.RELOADS, ("ok",))
            _log.info("reload (%s): generation %d serves", why, generation + 1)
            return Reloaded(True, generation + 1)

    async def _roll(self, plan: Plan, generation: int) -> None:
        """New workers beside the old ones; when all of them serve the old ones end. Raises ConfigError when they do not come."""
        if self._stopping.is_set():
            raise ConfigError("", "the gateway is stopping")
        await self._services.change(plan.services)
        fleet = Fleet(
            generation, plan.settings, self._home, self._listener, self._services.states, self._counts, self._usage, self._known_keys
        )
        fleet.drain(sorted(self._drained))
        self._fleets.append(fleet)
        fleet.start()
        try:
            async with asyncio.timeout(START_LIMIT_S):
                await fleet.serving()
        except TimeoutError:
            self._fleets.remove(fleet)
            await fleet.retire(protocol.Retire(ready=True, grace_s=0.0, linger_s=0.0, limit_s=0.0))
            await self._services.change(self._plan.services)
            raise ConfigError("", f"the new workers do not serve after {START_LIMIT_S:g} s; the log says why") from None
        self._plan = plan
        log.setup(plan.settings.log.level, plan.settings.log.format)
        for old in self._fleets[:-1]:
            if not old.retired:
                self._background(self._replace(old))
                await old.closed(CLOSE_LIMIT_S)  # from here on every new connection meets the new settings

    async def _replace(self, old: Fleet) -> None:
        await old.retire(protocol.Retire(ready=True, grace_s=0.0, linger_s=LINGER_S, limit_s=max(old.settings.timeouts.drain_s, LINGER_S)))
        if old in self._fleets:
            self._fleets.remove(old)

    # Looking

    def _told(self, name: str, state: ServiceState) -> None:
        for fleet in self._fleets:
            fleet.services(self._services.states)
        self._observe(name, state)

    async def look(self) -> tuple[Sequence[WorkerView], Snapshot]:
        """See `admin.Operated`. A worker that does not answer in time is shown as it was."""
        self._asked += 1
        number = self._asked
        workers = [worker for fleet in self._fleets for worker in fleet.workers]
        for worker in workers:
            worker.tell(protocol.Ask(number))
        deadline = time.monotonic() + REPORT_LIMIT_S
        while time.monotonic() < deadline and any(
            worker.serving and worker.process.returncode is None and (worker.report is None or worker.report.number < number)
            for worker in workers
        ):
            await asyncio.sleep(0.005)
        views = [self._view(worker) for worker in workers]
        return views, self._snapshot(views, [worker.report.counts for worker in workers if worker.report is not None])

    def _view(self, worker: Any) -> WorkerView:
        state = "retiring" if worker.retiring else "serving" if worker.serving else "starting"
        report = worker.report or protocol.Report(0, 0, 0.0, 0, "", {}, [])
        up_s = time.monotonic() - worker.started_at
        return WorkerView(
            worker.process.pid, worker.generation, state, up_s, report.open, report.oldest_s, report.resident_bytes, report.waiting
        )

    def _snapshot(self, views: Sequence[WorkerView], living: list[Snapshot]) -> Snapshot:
        counts = self._counts.total(living)
        counts[metrics.OPEN.name] = {"": [float(sum(view.open for view in views))]}
        counts[metrics.WORKERS.name] = {}
        for view in views:
            counts[metrics.WORKERS.name].setdefault(str(view.generation), [0.0])[0] += view.state != "starting"
        workers = float(sum(view.resident_bytes for view in views))
        counts[metrics.MEMORY.name] = {"parent": [float(lifeline.resident_bytes())], "workers": [workers]}
        counts.update(metrics.of_hosts((row.backend, row.id, row.state, row.in_flight, row.details) for row in self._rows()))
        return counts

    def exemplars(self) -> metrics.Exemplars:
        """See `admin.Operated`."""
        reports = [worker.report for fleet in self._fleets for worker in fleet.workers]
        return metrics.latest(report.exemplars for report in reports if report is not None)

    async def hosts(self) -> Sequence[HostView]:
        """See `admin.Operated`. What several workers know of a host is added up; of their states the gravest is shown."""
        await self.look()
        return self._rows()

    def _rows(self) -> list[HostView]:
        found: dict[tuple[str, str], HostView] = {}
        for worker in self._fleets[-1].workers:
            for row in worker.report.hosts if worker.report is not None else ():
                before = found.get((row.backend, row.id))
                if before is not None:
                    capacity = None if row.capacity is None or before.capacity is None else row.capacity + before.capacity
                    graver = max(before, row, key=lambda view: admin.GRAVITY.index(view.state))
                    row = msgspec.structs.replace(graver, in_flight=before.in_flight + row.in_flight, capacity=capacity)
                found[row.backend, row.id] = row
        return list(found.values())

    async def drain(self, target: str, drained: bool) -> bool:
        """See `admin.Operated`."""
        if target not in {row.id for row in await self.hosts()}:
            return False
        (self._drained.add if drained else self._drained.discard)(target)
        for fleet in self._fleets:
            fleet.drain(sorted(self._drained))
        _log.info("target %s is %s", target, "drained by the operator" if drained else "back by the operator's word")
        return True

    def effective(self) -> list[dict[str, Any]]:
        """See `admin.Operated`."""
        return registry.rows(self._plan.loaded)

    async def find(self, name: str) -> dict[str, Any] | None:
        """See `admin.Operated`."""
        self._asked += 1
        number = self._asked
        workers = [worker for fleet in self._fleets for worker in fleet.workers]
        for worker in workers:
            worker.tell(protocol.Find(number, name))
        deadline = time.monotonic() + REPORT_LIMIT_S
        while time.monotonic() < deadline:
            answers = [worker.found for worker in workers if worker.found is not None and worker.found.number == number]
            known = next((answer.record for answer in answers if answer.record is not None), None)
            if known is not None:
                return known
            if len(answers) == len(workers):
                break
            await asyncio.sleep(0.005)
        store = self._shared_store()
        return await store.request(name) if store is not None else None  # of another gateway, or of a worker that has ended

    def stored_keys(self) -> AdminStore | None:
        """See `admin.Operated`."""
        return self._shared_store()

    def _known_keys(self) -> KeyList:
        return self._admin_store.known() if self._admin_store is not None else KeyList()

    def _shared_store(self) -> AdminStore | None:
        if self._admin_store is None and self.settings.redis.url is not None:
            from gateway.store.admin import AdminStore  # 0.1 s that only a gateway with Redis has to spend, once

            self._admin_store = AdminStore(self.settings, self._counts.own)
        return self._admin_store

    async def usage(self, first: str, last: str) -> ledger.Rows:
        """See `admin.Operated`."""
        await self.look()  # so that what has just ended is in it
        store = self._shared_store()
        if store is not None:
            return await store.usage(first, last)
        return {place: found for place, found in self._usage.rows.items() if first <= place[0] <= last}


def _refuse_moves(before: Settings, after: Settings) -> None:
    """A reload keeps the listening sockets: raises ConfigError when it would have to move them."""
    for name, one, two in (
        ("listen.host", before.listen.host, after.listen.host),
        ("listen.port", before.listen.port, after.listen.port),
        ("listen.admin", admin_address(before.listen), admin_address(after.listen)),
        ("timeouts.client_s", before.timeouts.client_s, after.timeouts.client_s),
    ):
        if one != two:
            raise ConfigError(name, f"cannot change from {one} to {two} while the gateway runs: restart it")
    if before.redis != after.redis:  # which are not told: there may be a password among them
        raise ConfigError("redis", "cannot change while the gateway runs: restart it")
