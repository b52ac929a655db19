"""Limits in this process: for one worker, and for a gateway whose shared store is gone.

The script `gateway/store/lua/admit.lua` is this algorithm again; a test holds the two against each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from gateway.access.limits.rules import QUOTA, RATE, SECOND, SLOTS, Ask, Decision, Lease, Limit, Row, State

# When to come again for a slot: nobody can know when one will be free.
SLOT_WAIT: Final = SECOND
# So many states are kept before those that say nothing any more are thrown out.
_SWEEP_AT: Final = 10_000

NOTHING_ASKED = Decision(None, 0.0, ())
NOTHING_USED = (0.0, 0.0)


def microseconds() -> float:
    """Of the clock that only goes forward."""
    return time.monotonic() * SECOND


class Memory:
    """The store without I/O. `share` is this gateway's part of every limit, where several stand in for a shared store that is gone."""

    def __init__(self, count: Callable[[Row], None] = lambda row: None, now: Callable[[], float] = microseconds) -> None:
        self._count = count
        self._now = now
        self.share = 1.0
        # Rates: when the bucket will be empty. Quotas: (used before, used since). Slots: how many are held.
        self._empty_at: dict[str, float] = {}
        self._used: dict[str, tuple[float, float]] = {}
        self._held: dict[str, float] = {}

    async def open(self) -> None:
        """Nothing to get ready."""

    async def aclose(self) -> None:
        """Nothing is owed."""

    def know(self, key: str, limit: Limit, state: State) -> None:
        """What is known of a limit from elsewhere: where a quota or a bucket stood, how many slots are held."""
        remaining, reset = state
        if limit.kind == QUOTA:
            self._used[key] = (limit.amount - remaining, 0.0)
        elif limit.kind == RATE:
            self._empty_at[key] = self._now() + reset
        else:
            self._held[key] = int(limit.amount - remaining)

    def knows(self, key: str) -> bool:
        """Whether a bucket or a quota has a state here."""
        return key in self._empty_at or key in self._used

    def used(self, quotas: Mapping[str, float]) -> None:
        """What quotas had used in an earlier life, by key with its period."""
        self._used.update({key: (0.0, used) for key, used in quotas.items()})

    async def admit(self, lease: Lease) -> Decision:
        """See `Store`."""
        return self.decide(lease.asks) if lease.asks else NOTHING_ASKED

    def decide(self, asks: Sequence[Ask]) -> Decision:
        """Every limit at once, or none."""
        now, share, buckets = self._now(), self.share, self._empty_at
        refused: Limit | None = None
        longest = 0.0
        before: list[float] = []
        for ask in asks:
            limit, kind = ask.limit, ask.limit.kind
            if kind == RATE:
                stands = buckets.get(ask.key, 0.0)
                if stands < now:
                    stands = now
                interval = limit.interval / share
                wait = stands + ask.cost * interval - now - max(limit.tolerance, interval)
            elif kind == SLOTS:
                stands = self._held.get(ask.key, 0.0)
                wait = SLOT_WAIT if stands >= max(1, int(limit.amount * share)) else 0.0
            else:
                used, stands = self._used.get(ask.key, NOTHING_USED)
                # A quota's end is taken for the longest wait of all.
                wait = 1e18 + ask.ends_s if stands + ask.cost > (limit.amount - used) * share else 0.0
            before.append(stands)
            if wait > longest:
                refused, longest = limit, wait
        states: list[State] = []
        for number, ask in enumerate(asks):
            limit, kind, stands = ask.limit, ask.limit.kind, before[number]
            if refused is None:
                stands += ask.cost * (limit.interval / share) if kind == RATE else ask.cost
            if kind == RATE:
                interval = limit.interval / share
                if refused is None:
                    buckets[ask.key] = stands
                states.append(((max(limit.tolerance, interval) - stands + now) // interval, stands - now))
            elif kind == SLOTS:
                if refused is None:
                    self._held[ask.key] = stands
                states.append((max(1, int(limit.amount * share)) - stands, 0.0))
            else:
                used = self._used.get(ask.key, NOTHING_USED)[0]
                if refused is None:
                    self._used[ask.key] = (used, stands)
                states.append(((limit.amount - used) * share - stands, ask.ends_s * SECOND))
        if len(buckets) > _SWEEP_AT:
            self._sweep(now)
        return Decision(refused, longest, states)

    def settle(self, lease: Lease, costs: Sequence[float], row: Row) -> None:
        """See `Store`."""
        if costs:
            self.correct(lease.asks, costs)
        self._count(row)

    async def peek(self, asks: Sequence[Ask]) -> Sequence[State]:
        """See `Store`."""
        return self.decide([Ask(ask.key, ask.limit, 0.0, ask.ends_s) for ask in asks]).states

    def count(self, row: Row) -> None:
        """See `Store`."""
        self._count(row)

    def correct(self, asks: Sequence[Ask], costs: Sequence[float]) -> None:
        """The true costs instead of the estimates: what is over becomes debt, what is under comes back."""
        now = self._now()
        for number, ask in enumerate(asks):
            key, limit, kind = ask.key, ask.limit, ask.limit.kind
            more = costs[number] - ask.cost
            if kind == SLOTS:
                left = self._held.pop(key, 0.0) - 1
                if left > 0:
                    self._held[key] = left
            elif not more:
                continue
            elif kind == RATE:
                stands = self._empty_at.get(key, 0.0)
                self._empty_at[key] = (max(stands, now) if more > 0 else stands) + more * limit.interval / self.share
            else:
                before, since = self._used.get(key, NOTHING_USED)
                self._used[key] = (before, max(0.0, since + more))

    def _sweep(self, now: float) -> None:
        """Empty buckets are as good as none; those that are not are as many as limits, so that this stays rare."""
        self._empty_at = {key: empty_at for key, empty_at in self._empty_at.items() if empty_at > now}

    def forget(self) -> None:
        """Begin anew."""
        self._empty_at.clear()
        self._used.clear()
        self._held.clear()
