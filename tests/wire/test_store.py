"""The scripts in a real Redis, the oldest that is promised and Debian's: they decide as the memory does, and give everything back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway import config
from gateway.access.keys import Keys, StoredKey, hashed
from gateway.access.limits.memory import Memory
from gateway.access.limits.rules import SECOND, Ask, Decision, Lease, Row, StoreFailed
from gateway.store.shared import Shared
from gateway.telemetry.metrics import Metrics
from tests.support.redis import Server
from tests.support.store import DAY, EVEN, RPM, SLOTS, START, TPM, beat, failures, lease, until, with_store


class Step(NamedTuple):
    after_s: float
    cost: int
    truth: int
    held_for: int


steps = st.lists(st.builds(Step, st.floats(0, 1.5), st.integers(0, 900), st.integers(0, 1500), st.integers(0, 6)), min_size=1, max_size=30)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
def test_both_stores_decide_alike(server: Server, arrivals: list[Step]) -> None:
    server.client().flushall()

    async def work(store: Shared) -> None:
        clock = START
        memory = Memory(now=lambda: clock)
        open_: list[tuple[int, Lease, float]] = []
        for number, step in enumerate(arrivals):
            clock += round(step.after_s * SECOND)
            store.now = clock
            for item in [item for item in open_ if item[0] <= number]:
                _, lease, truth = item
                costs = [1.0, truth, 1.0, truth]
                memory.correct(lease.asks, costs)
                store.settle(lease, costs, Row("2023-11-14", "k", "m", {"ok": 1}))
                await store.pipeline.work()
                open_.remove(item)
            asks = [
                Ask("rpm", RPM, 1.0),
                Ask("tpm", TPM, float(step.cost)),
                Ask("slots", SLOTS, 1.0),
                Ask("day", DAY, float(step.cost), 9000.0),
            ]
            lease = Lease(f"id-{number}", "k", "m", asks)
            here, there = memory.decide(asks), await store.admit(lease)
            assert lease.outage is None
            _alike(here, there)
            if here.refused is None:
                open_.append((number + step.held_for, lease, float(step.truth)))

    with_store(server, work)


def _alike(here: Decision, there: Decision) -> None:
    assert (here.refused and here.refused.key) == (there.refused and there.refused.key)
    assert here.wait == pytest.approx(there.wait, abs=2)
    for one, two in zip(here.states, there.states, strict=True):
        assert one[0] == pytest.approx(two[0], abs=1)  # it is rounded down, and a microsecond can tip it
        assert one[1] == pytest.approx(two[1], abs=2)


def test_what_ended_leaves_nothing_behind_but_the_ledger(server: Server) -> None:
    server.client().flushall()

    async def work(store: Shared) -> None:
        held = [lease(number) for number in range(5)]
        assert all([(await store.admit(one)).refused is None for one in held])
        assert (await store.admit(lease(9))).refused is SLOTS
        assert server.client().zcard("penstock:{default}:limit:slots") == 5
        for one in held:
            store.settle(one, [1.0], Row("2026-11-25", "k", "m", {"ok": 1, "prompt": 7}))
        assert (await store.admit(lease(10))).refused is None, "what is given back goes before what is asked"
        store.settle(lease(10), [1.0], Row("2026-11-25", "k", "m", {"client_gone": 1}))
        await store.pipeline.work()
        found = server.client().hgetall("penstock:{default}:usage:2026-11-25")
        assert found == {b"k\x1fm\x1fok": b"5", b"k\x1fm\x1fprompt": b"35", b"k\x1fm\x1fclient_gone": b"1"}

    with_store(server, work)
    left = {key.decode().split(":")[2] for key in server.client().scan_iter()}
    assert left == {"usage", "clock"}, "limits, open requests and gateways are gone"
    assert all(server.client().ttl(key) > 0 for key in server.client().scan_iter())


def test_everything_of_ours_has_one_slot_of_a_cluster_and_an_end(server: Server) -> None:
    server.client().flushall()

    async def work(store: Shared) -> None:
        for number, limit in enumerate((RPM, TPM, SLOTS, DAY)):
            await store.admit(lease(number, limit))
        keys = [key.decode() for key in server.client().scan_iter()]
        assert all(key.startswith("penstock:{team-a}:") for key in keys)
        assert all(server.client().ttl(key) > 0 for key in keys if ":limit:" in key or ":open:" in key)

    with_store(server, work, prefix="team-a")


def test_a_batch_that_was_done_is_not_done_again(server: Server) -> None:
    """After a broken connection nobody knows whether the last batch arrived: it is sent again, and counts once."""
    server.client().flushall()

    async def work(store: Shared) -> None:
        one = lease(1)
        await store.admit(one)
        store.settle(one, [1.0], Row("2026-11-25", "k", "m", {"ok": 1}))
        sent: list[Any] = []
        run = store.client.run

        async def lossy(commands: Any) -> Any:
            sent.append(commands)
            await run(commands)
            raise StoreFailed("the answer was lost")

        store.client.run = lossy  # type: ignore[method-assign]
        await store.pipeline.work()
        assert not store.pipeline.up
        store.client.run = run  # type: ignore[method-assign]
        await beat(store)
        await store.pipeline.work()
        assert server.client().hgetall("penstock:{default}:usage:2026-11-25") == {b"k\x1fm\x1fok": b"1"}

    with_store(server, work)


def test_many_decisions_of_a_moment_share_a_round_trip(server: Server) -> None:
    server.client().flushall()

    async def work(store: Shared) -> None:
        trips = 0
        run = store.client.run

        async def counting(commands: Any) -> Any:
            nonlocal trips
            trips += 1
            return await run(commands)

        store.client.run = counting  # type: ignore[method-assign]
        decisions = await asyncio.gather(*(store.admit(lease(number, RPM)) for number in range(200)))
        assert sum(decision.refused is None for decision in decisions) == 30, "each is decided for itself"
        assert trips <= 3

    with_store(server, work)


def test_a_client_that_leaves_while_it_is_decided_takes_nothing(server: Server) -> None:
    server.client().flushall()

    async def work(store: Shared) -> None:
        asking = asyncio.create_task(store.admit(lease(1)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until("nothing is to be said", lambda: not any(part.pending() for part in store.pipeline.parts))
        assert server.client().zcard("penstock:{default}:limit:slots") == 0

    with_store(server, work)


def test_a_client_that_leaves_in_the_moment_of_its_grant_takes_nothing(server: Server) -> None:
    """The decision is there and its task has not gone on yet: nobody will settle that lease, and the heartbeat must not renew it."""
    server.client().flushall()

    async def work(store: Shared) -> None:
        decided = store.limits._decided

        def and_then_it_leaves(*given: Any) -> None:
            decided(*given)
            asking.cancel()

        store.limits._decided = and_then_it_leaves  # type: ignore[method-assign,assignment]
        asking = asyncio.create_task(store.admit(lease(1)))
        with pytest.raises(asyncio.CancelledError):
            await asking
        await store.pipeline.work()
        assert (store.leases.open, store.leases.slots) == ({}, {})
        assert server.client().zcard("penstock:{default}:limit:slots") == 0

    with_store(server, work)


def test_a_script_that_the_server_has_forgotten_is_told_again(server: Server) -> None:
    async def work(store: Shared) -> None:
        server.client().script_flush()
        assert (await store.admit(lease(1, DAY))).refused is None

    server.client().flushall()
    with_store(server, work)


def test_a_gateway_that_died_is_buried_by_another_with_what_it_had_open(server: Server, tmp_path: Path) -> None:
    server.client().flushall()

    async def work(store: Shared) -> None:
        client = server.client()
        client.zadd("penstock:{default}:gateways", {"dead": 1})
        client.hset("penstock:{default}:open:dead", mapping={"k\x1fm": 3, "other\x1fm": 1})
        await beat(store)
        day = store.membership._days.at(time.time())["day"][0]
        assert client.hgetall(f"penstock:{{default}}:usage:{day}") == {b"k\x1fm\x1flost": b"3", b"other\x1fm\x1flost": b"1"}
        assert client.zrange("penstock:{default}:gateways", 0, -1) == [store.membership.me.encode()]
        await beat(store)
        assert client.hget(f"penstock:{{default}}:usage:{day}", "k\x1fm\x1flost") == b"3", "once"

    with_store(server, work)


def test_a_pipeline_with_a_fault_of_ours_keeps_no_request_waiting_and_is_begun_again(server: Server) -> None:
    server.client().flushall()
    metrics = Metrics()

    async def work(store: Shared) -> None:
        decided = store.limits._decided

        def fails(*given: Any) -> None:
            store.limits._decided = decided  # type: ignore[method-assign]
            raise RuntimeError("a fault of ours")

        store.limits._decided = fails  # type: ignore[method-assign,assignment]
        decisions = await asyncio.gather(*(store.admit(lease(number, EVEN)) for number in range(3)))
        assert all(decision.refused is None for decision in decisions), "decided here"
        assert failures(metrics, "store pipeline") == 1
        await until("it is back", lambda: store.pipeline.up)
        later = lease(9, DAY)
        assert (await store.admit(later)).refused is None
        assert later.outage is None

    with_store(server, work, metrics=metrics)


def test_a_key_sync_with_a_fault_of_ours_is_begun_again(server: Server) -> None:
    server.client().flushall()
    metrics, known = Metrics(), list[Keys]()

    class Failing(Keys):
        fails = 0

        def learn(self, entries: Mapping[str, StoredKey]) -> None:
            self.fails += bool(entries)
            if self.fails == 1:
                raise RuntimeError("a fault of ours")
            super().learn(entries)

    def made(settings: config.Settings) -> Keys:
        known.append(Failing(settings))
        return known[0]

    async def work(store: Shared) -> None:
        server.client().hset("penstock:{default}:keys", "alice", msgspec.json.encode(StoredKey(name="alice", hash=hashed("alice"))))
        server.client().incr("penstock:{default}:keys:version")
        await until("it has failed", lambda: failures(metrics, "stored keys") == 1)
        await until("and goes on", lambda: known[0].find(b"alice") is not None)

    with_store(server, work, keys=made, metrics=metrics)
