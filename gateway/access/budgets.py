"""Budgets that are watched: which there are, and how much of each is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from gateway.access import keys
from gateway.access.limits.rules import NANO, QUOTA, Limit, Unit
from gateway.config import Allowance, Team


class Watched(NamedTuple):
    """A budget, or tokens of a day, of a `key` or a `team`, in its present period. `key`: as the store calls it, with the period."""

    of: str
    name: str
    limit: Limit
    period: str
    ends_at: float

    @property
    def key(self) -> str:
        """Its counter in a store."""
        return f"{self.limit.key}/{self.period}"

    def shown(self, amount: float) -> float:
        """An amount as the configuration says it."""
        return amount / NANO if self.limit.unit is Unit.MONEY else amount


def watched(callers: Iterable[tuple[str, Allowance]], teams: Iterable[Team], periods: Mapping[str, tuple[str, float]]) -> Iterator[Watched]:
    """All that there are. `periods`: what `Days.at` says."""
    for name, allowance in callers:
        yield from _of("key", name, allowance, periods)
    for team in teams:
        yield from _of("team", team.name, team, periods)


def _of(of: str, name: str, entry: Allowance | Team, periods: Mapping[str, tuple[str, float]]) -> Iterator[Watched]:
    if entry.budget is None and entry.tokens_per_day is None:
        return
    key, whose = f"{of}/{name}", f"{of} '{name}'"
    for limit in (*keys.compiled(key, whose, entry, 60.0), *keys.spending(key, whose, entry.budget)):
        if limit.kind == QUOTA:
            yield Watched(of, name, limit, *periods[limit.period])
