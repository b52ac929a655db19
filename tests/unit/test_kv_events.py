"""What an engine says of its cache: blocks that come and go, numbers that are missing or begin anew, and what that means to the index."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from backends.sglang_dsv3.config import Config
from backends.sglang_dsv3.kv_events import SLACK_S, Cache, Subscription
from gateway.config import problems
from gateway.plugin import Target
from gateway.serving.balance.affinity import PREFIX, Affinity, point
from gateway.serving.balance.breaker import Breaker, Limits
from gateway.serving.balance.cached import Prefixes
from gateway.serving.balance.hosts import Host
from gateway.serving.balance.policies import Affine


def batch(*events: dict[str, Any]) -> bytes:
    return msgspec.msgpack.encode([1.0, list(events), 0])


def stored(*blocks: int, medium: str | None = "GPU") -> dict[str, Any]:
    more = {"parent_block_hash": None, "token_ids": [1], "block_size": 1, "lora_id": None}
    return {"type": "BlockStored", "block_hashes": list(blocks), "medium": medium, **more}


def removed(*blocks: int, medium: str | None = "GPU") -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(blocks), "medium": medium}


CLEARED = {"type": "AllBlocksCleared"}


def test_what_is_evicted_takes_all_that_is_older_with_it() -> None:
    cache = Cache()
    for number, at in enumerate((100.0, 200.0, 300.0)):
        cache.take(number, batch(stored(number)), at)
    assert cache.since == 0
    cache.take(3, batch(removed(1)), 400.0)
    assert cache.since == 200.0 + SLACK_S
    cache.take(4, batch(removed(0)), 401.0)
    assert cache.since == 200.0 + SLACK_S, "what is older says nothing new"
    assert (cache.evicted, cache.precise) == (2, True)
    cache.take(5, batch(removed(77)), 402.0)
    assert cache.evicted == 2, "one that nobody has heard of is no news"


def test_a_block_that_is_kept_in_host_memory_is_still_cached() -> None:
    cache = Cache()
    cache.take(0, batch(stored(1), stored(1, medium="CPU_PINNED")), 100.0)
    cache.take(1, batch(removed(1)), 200.0)
    assert (cache.since, cache.evicted) == (0, 0)
    cache.take(2, batch(removed(1, medium="CPU_PINNED")), 300.0)
    assert (cache.since, cache.evicted) == (100.0 + SLACK_S, 1)


def test_a_cleared_cache_and_another_engine_have_nothing() -> None:
    cache = Cache()
    cache.take(0, batch(stored(1, 2)), 100.0)
    cache.take(1, batch(CLEARED), 150.0)
    assert (cache.since, cache.evicted) == (150.0, 2)
    cache.take(2, batch(stored(3)), 160.0)
    cache.take(0, batch(stored(4)), 200.0)
    assert (cache.since, cache.evicted, cache.missed, cache.precise) == (200.0, 3, 0, True)


def test_what_was_missed_makes_it_approximate_until_that_is_evicted() -> None:
    cache = Cache()
    cache.take(0, batch(stored(1)), 100.0)
    assert cache.missing(1) is None
    assert cache.missing(4) == 1
    cache.take(4, batch(stored(2)), 200.0)
    assert (cache.missed, cache.precise) == (3, False)
    cache.take(5, batch(removed(1)), 300.0)
    assert cache.since < 200.0
    cache.take(6, batch(removed(2)), 400.0)
    assert (cache.since, cache.precise) == (200.0 + SLACK_S, True)
    late = Cache()
    late.take(9, batch(stored(1)), 100.0)
    assert (late.missed, late.precise) == (0, False), "what was before the gateway was is not missed, and not known"


def test_it_is_bounded() -> None:
    cache = Cache(most_blocks=10)
    for number in range(100):
        cache.take(number, batch(stored(number)), float(number))
    assert len(cache._stored) == 10


@pytest.mark.parametrize(
    "payload", [b"", b"\xc1", msgspec.msgpack.encode({"a": 1}), msgspec.msgpack.encode([1.0, [{"block_hashes": [1]}]])]
)
def test_nonsense_is_refused(payload: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        Cache().take(0, payload, 1.0)


def prompt(*messages: str) -> Affinity:
    chain = [hash(messages[: number + 1]) for number in range(len(messages))]
    return Affinity(PREFIX, point(repr(messages[:1]).encode()), chain, [4400 * (n + 1) for n in range(len(messages))], 1)


def test_what_an_engine_has_evicted_is_not_expected_there() -> None:
    index = Prefixes()
    bound = prompt("s", "u")
    for host in "ab":
        placement = index.place(bound, host)
        placement.begun()
        placement.ended(2000, 0)
    index.told("a", time.monotonic())
    assert index.held(bound, {"a", "b"}, 0) == {"b": 8800}
    gone, there = index.place(bound, "a"), index.place(bound, "b")
    assert (gone.expected_tokens, gone.evicted) == (0, True)
    assert (there.expected_tokens, there.evicted) == (2000, False)
    gone.begun()
    assert index.place(bound, "a").expected_tokens == 2000, "it was prefilled again"


def test_an_answer_that_lasts_is_used_until_its_end() -> None:
    index = Prefixes()
    index.told("a", time.monotonic())
    placement = index.place(prompt("s", "u"), "a")
    placement.begun()
    begun = time.monotonic()
    placement.ended(2000, 0)
    index.told("a", begun)
    assert index.place(prompt("s", "u"), "a").expected_tokens == 2000


def host(name: str, since: float) -> Host:
    return Host(Target(name, cache_since=since), Breaker(Limits(5, 0.5, 10, 1, 1), random.random))


def test_a_choice_takes_the_engines_word() -> None:
    affine, bound = Affine(random.Random(1)), prompt("s", "u")
    hosts = [host("a", 0), host("b", 0)]
    placement = affine.place(bound, "b")
    placement.begun()
    assert affine.pick(hosts, bound).target.id == "b"
    affine.pick([host("a", 0), host("b", time.monotonic())], bound)
    assert affine.place(bound, "b").evicted
    alone = [host("b", time.monotonic())]
    affine.pick(alone, bound)
    assert affine.place(bound, "b").expected_tokens == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"kv_events": "10.0.0.1:5557"}, "kv_events: '10.0.0.1:5557' is no URL; accepted: tcp://HOST:PORT"),
        ({"kv_events": "tcp://10.0.0.1"}, "kv_events: "),
        ({"kv_replay": "tcp://10.0.0.1:5558"}, "kv_replay: does nothing without kv_events"),
        ({"kv_events": "tcp://h:1", "resolve": "a"}, "kv_events: belongs to a host with an address of its own"),
    ],
)
def test_a_wrong_setting_is_one_line(more: dict[str, Any], words: str) -> None:
    (error,) = problems({"hosts": [{"url": "http://h:1", **more}]}, Config, "b")
    assert words in f"{error.path}: {error.problem}"


class Publisher:
    """SGLang's, as it is on the wire; `say` may keep a message to itself."""

    def __init__(self) -> None:
        self._context = zmq.asyncio.Context()
        self._pub, self._router = self._context.socket(zmq.PUB), self._context.socket(zmq.ROUTER)
        self.events = f"tcp://127.0.0.1:{self._pub.bind_to_random_port('tcp://127.0.0.1')}"
        self.replay = f"tcp://127.0.0.1:{self._router.bind_to_random_port('tcp://127.0.0.1')}"
        self._kept: list[tuple[bytes, bytes]] = []
        self._next = 0
        self.asked = 0

    async def say(self, *events: dict[str, Any], lost: bool = False) -> None:
        number, payload = self._next.to_bytes(8, "big"), batch(*events)
        self._kept.append((number, payload))
        self._next += 1
        if not lost:
            await self._pub.send_multipart((b"", number, payload))

    async def serve(self) -> None:
        while True:
            client, empty, start = await self._router.recv_multipart()
            self.asked += 1
            for number, payload in self._kept:
                if number >= start:
                    await self._router.send_multipart((client, empty, b"", number, payload))
            await self._router.send_multipart((client, empty, b"", (-1).to_bytes(8, "big", signed=True), b""))

    def close(self) -> None:
        self._context.destroy(linger=0)


async def until(probe: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not probe():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("replays", [True, False])
def test_a_gap_is_asked_for_again_or_known_to_be_one(replays: bool) -> None:
    async def run() -> None:
        engine = Publisher()
        heard = Subscription("h", engine.events, engine.replay if replays else None)
        tasks = [asyncio.ensure_future(heard.run()), asyncio.ensure_future(engine.serve())]
        try:
            async with asyncio.timeout(20):  # a subscriber that is not there yet is not sent anything
                while not heard.heard:
                    await engine.say(stored(1))
                    await asyncio.sleep(0.02)
            await engine.say(stored(2))
            await engine.say(removed(2), lost=True)
            before = heard.cache._last
            await engine.say(stored(3))
            await until(lambda: heard.cache._last != before and 3 in heard.cache._stored)
            assert heard.cache.missed == (0 if replays else 1)
            assert heard.cache.precise is replays
            assert (2 in heard.cache._stored) is not replays
            assert bool(engine.asked) is replays
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            engine.close()

    asyncio.run(run())
