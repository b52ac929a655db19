"""What limits cost: CPU of the gateway for each request, with none, in memory, and in Redis. `python -m bench.limits`."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import uvloop

from bench.peers import machine
from gateway import config
from gateway.access.keys import Keys, hashed
from gateway.access.limits.memory import Memory
from gateway.access.limits.rules import Store
from gateway.config import Settings
from gateway.plugin import BackendEnv, Endpoint, Usage
from gateway.serving import calls
from gateway.serving.registry import Registry
from gateway.store.shared import Shared
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.record import Record
from middleware.rate_limit import Admitted, RateLimit
from tests.support import redis

REQUESTS, ROUNDS, CONNECTIONS = 4000, 5, 32
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Explain quantum computing. " * 20}], "max_tokens": 64}).encode()
# Four limits: three of the key, one of the model.
LIMITS = {"rpm": 1e9, "tpm": 1e12, "max_in_flight": 100_000}
SCOPE = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"/", "headers": [], "client": ("127.0.0.1", 1)}


def settings(limited: bool, url: str | None = None) -> Settings:
    tree = {
        "models": {"m": {"backend": "b", "limits": {"tpm": 1e12} if limited else {}}},
        "backends": {"b": {"kind": "scripted"}},
        "keys": [{"name": "k", "hash": hashed("k"), **(LIMITS if limited else {})}],
        "redis": {"url": url, "store_timeout_ms": 10_000},
    }
    return config.load(environment={}, overrides=tree).settings


class Requests:
    """Requests as the gateway makes them, ready to be admitted."""

    def __init__(self, chosen: Settings, store: Store) -> None:
        self._limits = RateLimit(chosen, store, Metrics())
        self._served = Registry(chosen, BackendEnv(Path("/nonexistent"))).serving("m", Endpoint.CHAT)
        self._caller = Keys(chosen).find(b"k")

    def new(self) -> tuple[Admitted, Record]:
        record, call = Record(dict(SCOPE)), calls.parse(Endpoint.CHAT, BODY)
        record.caller = self._caller
        record.status, record.first_event_at = 200, 1.0
        record.usage = Usage(140, 64)
        return self._limits.admitted(call, self._served, record), record


async def one_by_one(made: list[tuple[Admitted, Record]], settled: bool) -> None:
    for admitted, _ in made:
        await admitted.__aenter__()
        if settled:
            await admitted.__aexit__(None, None, None)


async def at_once(made: list[tuple[Admitted, Record]], settled: bool) -> None:
    """As many clients as there are connections, one request after another each."""

    async def client() -> None:
        while made:
            admitted, _ = made.pop()
            await admitted.__aenter__()
            if settled:
                await admitted.__aexit__(None, None, None)

    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))


async def cpu_us(of: Requests, way: Callable[[list[tuple[Admitted, Record]], bool], Awaitable[None]], settled: bool) -> float:
    """Of one request, in microseconds."""
    made = [of.new() for _ in range(REQUESTS)]
    gc.collect()
    gc.disable()  # what is looked through for garbage is this bench's own four thousand requests
    started = time.process_time()
    await way(made, settled)
    if settled:
        await asyncio.sleep(0.05)  # until the last batch is away
    took = (time.process_time() - started) / REQUESTS * 1e6
    gc.enable()
    return took


async def measure(url: str, server: psutil.Process) -> dict[str, Any]:
    none, limited, shared = settings(False), settings(True), settings(True, url)
    store = Shared(shared, Keys(shared), Metrics())
    ways = {
        "none": (Requests(none, Memory()), one_by_one),
        "memory": (Requests(limited, Memory()), one_by_one),
        "redis": (Requests(shared, store), at_once),
    }
    await store.open()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    servers: list[float] = []
    for _ in range(ROUNDS):  # in turn, so that a slow minute is everybody's
        for name, (of, way) in ways.items():
            before = sum(server.cpu_times()[:2])
            whole, admit = await cpu_us(of, way, True), await cpu_us(of, way, False)
            found[name].append((admit, whole - admit))
            if name == "redis":
                servers.append((sum(server.cpu_times()[:2]) - before) / REQUESTS / 2 * 1e6)
    await store.aclose()
    rows = {
        name: {
            "admit_us": round(statistics.median(a for a, _ in values), 1),
            "settle_us": round(statistics.median(s for _, s in values), 1),
        }
        for name, values in found.items()
    }
    return {"rows": rows, "redis_server_us": round(statistics.median(servers), 1)}


def main() -> None:
    logging.disable()  # half of the requests are never settled, which the store complains about at the end
    with tempfile.TemporaryDirectory() as folder, redis.server(Path(folder)) as server:
        assert server.process is not None
        found = uvloop.run(measure(server.url, psutil.Process(server.process.pid)))
    print(f"{'limits':<10}{'admit, us':>12}{'settle, us':>12}")
    for name, row in found["rows"].items():
        print(f"{name:<10}{row['admit_us']:>12}{row['settle_us']:>12}")
    print(f"Redis itself: {found['redis_server_us']} us for each decision; {CONNECTIONS} clients at once, four limits a request")
    path = Path(__file__).parent / "results" / "limits.json"
    path.write_text(
        json.dumps({**found, "date": datetime.now(UTC).strftime("%Y-%m-%d"), "command": "make bench", "machine": machine()}, indent=2)
        + "\n"
    )


if __name__ == "__main__":
    main()
