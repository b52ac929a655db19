"""What was admitted here while the store did not answer, for the rates that are kept there: charged when it answers again, as if each had
been asked for at its time.

A request takes a bucket that will be empty at `e` to `max(e, now) + cost`. Any row of such steps comes to `max(e + taken, alone)`, where
`taken` is the sum of the costs and `alone` what the row makes of a bucket that was empty at its beginning. So two numbers are enough to
replay them all on whatever bucket is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gateway.access.limits.rules import RATE, Ask, Limit


class Charge(NamedTuple):
    """For one limit, in microseconds: `taken` of the bucket's time, `empty_in` what is left of it by now had the bucket been empty before,
    and `most` what makes a bucket full."""

    key: str
    taken: float
    empty_in: float
    most: float


class Charges:
    """`number` tells one outage's from the next one's: those of an earlier number have been handed over."""

    def __init__(self) -> None:
        self.number = 1
        self._taken: dict[str, tuple[Limit, float, float]] = {}

    def __bool__(self) -> bool:
        return bool(self._taken)

    def add(self, asks: Sequence[Ask], now: float) -> None:
        """A request was admitted here."""
        for ask in asks:
            if ask.limit.kind == RATE:
                self._more(ask, ask.cost, now)

    def correct(self, ask: Ask, cost: float, now: float) -> None:
        """Its true cost instead of the estimate."""
        if cost != ask.cost:
            self._more(ask, cost - ask.cost, now)

    def _more(self, ask: Ask, cost: float, now: float) -> None:
        more = cost * ask.limit.interval
        _, taken, alone = self._taken.get(ask.key, (None, 0.0, now))
        self._taken[ask.key] = (ask.limit, taken + more, (max(alone, now) if more > 0 else alone) + more)

    def take(self, now: float) -> list[Charge]:
        """All of them, handed over."""
        taken, self._taken = self._taken, {}
        self.number += bool(taken)
        return [Charge(key, time, alone - now, limit.tolerance) for key, (limit, time, alone) in taken.items()]
