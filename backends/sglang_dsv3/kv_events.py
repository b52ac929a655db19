"""What an engine says of its cache while it runs: SGLang's KV events, by ZeroMQ (`--kv-events-config`), and what they mean to an index that
knows prompts by their messages and no token of them.

An event names blocks by hashes of token ids, which nothing here can make of a message. What ties the two is time: an engine evicts what it
has used longest ago, so when a block goes that was stored at some moment, all goes with it, or has gone before, that was last used by then.
That moment is `since`: whatever the host has not used since is in its cache no more. A block's own use may be later than its
storing, so this never says too early that something is gone, but for what was begun within SLACK_S of it.

Batches are numbered. A number that does not follow was missed: it is asked for again at the replay endpoint, and where that does not have
it, what is known of the cache is only approximate, until all that may have been missed has been evicted. A number that begins anew is
another engine's, whose cache is empty.

The wire, as SGLang 0.5.23 writes it (disaggregation/kv_events.py): topic, number (8 bytes, big-endian), msgpack of `[ts, events, rank]`;
a replay is asked for with the first number, and ends with -1.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from gateway.errors import ConfigError
from gateway.wire import address

if TYPE_CHECKING:
    import zmq.asyncio

log = logging.getLogger("penstock.kv_events")

# Blocks of which it is remembered when they were stored; at 64 tokens a block more than any host keeps, at one token (on a CPU) enough.
MAX_BLOCKS = 500_000
# An answer begins a moment before or after its blocks are told of.
SLACK_S = 0.25
REPLAY_S = 5.0
# Messages that wait to be read; what is beyond is lost, and seen to be by its number.
_QUEUE = 100_000
_END = -1
# Tiers of HiCache: a block is gone when it has left all of them.
_TIERS = {None: 1, "GPU": 1, "CPU_PINNED": 2, "DISK": 4, "EXTERNAL": 8}


def check_url(value: str) -> None:
    """Raises ValueError for what is no endpoint."""
    address.check_url(value, ("tcp",))
    if urlsplit(value).port is None:
        raise ValueError("has no port")


def problems(events: str | None, replay: str | None, resolve: str | None) -> Iterator[ConfigError]:
    """What is wrong with a host's settings of these."""
    if events is not None and resolve is not None:
        yield ConfigError("kv_events", "belongs to a host with an address of its own")
    if replay is not None and events is None:
        yield ConfigError("kv_replay", "does nothing without kv_events")


class Event(msgspec.Struct):
    """What is read of an event, whichever it is."""

    type: str
    block_hashes: list[int] = []
    medium: str | None = None


class Batch(msgspec.Struct, array_like=True):
    """One message."""

    ts: float
    events: list[Event]


_decoder = msgspec.msgpack.Decoder(Batch)


class Cache:
    """What is known of one engine's cache; no I/O, the clock is passed in (monotonic seconds)."""

    def __init__(self, most_blocks: int = MAX_BLOCKS) -> None:
        self._most = most_blocks
        # Block -> when it was stored, and the tiers that it is in.
        self._stored: OrderedDict[int, tuple[float, int]] = OrderedDict()
        self._last: int | None = None
        # What the host has not used since then is in its cache no more.
        self.since = 0.0
        # Until everything of that time is evicted, something may have left the cache unnoticed.
        self._missed_at = 0.0
        self.evicted = 0
        self.missed = 0

    @property
    def precise(self) -> bool:
        """Whether all that leaves the cache is known to."""
        return self._missed_at <= self.since

    def missing(self, number: int) -> int | None:
        """The first number of a gap before this message, None where there is none."""
        follows = 0 if self._last is None else self._last + 1
        return follows if number > follows else None

    def take(self, number: int, payload: bytes, now: float) -> None:
        """The next message, whatever came before. Raises msgspec.DecodeError."""
        batch = _decoder.decode(payload)
        if self._last is not None and number <= self._last:
            self.lost(now)  # another engine has begun to count
        if (first := self.missing(number)) is not None:
            # What was before the first one that was heard is before anything that is expected, but for a moment.
            self.missed += number - first if self._last is not None else 0
            self._missed_at = now + SLACK_S
        self._last = number
        for event in batch.events:
            if event.type == "BlockStored":
                self._store(event, now)
            elif event.type == "BlockRemoved":
                self._remove(event)
            elif event.type == "AllBlocksCleared":
                self._clear(now)

    def _store(self, event: Event, now: float) -> None:
        stored, tier = self._stored, _TIERS.get(event.medium, 1)
        for block in event.block_hashes:
            at, tiers = stored.get(block, (now, 0))
            stored[block] = at, tiers | tier
        while len(stored) > self._most:
            stored.popitem(last=False)

    def _remove(self, event: Event) -> None:
        stored, tier = self._stored, _TIERS.get(event.medium, 1)
        for block in event.block_hashes:
            if block not in stored:
                continue
            at, tiers = stored[block]
            if tiers & ~tier:
                stored[block] = at, tiers & ~tier
                continue
            del stored[block]
            self.evicted += 1
            self.since = max(self.since, at + SLACK_S)

    def lost(self, now: float) -> None:
        """Whoever is heard next may be another engine, with an empty cache."""
        self._last = None
        self._clear(now)

    def _clear(self, now: float) -> None:
        self.evicted += len(self._stored)
        self._stored.clear()
        self.since = now


class Subscription:
    """The events of one host, heard for as long as `run` does."""

    def __init__(self, host: str, endpoint: str, replay: str | None) -> None:
        self.cache = Cache()
        self._host = host
        self._endpoint = endpoint
        self._replay = replay
        # Whether anything has been heard.
        self.heard = False

    async def run(self) -> None:
        """Listen; ZeroMQ connects again by itself."""
        import zmq.asyncio  # which only those with events have to spend time on

        context = zmq.asyncio.Context()
        try:
            with context.socket(zmq.SUB) as socket:
                socket.setsockopt(zmq.LINGER, 0)
                socket.setsockopt(zmq.RCVHWM, _QUEUE)
                socket.subscribe(b"")
                socket.connect(self._endpoint)
                while True:
                    _, number, payload = await socket.recv_multipart()
                    await self._heard(context, int.from_bytes(number, "big"), payload)
        finally:
            context.destroy(linger=0)

    async def _heard(self, context: zmq.asyncio.Context, number: int, payload: bytes) -> None:
        cache = self.cache
        self.heard = True
        first = cache.missing(number)
        if first is not None and self._replay is not None:
            try:
                async with asyncio.timeout(REPLAY_S):
                    await self._again(context, first, number)
            except TimeoutError:
                log.warning("%s does not say again what its cache has done: no answer at %s", self._host, self._replay)
        before = cache.missed
        cache.take(number, payload, time.monotonic())
        if cache.missed > before:
            missed = cache.missed - before
            log.warning("%d KV events of %s were missed: what it has cached is known approximately for a while", missed, self._host)

    async def _again(self, context: zmq.asyncio.Context, first: int, until: int) -> None:
        """Take what was missed from the replay endpoint."""
        import zmq

        assert self._replay is not None
        with context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(self._replay)
            await socket.send_multipart((b"", first.to_bytes(8, "big")))
            while True:
                _, _, number, payload = await socket.recv_multipart()
                again = int.from_bytes(number, "big", signed=True)
                if again == _END or again >= until:
                    return
                self.cache.take(again, payload, time.monotonic())
