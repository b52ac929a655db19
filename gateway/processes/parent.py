"""The parent's life: it owns the listening sockets, the signals, the process tree and the admin API, and outlives none of them.

It serves no client. A worker that dies is replaced; a service that dies is restarted; when the parent dies, by whatever signal, the ends of
its pipes tell everybody else. A reload is a second generation of workers on the same socket, and the end of the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway import lifeline, supervision
from gateway.access.limits.rules import StoreFailed
from gateway.admin import api
from gateway.admin.audit import Audit
from gateway.admin.contract import Reloaded
from gateway.config import Loaded, Settings, admin_address
from gateway.errors import ConfigError, ConfigErrors
from gateway.lifecycle import Lifecycle
from gateway.processes import protocol
from gateway.processes.fleet import Fleet
from gateway.processes.outages import Outages
from gateway.processes.services import Observer
from gateway.processes.tree import Plan, Tree
from gateway.processes.view import View
from gateway.supervision import once, supervise
from gateway.telemetry import log, metrics

if TYPE_CHECKING:
    from gateway.processes import http

_log = logging.getLogger("penstock.parent")

# A worker imports and opens for half a second; one that takes longer than this will not come.
START_LIMIT_S = 30.0
# A worker that is ordered to end closes its listener within this time, or is too busy to matter.
CLOSE_LIMIT_S = 2.0
# Connections to a generation that is replaced are closed after this silence: clients of the OpenAI SDKs close theirs after 5 s.
LINGER_S = 6.0


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
    """Runs workers and services until it is ordered to stop."""

    def __init__(
        self,
        plan: Plan,
        home: Path,
        listener: socket.socket,
        admin_listener: socket.socket | None,
        load: Callable[[], Awaitable[Plan]],
        observe: Observer,
    ) -> None:
        self._tree = Tree(plan, home, listener, observe)
        self._view = View(self._tree, home, self.reload)
        self._home = home
        self._listener = listener
        self._admin_listener = admin_listener
        self._load = load
        self._reloading = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._grace_s = 0.0
        self._admin: http.Server | None = None
        self.serving = asyncio.Event()

    @property
    def settings(self) -> Settings:
        """Those in force."""
        return self._tree.plan.settings

    async def run(self) -> None:
        """Until SIGTERM or SIGINT; a second one is impatient. SIGHUP reloads."""
        loop, failed = asyncio.get_running_loop(), self._tree.counts.own.failed
        supervision.listen(failed)
        loop.add_signal_handler(signal.SIGTERM, lambda: self._stop(self.settings.timeouts.grace_s))
        loop.add_signal_handler(signal.SIGINT, lambda: self._stop(0.0))  # who presses Ctrl-C has no load balancer to wait for
        loop.add_signal_handler(signal.SIGHUP, lambda: self._background(once("reload", self.reload("SIGHUP"), failed)))
        if self._admin_listener is not None and self.settings.admin.key_hash is None:
            self._view.made_key_hash()  # so that it is there before anybody asks, and trouble is in the log from the start
        if self.settings.redis.url is None:
            self._tree.usage.read()
            self._tree.callers.read()
            self._view.alerts.read()
        self._background(supervise("ledger", self._tree.usage.write_forever, failed))
        self._background(supervise("budgets", self._view.alerts.run, failed))
        self._background(supervise("callers", self._tree.callers.write_forever, failed))
        await self._tree.services.change(self._tree.plan.services)
        self._background(once("start", self._announce(self._tree.grow(1, self.settings)), failed))
        self._background(supervise("outages", Outages(self._view.reported).run, failed))
        self._background(supervise("judge of answers", self._view.sentinel.judge_forever, failed))
        self._background(supervise("comparison of hosts", self._view.sentinel.look_forever, failed))
        admin = self._admin_listener is not None and supervise("admin API", self._serve_admin, failed)
        if (store := self._view.stored_keys()) is not None:
            store.open()
        await self._stopping.wait()
        await self._end()
        await self._tree.services.aclose()
        if admin:
            if self._admin is not None:
                await self._admin.retire(protocol.Retire(ready=False, grace_s=0.0, linger_s=0.0, limit_s=0.5))
            else:
                admin.cancel()
            await asyncio.gather(admin, return_exceptions=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tree.usage.write()
        with contextlib.suppress(StoreFailed, OSError):
            await self._tree.callers.write()
        await self._view.aclose()

    def _background(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _announce(self, fleet: Fleet) -> None:
        await fleet.serving()
        lifeline.tell_manager("READY=1")
        self.serving.set()

    async def _serve_admin(self) -> None:
        from gateway.processes import http  # 0.1 s, during which the workers start already

        app = api.Api(self._view, Audit(self._home / "state"))
        failed = self._tree.counts.own.failed
        server = http.server(app, self.settings, Lifecycle(), lambda accepting: None, failed, lifespan="off", proxy_headers=False)
        assert self._admin_listener is not None
        self._admin = server
        try:
            await server.serve(sockets=[self._admin_listener.dup()])
        finally:  # also where it has failed: the next one listens on a socket of its own
            self._admin = None
            for listening in getattr(server, "servers", ()):
                listening.close()

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
        await asyncio.gather(*(fleet.retire(order) for fleet in self._tree.fleets))

    # Reloading

    async def reload(self, why: str) -> Reloaded:
        """See `admin.contract.Operated`."""
        async with self._reloading:
            generation = self._tree.fleets[-1].generation
            if self._stopping.is_set():
                return Reloaded(False, generation, "the gateway is stopping")
            lifeline.tell_manager(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                plan = await self._load()
                _refuse_moves(self.settings, plan.loaded)
                await self._roll(plan, generation + 1)
            except ConfigError as error:
                self._tree.counts.own.add(metrics.RELOADS, ("refused",))
                _log.error("reload (%s) refused, nothing has changed: %s", why, "; ".join(str(error).splitlines()))
                return Reloaded(False, generation, str(error))
            finally:
                lifeline.tell_manager("READY=1")
            self._tree.counts.own.add(metrics.RELOADS, ("ok",))
            _log.info("reload (%s): generation %d serves", why, generation + 1)
            return Reloaded(True, generation + 1)

    async def _roll(self, plan: Plan, generation: int) -> None:
        """New workers beside the old ones; when all of them serve the old ones end. Raises ConfigError when they do not come."""
        if self._stopping.is_set():
            raise ConfigError("", "the gateway is stopping")
        await self._tree.services.change(plan.services)
        fleet = self._tree.grow(generation, plan.settings)
        try:
            await asyncio.wait_for(fleet.serving(), START_LIMIT_S)
        except TimeoutError:
            self._tree.fleets.remove(fleet)
            await fleet.retire(protocol.Retire(ready=True, grace_s=0.0, linger_s=0.0, limit_s=0.0))
            await self._tree.services.change(self._tree.plan.services)
            raise ConfigError("", f"the new workers do not serve after {START_LIMIT_S:g} s; the log says why") from None
        self._tree.plan = plan
        log.setup(plan.settings.log.level, plan.settings.log.format)
        for old in self._tree.fleets[:-1]:
            if not old.retired:
                self._background(once("end of a generation", self._replace(old), self._tree.counts.own.failed))
                await old.closed(CLOSE_LIMIT_S)  # from here on every new connection meets the new settings

    async def _replace(self, old: Fleet) -> None:
        await old.retire(protocol.Retire(ready=True, grace_s=0.0, linger_s=LINGER_S, limit_s=max(old.settings.timeouts.drain_s, LINGER_S)))
        if old in self._tree.fleets:
            self._tree.fleets.remove(old)


def _refuse_moves(before: Settings, loaded: Loaded) -> None:
    """A reload keeps the listening sockets: raises ConfigErrors when it would have to move them."""
    after = loaded.settings
    wrong: list[ConfigError] = []
    for name, one, two in (
        ("listen.host", before.listen.host, after.listen.host),
        ("listen.port", before.listen.port, after.listen.port),
        ("listen.admin", admin_address(before.listen), admin_address(after.listen)),
        ("timeouts.client_s", before.timeouts.client_s, after.timeouts.client_s),
    ):
        if one != two:
            wrong.append(ConfigError(name, f"cannot change from {one} to {two} while the gateway runs: restart it"))
    if before.redis != after.redis:  # which are not told: there may be a password among them
        wrong.append(ConfigError("redis", "cannot change while the gateway runs: restart it"))
    if wrong:
        raise loaded.located(ConfigErrors(wrong))
