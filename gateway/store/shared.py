"""Limits that several workers and gateways keep together, in Redis, and what holds while Redis is gone.

One pipeline is under way at a time; what comes up meanwhile goes with the next, so that under load many decisions share a round trip. No
request waits longer than `store_timeout_ms`: the first that would have to flips the store to *failed*, where nobody waits, until it answers
again. What is owed to it meanwhile (the ledger, budgets) is kept, and written when it is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from gateway.access import ledger
from gateway.access.keys import Keys, StoredKey
from gateway.access.limits.memory import NOTHING_ASKED, Memory
from gateway.access.limits.rules import LEASE_S, QUOTA, RATE, SECOND, SLOTS, Ask, Decision, Lease, Limit, Row, State, StoreFailed
from gateway.config import Redis, Settings
from gateway.store.connect import FAILURES, Client, Script
from gateway.telemetry import ring as records
from gateway.telemetry.metrics import LOST, STORE_FAILURES, STORE_LATENCY, STORE_UP, Metrics
from gateway.telemetry.record import Record

log = logging.getLogger("penstock.store")

# Leases are renewed four times before they would expire; a store that has failed is asked oftener whether it is back.
BEAT_S, ASK_AGAIN_S = LEASE_S / 4, 0.5
# A revoked key stops working within twice this.
KEYS_S = 0.75
# What nobody waits for may gather for so long.
GATHER_S = 0.005
# A timer that fires because this process was busy is no sign of the store's: its answer may lie unread.
_GRACE_S = 0.002
_JOIN = "\x1f"
# What happened to so many requests of the deployment is kept, a few kilobytes each; of one gateway so many may wait for it.
REMEMBERED, _UNTOLD = 5000, 1000
_pack = msgspec.msgpack.Encoder().encode


class Owed:
    """What the store is to be told and nobody waits for, added up for each limit."""

    def __init__(self) -> None:
        self.rates: dict[str, float] = {}
        self.slots: dict[str, list[str]] = {}
        self.quotas: dict[str, tuple[float, float]] = {}
        self.open: dict[str, int] = {}
        self.rows: ledger.Rows = {}

    def __bool__(self) -> bool:
        return bool(self.rows or self.open or self.rates or self.slots or self.quotas)


class Shared:
    """The store in Redis of one worker. `now`: microseconds for the scripts, 0 for the server's own clock (tests have another)."""

    def __init__(self, settings: Settings, keys: Keys, metrics: Metrics, now: float = 0.0) -> None:
        self._settings: Redis = settings.redis
        self._keep_s = settings.limits.keep_days * 86400
        self._days = ledger.Days(settings.limits.timezone)
        self._keys = keys
        self._metrics = metrics
        self.now = now
        self._client = Client(settings.redis)
        self._admit, self._settle, self._beat, self._bury = (Script(name) for name in ("admit", "settle", "beat", "bury"))
        self._remember = Script("remember")
        self._me = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._open_key = self._client.key("open", self._me)
        self._done_key = self._client.key("done")
        self._memory = Memory()
        self._limit_keys: dict[str, bytes] = {}
        self._known: dict[str, tuple[Limit, State, float]] = {}
        self._up = False
        self._gateways = 1
        self._waiting: list[tuple[Lease, asyncio.Future[Decision]]] = []
        self._owed = Owed()
        self._untold: deque[Record] = deque(maxlen=_UNTOLD)
        self._batch = 0
        self._unsure: tuple[Script, list[bytes], list[Any]] | None = None
        self._open: dict[str, int] = {}
        self._held: dict[str, set[str]] = {}
        self._busy = False
        self._timer: asyncio.TimerHandle | asyncio.Handle | None = None
        self._flushing: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._keys_version: object = None

    async def open(self) -> None:
        """Ask whether it is there; a store that is not keeps nobody from starting."""
        self._loop = asyncio.get_running_loop()
        self._metrics.put(STORE_UP, 0.0)
        try:
            await self._live()
            await self._read_keys()
        except FAILURES as error:
            self._fail(error)
        self._tasks = [self._loop.create_task(self._live_forever()), self._loop.create_task(self._keys_forever())]

    async def aclose(self) -> None:
        """Write what is owed, and leave the company of the gateways."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        with contextlib.suppress(*FAILURES):
            async with asyncio.timeout(2.0):
                if self._busy and self._flushing is not None:
                    await self._flushing
                await self._flush()
                await self._client.run([(self._beat, *self._heartbeat(0.0))])
                await self._bury_them([self._me])
        await self._client.aclose()

    # Decisions

    async def admit(self, lease: Lease) -> Decision:
        """See `Store`."""
        if not self._up:
            return self._alone(lease)
        if not lease.asks:
            lease.local = False
            self._hold(lease)
            self._owed.open[lease.place] = self._owed.open.get(lease.place, 0) + 1
            self._soon(GATHER_S)
            return NOTHING_ASKED
        future: asyncio.Future[Decision] = self._loop.create_future()
        self._waiting.append((lease, future))
        self._soon(0.0)
        timer = self._loop.call_later(self._settings.store_timeout_ms / 1000, self._late, future)
        try:
            return await future
        except StoreFailed:
            return self._alone(lease)
        except asyncio.CancelledError:
            # It may have been granted in the same moment; then nobody will ever settle it.
            if future.done() and not future.cancelled() and future.exception() is None and future.result().refused is None:
                self._let_go(lease)
                self._give_back(lease)
            raise
        finally:
            timer.cancel()

    def _late(self, future: asyncio.Future[Decision]) -> None:
        self._loop.call_later(_GRACE_S, self._too_late, future)

    def _too_late(self, future: asyncio.Future[Decision]) -> None:
        if not future.done():
            self._fail(f"no answer within {self._settings.store_timeout_ms:g} ms")

    def _alone(self, lease: Lease) -> Decision:
        """Without the store, as the operator has chosen."""
        if self._settings.on_store_failure == "closed":
            raise StoreFailed
        lease.local = True
        decision = self._memory.decide(lease.asks) if self._settings.on_store_failure == "local" else NOTHING_ASKED
        if decision.refused is None:
            self._hold(lease)
        return decision

    def _decided(self, lease: Lease, future: asyncio.Future[Decision], answer: list[Any]) -> None:
        refused, longest = int(answer[0]), float(answer[1])
        states = list(zip(answer[2::2], answer[3::2], strict=True))
        now = self._loop.time()
        for ask, state in zip(lease.asks, states, strict=True):
            self._known[ask.key] = (ask.limit, state, now)
        if future.done():  # its client has left, or it went on without us
            if not refused:
                self._give_back(lease)
            return
        lease.local = False
        if not refused:
            self._hold(lease)
        future.set_result(Decision(lease.asks[refused - 1].limit if refused else None, longest, states))

    def _hold(self, lease: Lease) -> None:
        field = lease.place
        self._open[field] = self._open.get(field, 0) + 1
        for ask in lease.asks:
            if ask.limit.kind == SLOTS:
                self._held.setdefault(ask.key, set()).add(lease.id)

    def _let_go(self, lease: Lease) -> None:
        """The reverse of `_hold`."""
        self._open[lease.place] -= 1
        if not self._open[lease.place]:
            del self._open[lease.place]
        for ask in lease.asks:
            if ask.limit.kind == SLOTS:
                self._held[ask.key].discard(lease.id)
                if not self._held[ask.key]:
                    del self._held[ask.key]

    # Settlement

    def settle(self, lease: Lease, costs: Sequence[float], row: Row) -> None:
        """See `Store`."""
        field = lease.place
        self._let_go(lease)
        ledger.add(self._owed.rows, row)
        if self._up or not lease.local:
            self._owed.open[field] = self._owed.open.get(field, 0) - 1
        if lease.local:
            self._memory.correct(lease.asks, costs)
        shared = self._up or not lease.local
        slots = False
        for ask, cost in zip(lease.asks, costs, strict=True):
            kind = ask.limit.kind
            if kind == SLOTS:
                if shared:
                    slots = True
                    self._owed.slots.setdefault(ask.key, []).append(lease.id)
            elif kind == QUOTA:
                # What was used while the store was gone counts when it is back.
                self._owe_quota(ask, cost - (0.0 if lease.local else ask.cost))
            elif not lease.local and cost != ask.cost:
                self._owe_rate(ask, cost - ask.cost)
        # Whoever waits for a slot, at whatever gateway, waits for this.
        self._soon(0.0 if slots else GATHER_S)

    def _owe_rate(self, ask: Ask, more: float) -> None:
        self._owed.rates[ask.key] = self._owed.rates.get(ask.key, 0.0) + more * ask.limit.interval

    def _owe_quota(self, ask: Ask, more: float) -> None:
        if more:
            self._owed.quotas[ask.key] = (self._owed.quotas.get(ask.key, (0.0, 0.0))[0] + more, ask.ends_s)

    def _give_back(self, lease: Lease) -> None:
        """All of it, as if it had not been asked."""
        self._owed.open[lease.place] = self._owed.open.get(lease.place, 0) - 1
        for ask in lease.asks:
            if ask.limit.kind == SLOTS:
                self._owed.slots.setdefault(ask.key, []).append(lease.id)
            elif ask.limit.kind == QUOTA:
                self._owe_quota(ask, -ask.cost)
            else:
                self._owe_rate(ask, -ask.cost)
        self._soon(0.0)

    def remember(self, record: Record) -> None:
        """What happened to a request, for whoever asks at whatever gateway; while the store is gone the oldest are forgotten."""
        self._untold.append(record)
        self._soon(GATHER_S)

    def _memories(self) -> tuple[Script, list[bytes], list[Any]]:
        told: list[Any] = [REMEMBERED]
        while self._untold:
            record = self._untold.popleft()
            told.append([record.call_id, record.request_id, time.time(), msgspec.json.encode(records.summary(record)).decode()])
        return self._remember, [self._client.key("requests", part) for part in ("records", "times", "ids")], [_pack(told)]

    def _settlement(self, owed: Owed) -> tuple[Script, list[bytes], list[Any]]:
        keys: dict[bytes, int] = {self._done_key: 1}
        self._batch += 1
        operations: list[Any] = [self.now, self._me, self._batch]

        def place(key: bytes) -> int:
            return keys.setdefault(key, len(keys) + 1)

        for key, more in owed.rates.items():
            operations.append([RATE, place(self._limit_key(key)), more])
        for key, ids in owed.slots.items():
            operations.append([SLOTS, place(self._limit_key(key)), *ids])
        for key, (more, ends_s) in owed.quotas.items():
            operations.append([QUOTA, place(self._limit_key(key)), more, ends_s])
        if open_now := [part for field, count in owed.open.items() if count for part in (field, count)]:
            operations.append([4, place(self._open_key), 86400, *open_now])
        for (day, key, model), counts in owed.rows.items():
            named = [part for column, count in counts.items() for part in (f"{key}{_JOIN}{model}{_JOIN}{column}", count)]
            operations.append([4, place(self._client.key("usage", day)), self._keep_s, *named])
        return self._settle, list(keys), [_pack(operations)]

    def _limit_key(self, key: str) -> bytes:
        found = self._limit_keys.get(key)
        if found is None:
            if len(self._limit_keys) > 10_000:  # quotas have other keys every day
                self._limit_keys.clear()
            found = self._limit_keys[key] = self._client.key("limit", key)
        return found

    # The one pipeline

    def _soon(self, delay_s: float) -> None:
        if not self._up or self._busy:
            return
        if self._timer is not None:
            if delay_s or not isinstance(self._timer, asyncio.TimerHandle):
                return
            self._timer.cancel()
        self._timer = self._loop.call_later(delay_s, self._begin) if delay_s else self._loop.call_soon(self._begin)

    def _begin(self) -> None:
        self._timer = None
        if self._up and not self._busy:
            self._flushing = self._loop.create_task(self._flush())

    async def _flush(self) -> None:
        """Until there is nothing more to say."""
        self._busy = True
        try:
            await self._say_all()
        finally:
            self._busy = False

    async def _say_all(self) -> None:
        while self._waiting or self._owed or self._untold or self._unsure is not None:
            waiting, self._waiting = self._waiting, []
            commands: list[tuple[Script, list[bytes], list[Any]]] = []
            if self._unsure is not None:
                commands.append(self._unsure)  # whether it was done is not known here; the script knows
            elif self._owed:
                owed, self._owed = self._owed, Owed()
                commands.append(self._settlement(owed))
            self._unsure = commands[0] if commands else None
            first = len(commands)
            # After the decisions, which somebody waits for; what is lost with a connection here is lost.
            memories = [self._memories()] if self._untold else []
            commands += [self._question(lease) for lease, _ in waiting]
            commands += memories
            began = self._loop.time()
            try:
                answers = await self._client.run(commands)
            except FAILURES as error:
                self._waiting = waiting + self._waiting
                self._fail(error)
                return
            self._unsure = None
            self._metrics.observe(STORE_LATENCY, (), self._loop.time() - began)
            for (lease, future), answer in zip(waiting, answers[first : first + len(waiting)], strict=True):
                self._decided(lease, future, answer)

    def _question(self, lease: Lease) -> tuple[Script, list[bytes], list[Any]]:
        numbers: list[Any] = [self.now, lease.id, LEASE_S * SECOND, lease.place]
        for ask in lease.asks:
            limit = ask.limit
            numbers += (limit.kind, limit.interval or limit.amount, limit.tolerance or ask.ends_s, ask.cost)
        return self._admit, [self._open_key, *(self._limit_key(ask.key) for ask in lease.asks)], [_pack(numbers)]

    # Being there, and not

    def _fail(self, reason: object) -> None:
        if self._up or not self._tasks:
            log.error("the shared store has failed (%s): limits are now %s", reason, self._settings.on_store_failure)
            self._metrics.add(STORE_FAILURES)
            self._metrics.put(STORE_UP, 0.0)
        if self._up:
            self._memory.forget()
            self._memory.share = 1.0 / max(1, self._gateways)
            for key, (limit, (remaining, reset), at) in self._known.items():
                self._memory.know(key, limit, (remaining, reset - (self._loop.time() - at) * SECOND))
            self._known.clear()
        self._up = False
        waiting, self._waiting = self._waiting, []
        for _, future in waiting:
            if not future.done():
                future.set_exception(StoreFailed())

    async def _live_forever(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S if self._up else ASK_AGAIN_S)
            try:
                await self._live()
            except FAILURES as error:
                self._fail(error)

    async def _live(self) -> None:
        """Tell that we are there and what we hold; whoever is not any more is buried."""
        if self._busy and self._flushing is not None:  # what we hold is only known when nothing is being decided
            await asyncio.wait([self._flushing])
        self._busy = True
        try:
            answer = (await self._client.run([(self._beat, *self._heartbeat(LEASE_S * SECOND))]))[0]
        finally:
            self._busy = False
        self._gateways = int(answer[0])
        if not self._up:
            self._up = True
            self._metrics.put(STORE_UP, 1.0)
            if self._tasks:
                log.warning("the shared store is back")
        self._soon(0.0)
        await self._bury_them([name.decode() for name in answer[1:]])

    def _heartbeat(self, length: float) -> tuple[list[bytes], list[Any]]:
        slots = list(self._held.items())
        keys = [self._client.key("gateways"), self._open_key, *(self._limit_key(key) for key, _ in slots)]
        opened = [part for item in self._open.items() for part in item]
        return keys, [_pack([self._me, length, opened, *(list(ids) for _, ids in slots)])]

    async def _bury_them(self, dead: Sequence[str]) -> None:
        day = self._days.at(time.time())["day"][0]
        for name in dead:
            keys = [self._client.key("gateways"), self._client.key("open", name), self._client.key("usage", day), self._done_key]
            lost = (await self._client.run([(self._bury, keys, [name, self._keep_s, f"{_JOIN}lost"])]))[0]
            if lost:
                self._metrics.add(LOST, amount=float(lost))
                log.error("gateway %s has died with %d requests open; they are in the ledger as lost", name, lost)

    # Keys that were made while the gateway runs

    async def _keys_forever(self) -> None:
        while True:
            await asyncio.sleep(KEYS_S)
            with contextlib.suppress(*FAILURES):
                await self._read_keys()

    async def _read_keys(self) -> None:
        version = await self._client.execute("GET", self._client.key("keys", "version"))
        if version != self._keys_version or not self._keys_version:
            found = await self._client.execute("HGETALL", self._client.key("keys"))
            self._keys.learn(stored(found))
            self._keys_version = version


def stored(found: Any) -> dict[str, StoredKey]:
    """Stored keys as Redis gives them; one that cannot be read (a later version's) is left out."""
    items = found.items() if isinstance(found, dict) else zip(found[::2], found[1::2], strict=True)
    keys: dict[str, StoredKey] = {}
    for name, content in items:
        try:
            keys[name.decode()] = msgspec.json.decode(content, type=StoredKey)
        except msgspec.DecodeError as error:
            log.error("the stored key '%s' cannot be read: %s", name.decode(), error)
    return keys
