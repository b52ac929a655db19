"""What holds while the store is late or down, and that it is charged when it answers again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.access.limits.rules import Ask, Lease, Row, StoreFailed
from gateway.store.shared import Shared
from gateway.telemetry.metrics import Metrics
from tests.support import redis
from tests.support.redis import Server
from tests.support.store import DAY, EVEN, RPM, SLOTS, TPM, counted, lease, until, with_store


@contextlib.asynccontextmanager
async def paused(server: Server) -> AsyncIterator[None]:
    """It keeps whatever script it is asked for meanwhile, and runs it then; a little less long than an answer is waited for at all."""
    await asyncio.to_thread(server.client().execute_command, "CLIENT", "PAUSE", 900, "WRITE")
    try:
        yield
    finally:
        await asyncio.to_thread(server.client().execute_command, "CLIENT", "UNPAUSE")


def test_a_late_answer_is_not_waited_for_and_does_not_take_the_store_down(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.client().flushall()
    metrics = Metrics()

    async def work(store: Shared) -> None:
        assert (await store.admit(lease(0, EVEN))).states[0][0] == 29
        async with paused(server):
            first = lease(1, EVEN)
            assert (await store.admit(first)).refused is None
            assert first.outage is not None, "decided here"
            assert store.pipeline.late
            others = [lease(number, EVEN) for number in range(2, 12)]
            assert all([(await store.admit(one)).refused is None for one in others])
            assert all(one.outage is not None for one in others), "nobody else waits for it"
        await until("it is in time again", lambda: not store.pipeline.late and not store.writes.pending())
        assert store.pipeline.up
        later = lease(12, EVEN)
        left = (await store.admit(later)).states[0][0]
        assert later.outage is None
        assert 30 - 13 <= left <= 30 - 13 + 2, "each of the thirteen was charged once; one comes back each second"
        assert counted(metrics, "penstock_store_late_total") == 1
        assert counted(metrics, "penstock_store_failures_total") == 0
        assert caplog.text == ""

    with_store(server, work, metrics=metrics, store_timeout_ms=50)


def test_what_a_late_answer_has_granted_keeps_its_slot_and_is_counted_once(server: Server) -> None:
    server.client().flushall()

    async def work(store: Shared) -> None:
        both = [Ask("slots", SLOTS, 1.0), Ask("day", DAY, 100.0, 3600.0), Ask("tpm", TPM, 100.0)]
        goes_on, ends = Lease("goes-on", "k", "m", both), Lease("ends", "k", "m", both)
        async with paused(server):
            decisions = await asyncio.gather(store.admit(goes_on), store.admit(ends))
            assert [decision.refused for decision in decisions] == [None, None]
            store.settle(ends, [1.0, 60.0, 60.0], Row("2026-11-25", "k", "m", {"ok": 1}))
        await until("it is in time again", lambda: not store.pipeline.late and not store.writes.pending())
        client = server.client()
        assert client.zrange("penstock:{default}:limit:slots", 0, -1) == [b"goes-on"]
        assert float(client.get("penstock:{default}:limit:day")) == 60, "what goes on is counted when it ends"
        assert client.hget("penstock:{default}:open:" + store.membership.me, "k\x1fm") == b"1"
        store.settle(goes_on, [1.0, 40.0, 40.0], Row("2026-11-25", "k", "m", {"ok": 1}))
        await store.pipeline.work()
        assert client.zcard("penstock:{default}:limit:slots") == 0
        assert float(client.get("penstock:{default}:limit:day")) == 100
        left = (await store.admit(lease(9, TPM, 1.0))).states[0][0]
        assert TPM.burst - 101 - 1 <= left <= TPM.burst - 1, "a hundred were taken, and some have drained since"

    with_store(server, work, store_timeout_ms=50)


def test_slots_that_are_held_count_while_the_store_is_late(server: Server) -> None:
    server.client().flushall()

    async def work(store: Shared) -> None:
        held = [lease(number) for number in range(4)]
        assert all([(await store.admit(one)).refused is None for one in held])
        async with paused(server):
            assert (await store.admit(lease(4))).refused is None
            assert (await store.admit(lease(5))).refused is SLOTS
            store.settle(held[0], [1.0], Row("2026-11-25", "k", "m", {"ok": 1}))
            assert (await store.admit(lease(6))).refused is None, "the one that was given back"
        await until("it is in time again", lambda: not store.pipeline.late and not any(part.pending() for part in store.pipeline.parts))
        assert server.client().zcard("penstock:{default}:limit:slots") == 5
        assert (await store.admit(lease(7))).refused is SLOTS

    with_store(server, work, store_timeout_ms=50)


def test_with_closed_whoever_was_not_asked_yet_waits_for_its_turn(server: Server) -> None:
    """One pause is no reason to refuse everybody: only those whose own question was late are."""
    server.client().flushall()

    async def work(store: Shared) -> None:
        async with paused(server):
            with pytest.raises(StoreFailed):
                await store.admit(lease(1))
            assert store.pipeline.late
            patient = [asyncio.create_task(store.admit(lease(number))) for number in range(2, 5)]
        await until("it is in time again", lambda: not store.pipeline.late)
        assert [decision.refused for decision in await asyncio.gather(*patient)] == [None] * 3
        assert server.client().zcard("penstock:{default}:limit:slots") == 3, "what was refused for lateness holds nothing"

    with_store(server, work, store_timeout_ms=200, on_store_failure="closed")


def test_what_was_admitted_while_the_store_was_down_is_charged_to_its_rates(tmp_path: Path) -> None:
    """At its time: what has drained since is not charged any more, and never more than a full bucket is."""

    async def work(store: Shared) -> None:
        assert (await store.admit(lease(0, EVEN))).states[0][0] == 29
        running.kill()
        admitted = [lease(number, EVEN) for number in range(1, 200)]
        assert sum([(await store.admit(one)).refused is None for one in admitted]) == 29, "what was left, all of it: nobody else is there"
        assert not store.pipeline.up
        await asyncio.to_thread(running.start)
        await until("it is back", lambda: store.pipeline.up and not store.writes.pending(), 20)
        decision = await store.admit(lease(300, EVEN))
        # Redis kept nothing, and one comes back each second.
        assert decision.states[0][0] <= 20
        assert (await store.admit(lease(301, RPM))).states[0][0] >= 28, "another limit is as it was"

    with redis.server(tmp_path) as running:
        with_store(running, work, store_timeout_ms=50)
