"""The store in Redis of one worker: limits that several workers and gateways keep together, and what holds while Redis is gone.

This file only puts the parts together: the [pipeline](pipeline.py), and what goes through it: [limits](limits.py) with their
[leases](leases.py), [pending writes](writes.py), [membership](membership.py) with its heartbeats, and [memories](memories.py) of
requests; beside it [key sync](keysync.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import Sequence

from gateway.access.keys import Keys
from gateway.access.ledger import Days
from gateway.access.limits.rules import Ask, Decision, Lease, Row, State, StoreFailed
from gateway.config import Settings
from gateway.store.connect import Client
from gateway.store.keysync import KeySync
from gateway.store.leases import Leases
from gateway.store.limits import GATHER_S, Limits
from gateway.store.membership import HEARTBEAT_S, Membership
from gateway.store.memories import Memories
from gateway.store.pipeline import Pipeline
from gateway.store.writes import PendingWrites
from gateway.supervision import supervise
from gateway.telemetry.metrics import STORE_UP, Metrics
from gateway.telemetry.record import Record

# A store that is down is asked oftener whether it is back than one that is not is told that we live.
_ASK_AGAIN_S = 0.5
# How long a worker that ends takes at most to write what is pending.
_LAST_WORDS_S = 2.0


class Shared:
    """`Store` over Redis. `now`: microseconds for the scripts, 0 for the server's own clock, which never goes back (tests have another)."""

    def __init__(self, settings: Settings, keys: Keys, metrics: Metrics, now: float = 0.0) -> None:
        self.now = now
        self._metrics = metrics
        self.client = Client(settings.redis)
        me = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        keep_s = settings.limits.keep_days * 86400
        self.leases = Leases()
        self.membership = Membership(self.client, me, self.leases, Days(settings.limits.timezone), keep_s, metrics)
        self.pipeline = Pipeline(settings.redis, self.client, self.membership, metrics)
        self.writes = PendingWrites(self.client, me, keep_s, self._clock)
        self.limits = Limits(settings.redis, self.client, self.pipeline, self.membership, self.leases, self.writes, self._clock)
        self.memories = Memories(self.client)
        # In this order in every round: what has ended makes room for what is asked, and a heartbeat has the last word on what is open.
        # Nobody waits for memories.
        self.pipeline.parts = (self.writes, self.membership, self.limits, self.memories)
        self.keysync = KeySync(self.client, keys.learn, keys.confirmed, keys.known)
        keys.refresh = self.keysync.fresh
        self._tasks: list[asyncio.Task[None]] = []

    def _clock(self) -> float:
        return self.now or -self.membership.ahead

    async def open(self) -> None:
        """Ask whether it is there; a store that is not keeps nobody from starting."""
        self._metrics.put(STORE_UP, 0.0)
        await self.pipeline.heartbeat()
        with contextlib.suppress(StoreFailed):
            await self.keysync.read()
        works = {"store pipeline": self.pipeline.run, "store heartbeat": self._live, "stored keys": self.keysync.run}
        self._tasks = [supervise(name, work, self._metrics.failed) for name, work in works.items()]

    async def _live(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S if self.pipeline.up else _ASK_AGAIN_S)
            await self.pipeline.heartbeat()

    async def aclose(self) -> None:
        """Write what is pending, and leave the company of the gateways."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(StoreFailed, TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await self.pipeline.work()
                await self.client.run(self.membership.farewell())
        await self.client.aclose()

    async def admit(self, lease: Lease) -> Decision:
        """See `Store`."""
        return await self.limits.admit(lease)

    def settle(self, lease: Lease, costs: Sequence[float], row: Row) -> None:
        """See `Store`."""
        self.limits.settle(lease, costs, row)

    async def peek(self, asks: Sequence[Ask]) -> Sequence[State]:
        """See `Store`."""
        return await self.limits.peek(asks)

    def count(self, row: Row) -> None:
        """See `Store`."""
        self.limits.count(row)

    def remember(self, record: Record) -> None:
        """What happened to a request, for whoever asks at whatever gateway."""
        self.memories.add(record)
        self.pipeline.soon(GATHER_S)
