"""The processes that backends asked for (a local engine's supervisor): one each, restarted with back-off, its state
passed on."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from gateway.plugin import Service, ServiceState
from gateway.processes import children
from gateway.supervision import Failed, supervise, uncounted

Observer = Callable[[str, ServiceState], None]
MAX_STATE_LINE = 1 << 16
# What a restart is thought to take before the service says better.
_USUAL_START_S = 30.0


class Services:
    """Runs them, and changes to another set of them without touching those that stay as they are."""

    def __init__(self, observe: Observer, failed: Failed = uncounted) -> None:
        self._observe = observe
        self._failed = failed
        self._running: dict[str, tuple[Service, asyncio.Task[None]]] = {}
        self.states: dict[str, ServiceState] = {}

    async def change(self, wanted: Sequence[Service]) -> None:
        """Run these and no others; what is the same goes on."""
        named = {service.name: service for service in wanted}
        gone = [name for name, (service, _) in self._running.items() if named.get(name) != service]
        await self._end([self._running.pop(name)[1] for name in gone])
        for name in gone:
            self.states.pop(name, None)
        for name, service in named.items():
            if name not in self._running:
                self.states[name] = ServiceState()
                keep = partial(children.keep, partial(self._one_life, service), partial(self._ended, name), asyncio.Event())
                task = supervise(f"service {name}", keep, self._failed)
                self._running[name] = (service, task)

    async def aclose(self) -> None:
        """End all of them."""
        await self._end([task for _, task in self._running.values()])
        self._running.clear()

    async def _end(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _one_life(self, service: Service) -> int:
        status, theirs = os.pipe()
        try:
            process = await children.spawn(service.argv, {**os.environ, **service.environment, "PENSTOCK_STATUS_FD": str(theirs)}, [theirs])
        finally:
            os.close(theirs)
        reader = asyncio.StreamReader(limit=MAX_STATE_LINE)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(status, "rb", 0)
        )
        try:
            while data := await reader.readline():
                with contextlib.suppress(msgspec.DecodeError):
                    self._change(service.name, msgspec.json.decode(data, type=ServiceState))
            return await process.wait()
        finally:
            await asyncio.shield(children.end(process, service.grace_s))
            transport.close()

    def _ended(self, name: str, how: str, delay_s: float) -> None:
        self._change(name, ServiceState("restarting", f"its supervisor ended ({how})", eta_s=delay_s + _USUAL_START_S))

    def _change(self, name: str, state: ServiceState) -> None:
        self.states[name] = state
        self._observe(name, state)
