"""Budgets in Redis as the parent sees them: how much is used, and which gateway tells whom of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway.access.limits.rules import StoreRefused
from gateway.store.connect import Client, Command, Script

# So many counters are asked for at once.
_AT_ONCE = 500


class BudgetStore:
    """Every method raises StoreFailed while Redis is gone."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._script = Script("claim")

    async def used(self, keys: Sequence[str]) -> list[float]:
        """Of quotas, by the names of their counters; a value that is not ours counts for nothing."""
        found: list[Any] = []
        for start in range(0, len(keys), _AT_ONCE):
            found += await self._client.execute("MGET", *(self._client.key("limit", key) for key in keys[start : start + _AT_ONCE]))
        return [_number(value) for value in found]

    async def claim(self, place: str, owner: str, lease_s: float) -> str:
        """`ours` for so long, `told` already, or of `others`."""
        command = Command(self._script, [self._client.key("alert", place)], [owner, int(lease_s * 1000)])
        answer = (await self._client.run([command]))[0]
        if isinstance(answer, StoreRefused):
            raise answer
        return str(answer.decode())

    async def told(self, place: str, keep_s: float) -> None:
        """Nobody need tell it any more."""
        await self._client.execute("SET", self._client.key("alert", place), "told", "EX", max(1, int(keep_s)))


def _number(value: Any) -> float:
    try:
        return float(value or 0)
    except ValueError:
        return 0.0
