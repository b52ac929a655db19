"""Decisions of the store, and what holds in their place while it is down. No request waits for one longer than `store_timeout_ms`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from gateway.access import ledger
from gateway.access.limits.memory import NOTHING_ASKED, Memory
from gateway.access.limits.rules import LEASE_S, QUOTA, SECOND, SLOTS, Decision, Lease, Limit, Row, State, StoreFailed
from gateway.config import Redis
from gateway.store.connect import Client, Command, Script
from gateway.store.leases import Leases
from gateway.store.membership import Membership
from gateway.store.pipeline import Pipeline
from gateway.store.writes import PendingWrites

log = logging.getLogger("penstock.store")

# What nobody waits for may gather for so long.
GATHER_S = 0.005
# A timer that fires because this process was busy is no sign of the store's: its answer may lie unread.
_GRACE_S = 0.002
# So many limits' keys and last known states are remembered: quotas have other keys every day.
_REMEMBERED = 10_000
_pack = msgspec.msgpack.Encoder().encode


class _Asked(NamedTuple):
    lease: Lease
    future: asyncio.Future[Decision]


class Limits:
    """A part of the pipeline: admits and settles."""

    def __init__(
        self,
        settings: Redis,
        client: Client,
        pipeline: Pipeline,
        membership: Membership,
        leases: Leases,
        writes: PendingWrites,
        now: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._client = client
        self._pipeline = pipeline
        self._membership = membership
        self._leases = leases
        self._writes = writes
        self._now = now
        self._script = Script("admit")
        self._open_key = client.key("open", membership.me)
        self._keys: dict[str, bytes] = {}
        # How limits stood when the store last said so, and when that was.
        self._known: dict[str, tuple[Limit, State, float]] = {}
        self._memory = Memory()
        self._waiting: list[_Asked] = []
        self._sent: list[_Asked] = []
        self._refused_said: set[str] = set()

    async def admit(self, lease: Lease) -> Decision:
        """See `Store`."""
        if not self._pipeline.up:
            return self._alone(lease)
        if not lease.asks:
            lease.local = False
            self._leases.add(lease)
            self._writes.open(lease, 1)
            self._pipeline.soon(GATHER_S)
            return NOTHING_ASKED
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Decision] = loop.create_future()
        self._waiting.append(_Asked(lease, future))
        self._pipeline.soon()
        timer = loop.call_later(self._settings.store_timeout_ms / 1000, self._late, future)
        try:
            return await future
        except StoreFailed:
            return self._alone(lease)
        except asyncio.CancelledError:
            # It may have been granted in the same moment; then nobody will ever settle it.
            if lease in self._leases:
                self._leases.remove(lease)
                self._give_back(lease)
            raise
        finally:
            timer.cancel()

    def _late(self, future: asyncio.Future[Decision]) -> None:
        asyncio.get_running_loop().call_later(_GRACE_S, self._too_late, future)

    def _too_late(self, future: asyncio.Future[Decision]) -> None:
        if not future.done():
            self._pipeline.fail(f"no answer within {self._settings.store_timeout_ms:g} ms")

    def _alone(self, lease: Lease) -> Decision:
        """Without the store, as the operator has chosen."""
        if self._settings.on_store_failure == "closed":
            raise StoreFailed
        lease.local = True
        decision = self._memory.decide(lease.asks) if self._settings.on_store_failure == "local" else NOTHING_ASKED
        if decision.refused is None:
            self._leases.add(lease)
        return decision

    def _give_back(self, lease: Lease) -> None:
        self._writes.give_back(lease)
        self._pipeline.soon()

    def settle(self, lease: Lease, costs: Sequence[float], row: Row) -> None:
        """See `Store`."""
        self._leases.remove(lease)
        ledger.add(self._writes.rows, row)
        # Whether the store knows of it.
        shared = self._pipeline.up or not lease.local
        if shared:
            self._writes.open(lease, -1)
        if lease.local:
            self._memory.correct(lease.asks, costs)
        slots = False
        for ask, cost in zip(lease.asks, costs, strict=True):
            kind = ask.limit.kind
            if kind == SLOTS:
                if shared:
                    slots = True
                    self._writes.slot(ask, lease)
            elif kind == QUOTA:
                # What was used while the store was gone counts when it is back.
                self._writes.quota(ask, cost - (0.0 if lease.local else ask.cost))
            elif not lease.local and cost != ask.cost:
                self._writes.rate(ask, cost - ask.cost)
        # Whoever waits for a slot, at whatever gateway, waits for this.
        self._pipeline.soon(0.0 if slots else GATHER_S)

    def pending(self) -> bool:
        """See `Part`."""
        return bool(self._waiting)

    def take(self) -> list[Command]:
        """See `Part`."""
        self._sent, self._waiting = self._waiting, []
        return [self._question(lease) for lease, _ in self._sent]

    def _question(self, lease: Lease) -> Command:
        numbers: list[Any] = [self._now(), lease.id, LEASE_S * SECOND, lease.ledger_row]
        for ask in lease.asks:
            limit = ask.limit
            numbers += (limit.kind, limit.interval or limit.amount, limit.tolerance or ask.ends_s, ask.cost)
        return Command(self._script, [self._open_key, *(self._limit_key(ask.key) for ask in lease.asks)], [_pack(numbers)])

    def _limit_key(self, key: str) -> bytes:
        found = self._keys.get(key)
        if found is None:
            if len(self._keys) > _REMEMBERED:
                self._keys.clear()
            found = self._keys[key] = self._client.key("limit", key)
        return found

    def answered(self, answers: Sequence[Any]) -> None:
        """See `Part`."""
        now = asyncio.get_running_loop().time()
        for (lease, future), answer in zip(self._sent, answers, strict=True):
            if isinstance(answer, Exception):
                self._refused(lease, answer)
                if not future.done():
                    future.set_exception(answer)
            else:
                self._decided(lease, future, answer, now)
        self._sent = []

    def _refused(self, lease: Lease, error: Exception) -> None:
        """One value in the store is not ours: said once for each row of the ledger that meets with it."""
        if lease.ledger_row not in self._refused_said and len(self._refused_said) < _REMEMBERED:
            self._refused_said.add(lease.ledger_row)
            log.error(
                "the limits %s cannot be kept in the store (%s): they are now %s",
                ", ".join(ask.key for ask in lease.asks), error, self._settings.on_store_failure,
            )  # fmt: skip

    def _decided(self, lease: Lease, future: asyncio.Future[Decision], answer: list[Any], now: float) -> None:
        refused, longest = int(answer[0]), float(answer[1])
        states = list(zip(answer[2::2], answer[3::2], strict=True))
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        for ask, state in zip(lease.asks, states, strict=True):
            self._known[ask.key] = (ask.limit, state, now)
        if future.done():  # its client has left, or it went on without us
            if not refused:
                self._give_back(lease)
            return
        lease.local = False
        if not refused:
            self._leases.add(lease)
        future.set_result(Decision(lease.asks[refused - 1].limit if refused else None, longest, states))

    def lost(self) -> None:
        """See `Part`."""
        now = asyncio.get_running_loop().time()
        self._memory.forget()
        self._memory.share = 1.0 / max(1, self._membership.gateways)
        for key, (limit, (remaining, reset), at) in self._known.items():
            self._memory.know(key, limit, (remaining, reset - (now - at) * SECOND))
        for _, future in (*self._sent, *self._waiting):
            if not future.done():
                future.set_exception(StoreFailed())
        self._waiting = []
