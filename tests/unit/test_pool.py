"""The pool of one backend's targets: what a probe does to them, and how requests wait for a place."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest

from backends.scripted import Config, Scripted
from gateway.config import Admission, Retry
from gateway.errors import Unavailable
from gateway.plugin import Target, Verdict
from gateway.serving.balance.affinity import UNBOUND
from gateway.serving.balance.hosts import Host, NoHost
from gateway.serving.balance.policies import First, RoundRobin
from gateway.serving.balance.queue import Ticket
from gateway.serving.balance.settings import Health
from gateway.serving.patience import heed
from gateway.serving.pool import Pool, Waiting

PLAIN = Health(slow_start_s=0)


class Moody(Scripted):
    """Two targets; what each probe answers is set from outside, an exception is raised."""

    answers: dict[str, bool | Exception]

    async def probe(self, target: str) -> bool:
        answer = self.answers[target]
        if isinstance(answer, Exception):
            raise answer
        return answer


class Small(Scripted):
    """One target with room for two."""

    def targets(self) -> Sequence[Target]:
        return [Target("only", capacity=2)]


class Two(Scripted):
    """Two targets with room for two each."""

    def targets(self) -> Sequence[Target]:
        return [Target("one", capacity=2), Target("two", capacity=2)]


def pool(backend: Scripted, queue: int = 10, health: Health = PLAIN) -> Pool:
    return Pool("b", backend, health, Admission(queue), Retry())


def once(found: Pool) -> None:
    """One round of probes."""

    async def probe() -> None:
        task = asyncio.create_task(found.probe_forever())
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()

    asyncio.run(probe())


@pytest.mark.parametrize("answer", [False, RuntimeError("a bug in a backend")])
def test_a_target_whose_probe_fails_is_taken_only_when_no_other_is_left(answer: bool | Exception) -> None:
    backend = Moody("b", Config(targets=2))
    found, policy = pool(backend), RoundRobin()
    backend.answers = {"b/0": answer, "b/1": True}
    once(found)
    assert {_id(found.choose(policy, UNBOUND, ())) for _ in range(6)} == {"b/1"}
    assert _id(found.choose(policy, UNBOUND, {"b/1"})) == "b/0"
    assert found.choose(policy, UNBOUND, {"b/0", "b/1"}) is NoHost.NOBODY
    backend.answers["b/0"] = True
    once(found)
    assert {_id(found.choose(policy, UNBOUND, ())) for _ in range(6)} == {"b/0", "b/1"}


def test_what_is_not_ready_is_never_picked_and_the_soonest_is_named() -> None:
    class Loading(Scripted):
        def targets(self) -> Sequence[Target]:
            return [Target("slow", ready=False, retry_after_s=30), Target("soon", ready=False, retry_after_s=3)]

    found = pool(Loading("b", Config()))
    assert found.choose(First(), UNBOUND, ()) is NoHost.NOBODY
    assert not found.available()
    waiting = found.waiting_for()
    assert waiting is not None
    assert waiting.id == "soon"


def test_the_drained_get_nothing_new_and_come_back() -> None:
    found = pool(Scripted("b", Config(targets=2)))
    found.drain(frozenset({"b/0"}))
    assert {_id(found.choose(RoundRobin(), UNBOUND, ())) for _ in range(6)} == {"b/1"}
    assert [row.state for row in found.view()] == ["drained", "ok"]
    found.drain(frozenset())
    policy = RoundRobin()
    assert {_id(found.choose(policy, UNBOUND, ())) for _ in range(6)} == {"b/0", "b/1"}


def waiting(whose: str = "nobody", priority: int = 0, patience_s: float = 0.0) -> Waiting:
    def ticket(now: float, wait_s: float) -> Ticket:
        made = Ticket(priority, whose, now + wait_s, now)
        if patience_s:
            heed(made, [(b"x-stainless-read-timeout", str(patience_s).encode())], now)
        return made

    return ticket


async def place(found: Pool, whose: str = "nobody", wait_s: float = 5.0, priority: int = 0, patience_s: float = 0.0) -> Host:
    host = await found.host(First(), UNBOUND, (), waiting(whose, priority, patience_s), wait_s)
    assert isinstance(host, Host)
    return host


def test_a_class_is_served_when_those_before_it_are_empty() -> None:
    async def work() -> list[str]:
        found, order = pool(Small("b", Config())), []
        held = [await place(found), await place(found)]

        async def wait(name: str, priority: int) -> None:
            host = await place(found, name, priority=priority)
            order.append(name)
            await asyncio.sleep(0)
            found.end(host, Verdict.OK)

        tasks = [asyncio.create_task(wait(*who)) for who in (("late", 5), ("early", 1), ("first", 0), ("later", 9))]
        await asyncio.sleep(0.01)
        found.end(held.pop(), Verdict.OK)
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(work()) == ["first", "early", "late", "later"]


def test_who_waits_is_served_in_turn_and_the_first_of_a_key_before_the_second_of_another() -> None:
    async def work() -> list[str]:
        found, order = pool(Small("b", Config())), []
        held = [await place(found), await place(found)]

        async def wait(name: str) -> None:
            host = await place(found, name)
            order.append(name)
            await asyncio.sleep(0)
            found.end(host, Verdict.OK)

        tasks = [asyncio.create_task(wait(name)) for name in ("a", "a", "b")]
        await asyncio.sleep(0)
        assert found.queue.waiting == 3
        for host in held:
            found.end(host, Verdict.OK)
        late = asyncio.create_task(wait("late"))
        await asyncio.gather(*tasks, late)
        assert found.queue.waiting == 0
        assert [host.in_flight for host in found.hosts] == [0]
        return order

    assert asyncio.run(work()) == ["a", "b", "late", "a"]


def test_a_client_that_leaves_while_it_waits_frees_its_place_at_once() -> None:
    async def work() -> None:
        found = pool(Small("b", Config()), queue=1)
        held = [await place(found), await place(found)]
        gone = asyncio.create_task(place(found))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="so is the queue"):
            await place(found)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert found.queue.waiting == 0
        stays = asyncio.create_task(place(found))
        await asyncio.sleep(0)
        found.end(held[0], Verdict.OK)
        await stays
        assert [host.in_flight for host in found.hosts] == [2]

    asyncio.run(work())


def test_a_client_that_leaves_just_when_it_is_called_passes_the_place_on() -> None:
    async def work() -> None:
        found = pool(Small("b", Config()))
        held = [await place(found), await place(found)]
        first, second = asyncio.create_task(place(found)), asyncio.create_task(place(found))
        await asyncio.sleep(0)
        found.end(held[0], Verdict.OK)  # calls the first
        first.cancel()
        await asyncio.wait_for(second, 1.0)
        assert [host.in_flight for host in found.hosts] == [2]

    asyncio.run(work())


def test_a_wait_ends_at_its_deadline_with_advice() -> None:
    async def work() -> None:
        found = pool(Small("b", Config()))
        for _ in range(2):
            await place(found)
        with pytest.raises(Unavailable) as refused:
            await place(found, wait_s=0.05)
        assert refused.value.retry_after_s is not None
        assert 1 <= refused.value.retry_after_s <= 60
        assert found.queue.waiting == 0

    asyncio.run(work())


def test_a_clients_own_deadline_ends_its_wait_before_it_leaves() -> None:
    async def work() -> None:
        found = pool(Small("b", Config()))
        held = [await place(found), await place(found)]
        began = time.monotonic()
        with pytest.raises(
            Unavailable, match=r"^Every engine was full for 0\.\d s, and its client waits 0\.4 s \(x-stainless-read-timeout\)\.$"
        ):
            await place(found, patience_s=0.4)
        assert time.monotonic() - began < 5, "and not when the queue's own patience is over"
        found.queue._rate = 4.0  # places that come free in a second
        others = [asyncio.create_task(place(found)) for _ in range(8)]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match=r"a place is about 2\.2 s away, and its client waits 1 s") as refused:
            await place(found, priority=5, patience_s=1.0)
        assert refused.value.retry_after_s == pytest.approx(2.25)
        assert await asyncio.wait_for(_first(found, held), 5), "another key's first request would be in time"
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        assert (found.queue.waiting, found.queue._classes, found._called) == (0, {}, {})

    async def _first(found: Pool, held: list[Host]) -> bool:
        task = asyncio.create_task(place(found, "another", patience_s=1.0))
        await asyncio.sleep(0)
        found.end(held[0], Verdict.OK)
        found.end(held[1], Verdict.OK)
        return isinstance(await task, Host)

    asyncio.run(work())


def test_who_must_make_room_in_a_full_queue_is_told() -> None:
    async def work() -> None:
        found = pool(Small("b", Config()), queue=2)
        held = [await place(found), await place(found)]
        heavy = [asyncio.create_task(place(found, "heavy")) for _ in range(2)]
        await asyncio.sleep(0)
        light = asyncio.create_task(place(found, "light"))
        with pytest.raises(Unavailable, match="its place is another's, who has fewer requests in it"):
            await heavy[1]
        for host in held:
            found.end(host, Verdict.OK)
        assert len({id(host) for host in await asyncio.gather(heavy[0], light)}) == 1
        assert (found.queue.waiting, found.queue._classes, found._called) == (0, {}, {})

    asyncio.run(work())


def test_a_wedged_target_is_asked_for_a_proof_and_taken_out() -> None:
    class Hung(Scripted):
        asked = 0

        async def verify(self, target: str) -> bool:
            self.asked += 1
            return target != "b/0"

    async def work() -> None:
        backend = Hung("b", Config(targets=2))
        found = pool(backend, health=Health(wedged_s=0.05, slow_start_s=0, probe_s=0.01))
        task = asyncio.create_task(found.probe_forever())
        await asyncio.sleep(0.02)
        loop = asyncio.get_running_loop()
        for host in found.hosts:
            found.hosts.begin(host, loop.time())
        well = found.hosts.get("b/1")
        assert well is not None
        async with asyncio.timeout(5):
            while [row.state for row in found.view()] != ["ejected", "ok"]:
                well.last_event_at = loop.time()
                await asyncio.sleep(0.005)
        assert backend.asked == 1, "rate-capped"
        assert "wedged" in found.view()[0].why
        task.cancel()

    asyncio.run(work())


def _id(host: Host | NoHost) -> str:
    assert isinstance(host, Host)
    return host.target.id


def test_a_place_at_an_ejected_host_is_none() -> None:
    """One host is full and the other ejected: who waits is called when there is a place, and does not spin until then."""

    async def work() -> None:
        found = pool(Two("b", Config(targets=2)))
        found.refresh()
        full, ejected = found.hosts
        found.hosts.eject(ejected, "sick", time.monotonic())
        held = [await place(found), await place(found)]
        assert held == [full, full]
        with pytest.raises(Unavailable, match="full for"):
            await place(found, wait_s=0.2)
        late = asyncio.create_task(place(found))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not late.done()
        found.end(full, Verdict.OK)
        assert await late is full
        assert (full.in_flight, ejected.in_flight) == (2, 0)

    asyncio.run(work())


def test_a_place_that_is_of_no_use_to_the_first_goes_to_the_next() -> None:
    """The first in line has tried the host that has one."""

    async def work() -> None:
        found = pool(Two("b", Config(targets=2)))
        found.refresh()
        one, two = found.hosts
        held = [await place(found) for _ in range(4)]
        assert {host.in_flight for host in found.hosts} == {2}
        first = asyncio.create_task(found.host(First(), UNBOUND, {one.target.id}, waiting("first"), 5.0))
        await asyncio.sleep(0)
        second = asyncio.create_task(place(found, "second"))
        await asyncio.sleep(0)
        found.end(one, Verdict.OK)
        assert await second is one
        assert not first.done()
        found.end(two, Verdict.OK)
        assert await first is two
        assert len(held) == 4

    asyncio.run(work())
