"""A store over a real Redis in this process, and what tests ask of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from gateway import config
from gateway.access.keys import Keys
from gateway.access.limits import rules
from gateway.access.limits.rules import SECOND, Ask, Lease, Limit, Unit
from gateway.store.shared import Shared
from gateway.telemetry.metrics import Metrics
from tests.support.redis import Server

START = 1_700_000_000 * SECOND
RPM = rules.rate("rpm", "k", Unit.REQUESTS, 90, 20)
TPM = rules.rate("tpm", "k", Unit.TOKENS, 1700, 45)
# One a second, thirty at once: numbers that floor to themselves.
EVEN = rules.rate("even", "k", Unit.REQUESTS, 60, 30)
SLOTS = rules.slots("slots", "k", 5)
DAY = rules.quota("day", "k", Unit.DAY, 4000, "day")


def configured(server: Server, **more: Any) -> config.Settings:
    return config.load(environment={}, overrides={"redis": {"url": server.url, "store_timeout_ms": 5000, **more}}).settings


def with_store(
    server: Server,
    work: Callable[[Shared], Coroutine[Any, Any, None]],
    keys: Callable[[config.Settings], Keys] = Keys,
    metrics: Metrics | None = None,
    **more: Any,
) -> None:
    """Run `work` with an open store; a clock that it sets is the scripts' clock."""

    async def run() -> None:
        chosen = configured(server, **more)
        store = Shared(chosen, keys(chosen), metrics or Metrics())
        await store.open()
        try:
            await work(store)
        finally:
            await store.aclose()

    asyncio.run(run())


async def beat(store: Shared) -> None:
    """A heartbeat, and what comes of it."""
    await store.pipeline.heartbeat()
    await store.pipeline.work()


async def until(what: str, probe: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """As `tests.support.processes.until`, for what happens in this loop."""
    async with asyncio.timeout(timeout_s):
        while not probe():
            await asyncio.sleep(0.01)


def lease(number: int = 0, limit: Limit = SLOTS, cost: float = 1.0) -> Lease:
    return Lease(f"id-{number}", "k", "m", [Ask(limit.key, limit, cost, 3600.0)])


def counted(of: Metrics, family: str, label: str = "") -> float:
    return of.snapshot()[family].get(label, [0.0])[0]


def failures(of: Metrics, task: str) -> float:
    return counted(of, "penstock_task_failures_total", task)
