"""Limits in this process: for one worker, and for a gateway whose shared store is gone.

The script `gateway/store/lua/admit.lua` is this algorithm again; a test holds the two against each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from gateway.limits.rules import SECOND, Ask, Decision, Kind, Lease, Limit, Row, State

# When to come again for a slot: nobody can know when one will be free.
SLOT_WAIT = SECOND
# So many states are kept before those that say nothing any more are thrown out.
_SWEEP_AT = 10_000


NOTHING_ASKED = Decision(None, 0.0, ())


def _microseconds() -> float:
    return time.monotonic() * SECOND


class Memory:
    """The store without I/O. `share` is this gateway's part of every limit, where several stand in for a shared store that is gone."""

    def __init__(self, count: Callable[[Row], None] = lambda row: None, now: Callable[[], float] = _microseconds) -> None:
        self._count = count
        self._now = now
        self.share = 1.0
        # Rates: when the bucket will be empty. Quotas: (used before, used since). Slots: how many are held.
        self._empty_at: dict[str, float] = {}
        self._used: dict[str, tuple[float, float]] = {}
        self._held: dict[str, int] = {}

    async def open(self) -> None:
        """Nothing to get ready."""

    async def aclose(self) -> None:
        """Nothing is owed."""

    def know(self, key: str, limit: Limit, state: State) -> None:
        """What is known of a limit from elsewhere: where a quota or a bucket stood."""
        if limit.kind is Kind.QUOTA:
            self._used[key] = (limit.amount - state.remaining, 0.0)
        elif limit.kind is Kind.RATE:
            self._empty_at[key] = self._now() + state.reset

    def used(self, quotas: Mapping[str, float]) -> None:
        """What quotas had used in an earlier life, by key with its period."""
        self._used.update({key: (0.0, used) for key, used in quotas.items()})

    async def admit(self, lease: Lease) -> Decision:
        """See `Store`."""
        return self.decide(lease.asks) if lease.asks else NOTHING_ASKED

    def decide(self, asks: Sequence[Ask]) -> Decision:
        """Every limit at once, or none."""
        now, share = self._now(), self.share
        refused: Limit | None = None
        longest = 0.0
        for ask in asks:
            wait = self._wait(ask, now, share)
            if wait > longest:
                refused, longest = ask.limit, wait
        states = [self._take(ask, now, share, refused is None) for ask in asks]
        return Decision(refused, longest, states)

    def _wait(self, ask: Ask, now: float, share: float) -> float:
        """How long until this limit would let it pass; a quota's end is taken for the longest of all."""
        limit = ask.limit
        if limit.kind is Kind.RATE:
            interval = limit.interval / share
            full_at = max(self._empty_at.get(ask.key, 0.0), now) + ask.cost * interval
            return full_at - now - max(limit.tolerance, interval)
        if limit.kind is Kind.SLOTS:
            return SLOT_WAIT if self._held.get(ask.key, 0) >= max(1, int(limit.amount * share)) else 0.0
        before, since = self._used.get(ask.key, (0.0, 0.0))
        return 1e18 + ask.ends_s if since + ask.cost > (limit.amount - before) * share else 0.0

    def _take(self, ask: Ask, now: float, share: float, granted: bool) -> State:
        limit, cost = ask.limit, ask.cost if granted else 0.0
        if limit.kind is Kind.RATE:
            interval = limit.interval / share
            empty_at = max(self._empty_at.get(ask.key, 0.0), now) + cost * interval
            if granted:
                self._sweep(now)
                self._empty_at[ask.key] = empty_at
            return State((max(limit.tolerance, interval) - (empty_at - now)) // interval, empty_at - now)
        if limit.kind is Kind.SLOTS:
            held = self._held.get(ask.key, 0) + granted
            if granted:
                self._held[ask.key] = held
            return State(max(1, int(limit.amount * share)) - held, 0.0)
        before, since = self._used.get(ask.key, (0.0, 0.0))
        if granted:
            self._used[ask.key] = (before, since + cost)
        return State((limit.amount - before) * share - since - cost, ask.ends_s * SECOND)

    def settle(self, lease: Lease, costs: Sequence[float], row: Row) -> None:
        """See `Store`."""
        if costs:
            self.correct(lease.asks, costs)
        self._count(row)

    def correct(self, asks: Sequence[Ask], costs: Sequence[float]) -> None:
        """The true costs instead of the estimates: what is over becomes debt, what is under comes back."""
        now = self._now()
        for ask, cost in zip(asks, costs, strict=True):
            more = cost - ask.cost
            if ask.limit.kind is Kind.SLOTS:
                left = self._held.pop(ask.key, 0) - 1
                if left > 0:
                    self._held[ask.key] = left
            elif more and ask.limit.kind is Kind.RATE:
                base = self._empty_at.get(ask.key, 0.0)
                self._empty_at[ask.key] = (max(base, now) if more > 0 else base) + more * ask.limit.interval / self.share
            elif more:
                before, since = self._used.get(ask.key, (0.0, 0.0))
                self._used[ask.key] = (before, max(0.0, since + more))

    def _sweep(self, now: float) -> None:
        """Empty buckets are as good as none."""
        if len(self._empty_at) > _SWEEP_AT:
            self._empty_at = {key: empty_at for key, empty_at in self._empty_at.items() if empty_at > now}

    def forget(self) -> None:
        """Begin anew."""
        self._empty_at.clear()
        self._used.clear()
        self._held.clear()
