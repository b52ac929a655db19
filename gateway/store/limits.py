"""Decisions of the store, and what holds in their place while it does not answer. A request waits for its turn and for its round, for each
of them `store_timeout_ms` at most.

What is admitted here is charged to the shared limits as soon as the store answers: rates as if it had been asked for there at its time
(`charges.py`), quotas when it is settled, slots by the next heartbeat.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from gateway.access import ledger
from gateway.access.limits.memory import NOTHING_ASKED, Memory, microseconds
from gateway.access.limits.rules import LEASE_S, QUOTA, SECOND, SLOTS, Ask, Decision, Lease, Limit, Row, State, StoreFailed
from gateway.config import Redis
from gateway.store.connect import Client, Command, Script
from gateway.store.leases import Leases
from gateway.store.membership import Membership
from gateway.store.pipeline import Pipeline
from gateway.store.writes import PendingWrites

log = logging.getLogger("penstock.store")

# What nobody waits for may gather for so long.
GATHER_S = 0.005
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
        self._choice = settings.on_store_failure
        self._timeout_s = settings.store_timeout_ms / 1000
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
        # What holds while the store does not answer, from `_known` on; begun anew with each outage.
        self._memory = Memory()
        self._memory_of = 0
        self._waiting: list[_Asked] = []
        self._sent: list[_Asked] = []
        self._said: set[str] = set()
        pipeline.on_late = self._late

    async def admit(self, lease: Lease) -> Decision:
        """See `Store`."""
        pipeline = self._pipeline
        if not pipeline.up or (pipeline.late and self._choice != "closed"):
            return self._alone(lease)
        if not lease.asks:
            self._leases.add(lease)
            self._writes.open(lease, 1)
            pipeline.soon(GATHER_S)
            return NOTHING_ASKED
        future: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Asked(lease, future))
        pipeline.soon()
        if pipeline.late:
            self._bound(future)
        try:
            return await future
        except asyncio.CancelledError:
            # It may have been granted in the same moment; then nobody will ever settle it.
            if lease in self._leases:
                self._undo(lease)
            raise

    def _late(self) -> None:
        """Whoever waits for the round under way is decided here, and whoever waits for its turn behind it; but where nobody may be, the
        latter have as long again."""
        for asked in self._sent:
            self._decide_here(asked)
        if self._choice == "closed":
            for _, future in self._waiting:
                self._bound(future)
            return
        waiting, self._waiting = self._waiting, []
        for asked in waiting:
            self._decide_here(asked)

    def _bound(self, future: asyncio.Future[Decision]) -> None:
        asyncio.get_running_loop().call_later(self._timeout_s, _give_up, future)

    def _decide_here(self, asked: _Asked) -> None:
        if not asked.future.done():
            try:
                asked.future.set_result(self._alone(asked.lease))
            except StoreFailed as error:
                asked.future.set_exception(error)

    # Without the store

    def _alone(self, lease: Lease) -> Decision:
        """As the operator has chosen. Raises StoreFailed."""
        if self._choice == "closed":
            raise StoreFailed("it does not answer")
        lease.outage = self._writes.charges.number
        decision = NOTHING_ASKED
        if self._choice == "local":
            self._recall(lease.asks)
            decision = self._memory.decide(lease.asks)
        if decision.refused is None:
            self._leases.add(lease)
            self._writes.charges.add(lease.asks, microseconds())
            self._pipeline.soon(GATHER_S)
        return decision

    def _recall(self, asks: Sequence[Ask]) -> None:
        """What was last known of these limits, where they are not kept here yet; and what this worker holds of their slots."""
        if self._memory_of != self._pipeline.outages:
            self._memory_of = self._pipeline.outages
            self._memory.forget()
        self._memory.share = 1.0 / max(1, self._membership.gateways)
        now = asyncio.get_running_loop().time()
        for ask in asks:
            key, limit = ask.key, ask.limit
            if limit.kind == SLOTS:
                self._memory.know(key, limit, (limit.amount - len(self._leases.slots.get(key, ())), 0.0))
            elif not self._memory.knows(key) and key in self._known:
                _, (remaining, reset), at = self._known[key]
                self._memory.know(key, limit, (remaining, reset - (now - at) * SECOND))

    # Settlement

    def settle(self, lease: Lease, costs: Sequence[float], row: Row) -> None:
        """See `Store`."""
        ledger.add(self._writes.rows, row)
        slots = self._end(lease, costs)
        # Whoever waits for a slot, at whatever gateway, waits for this.
        self._pipeline.soon(0.0 if slots else GATHER_S)

    async def peek(self, asks: Sequence[Ask]) -> Sequence[State]:
        """See `Store`."""
        free = [Ask(ask.key, ask.limit, 0.0, ask.ends_s) for ask in asks]
        if self._pipeline.up and not self._pipeline.late:
            lease = Lease("", "", "", free)
            lease.ledger_row = ""  # nothing is open by it
            answer = (await self._client.run([self._question(lease)]))[0]
            if isinstance(answer, Exception):
                raise answer
            return list(zip(answer[2::2], answer[3::2], strict=True))
        if self._choice != "local":
            raise StoreFailed("it does not answer")
        self._recall(free)
        return self._memory.decide(free).states

    def count(self, row: Row) -> None:
        """See `Store`."""
        ledger.add(self._writes.rows, row)
        self._pipeline.soon(GATHER_S)

    def _undo(self, lease: Lease) -> None:
        """As if it had not been asked."""
        self._end(lease, [0.0] * len(lease.asks))
        self._pipeline.soon()

    def _end(self, lease: Lease, costs: Sequence[float]) -> bool:
        """A lease has ended; whether the store hears of a slot that is free."""
        self._leases.remove(lease)
        answers = self._pipeline.up and not self._pipeline.late
        here = lease.outage is not None
        charged = lease.outage != self._writes.charges.number
        if answers:  # else the next heartbeat says what is open
            self._writes.open(lease, -1)
        if self._choice == "local" and (here or not answers):
            self._recall(lease.asks)
            self._memory.correct(lease.asks, costs)
        slots = False
        for ask, cost in zip(lease.asks, costs, strict=True):
            kind = ask.limit.kind
            if kind == SLOTS:
                if answers or charged:  # else the store has never heard of it
                    slots = True
                    self._writes.slot(ask, lease)
            elif kind == QUOTA:
                self._writes.quota(ask, cost - (0.0 if here else ask.cost))
            elif not charged:
                self._writes.charges.correct(ask, cost, microseconds())
            elif cost != ask.cost:
                self._writes.rate(ask, cost - ask.cost)
        return slots

    # What the pipeline asks

    def pending(self) -> bool:
        """See `Part`."""
        return bool(self._waiting)

    def take(self) -> list[Command]:
        """See `Part`."""
        self._sent, self._waiting = [asked for asked in self._waiting if not asked.future.done()], []
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
        for asked, answer in zip(self._sent, answers, strict=True):
            if isinstance(answer, Exception):
                self._say(asked.lease, answer)
                self._decide_here(asked)
            else:
                self._decided(*asked, answer, now)
        self._sent = []

    def _say(self, lease: Lease, error: Exception) -> None:
        """One value in the store is not ours: said once for each row of the ledger that meets with it, until the store was down."""
        if lease.ledger_row not in self._said and len(self._said) < _REMEMBERED:
            self._said.add(lease.ledger_row)
            names = ", ".join(ask.key for ask in lease.asks)
            log.error("limits cannot be kept in the store and are now %s (%s): %s", self._choice, names, error)

    def _decided(self, lease: Lease, future: asyncio.Future[Decision], answer: list[Any], now: float) -> None:
        refused, longest = int(answer[0]), float(answer[1])
        states = list(zip(answer[2::2], answer[3::2], strict=True))
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        for ask, state in zip(lease.asks, states, strict=True):
            self._known[ask.key] = (ask.limit, state, now)
        if future.done():  # its client has left, or it was decided here: which counts, and may still hold its slots
            if not refused:
                self._writes.give_back(lease, still_open=lease in self._leases)
            return
        if not refused:
            self._leases.add(lease)
        future.set_result(Decision(lease.asks[refused - 1].limit if refused else None, longest, states))

    def lost(self) -> None:
        """See `Part`."""
        self._said.clear()
        waiting, self._waiting = self._waiting, []
        for asked in (*self._sent, *waiting):
            self._decide_here(asked)


def _give_up(future: asyncio.Future[Decision]) -> None:
    if not future.done():
        future.set_exception(StoreFailed("it does not answer in time"))
