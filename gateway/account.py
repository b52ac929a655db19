"""`GET /v1/usage`: what the holder of a key may know of it: its limits, what is left of them, and its use by day."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import date, timedelta

from gateway.access import ledger
from gateway.access.keys import Caller
from gateway.access.ledger import Rows
from gateway.access.limits.rules import NANO, QUOTA, SECOND, SLOTS, Ask, Limit, StoreFailed, Unit
from gateway.access.used import Used
from gateway.errors import Unavailable
from gateway.wire import answers
from middleware.rate_limit import RateLimit

# So many days are shown, today's included. What was read of the ledger is good for so long, so that nobody can have it read in a loop; of
# so many keys that is kept.
DAYS, FRESH_S, _KEPT = 31, 2.0, 1000
# The ledger of a key (its name, the first and the last day).
Spent = Callable[[str, str, str], Awaitable[Rows]]


async def nothing_spent(key: str, first: str, last: str) -> Rows:
    """Where nobody keeps a ledger."""
    return {}


class Accounts:
    """Answers for every key."""

    def __init__(self, rate_limit: RateLimit, models: Sequence[str], spent: Spent) -> None:
        self._rate_limit = rate_limit
        self._models = models
        self._spent = spent
        self._kept: dict[str, tuple[float, list[answers.DayUsed]]] = {}

    async def of(self, caller: Caller) -> answers.OwnUsage:
        """Of one key. Raises Unavailable where the ledger does not answer."""
        models = [model for model in self._models if caller.models is None or model in caller.models]
        limits = {limit.key: limit for model in models for limit in caller.limits(model)}
        team = caller.team.name if caller.team is not None else None
        return answers.OwnUsage("usage", caller.name, team, await self._limits(list(limits.values())), await self._days(caller.name))

    async def _limits(self, limits: Sequence[Limit]) -> list[answers.LimitLeft]:
        periods = self._rate_limit.days.at(time.time())
        asks: dict[str, Ask] = {}
        for limit in limits:
            if limit.kind == QUOTA:
                name, end = periods[limit.period]
                asks[limit.key] = Ask(f"{limit.key}/{name}", limit, 0.0, end - time.time())
            elif limit.kind != SLOTS:
                asks[limit.key] = Ask(limit.key, limit, 0.0)
        try:
            states = dict(zip(asks, await self._rate_limit.store.peek(list(asks.values())), strict=True)) if asks else {}
        except StoreFailed:
            states = {}
        return [_shown(limit, states.get(limit.key)) for limit in limits]

    async def _days(self, key: str) -> list[answers.DayUsed]:
        now = time.monotonic()
        known = self._kept.get(key)
        if known is not None and now - known[0] < FRESH_S:
            return known[1]
        last = self._rate_limit.days.at(time.time())["day"][0]
        first = (date.fromisoformat(last) - timedelta(days=DAYS - 1)).isoformat()
        try:
            rows = await self._spent(key, first, last)
        except (StoreFailed, TimeoutError):
            raise Unavailable("The ledger does not answer.", code="usage_unavailable", retry_after_s=1) from None
        if len(self._kept) >= _KEPT:
            self._kept.clear()
        days = [_day(row) for row in ledger.shown(rows)]
        self._kept[key] = now, days
        return days


def _shown(limit: Limit, state: tuple[float, float] | None) -> answers.LimitLeft:
    unit = NANO if limit.unit is Unit.MONEY else 1.0
    left, unused_in = (max(state[0], 0.0) / unit, max(state[1], 0.0) / SECOND) if state is not None else (None, None)
    per = limit.period or ("now" if limit.kind == SLOTS else "minute")
    return answers.LimitLeft(limit.unit.value, limit.whose, per, limit.amount / unit, left, unused_in)  # type: ignore[arg-type]


def _day(row: Used) -> answers.DayUsed:
    return answers.DayUsed(
        row.day, row.model, row.requests, row.limited, row.prompt_tokens, row.cached_tokens, row.generated_tokens, row.delivered_tokens,
        row.cost,
    )  # fmt: skip
