"""What keys have used, as commands show it: asked of the ledger once, from the first of this month or a month back on."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, timedelta
from typing import Any

import msgspec

from gateway.admin.client import Client

# How far back a last use is looked for.
_BACK_DAYS = 31


class Used:
    """The ledger by key and day; days are the gateway's own."""

    def __init__(self, client: Client) -> None:
        today = msgspec.json.decode(client.ask("GET", "/admin/usage?by=key"))["to"]
        first = (date.fromisoformat(today) - timedelta(days=_BACK_DAYS)).isoformat()
        rows = msgspec.json.decode(client.ask("GET", f"/admin/usage?by=key,day&from={first}&to={today}"))["usage"]
        self._today = today
        self._days: dict[str, dict[str, Mapping[str, Any]]] = {}
        for row in rows:
            self._days.setdefault(row["key"], {})[row["day"]] = row

    def last(self, key: str) -> str | None:
        """The day of its last use: `today`, a date, or None where there was none in the last month."""
        days = [day for day, row in self._days.get(key, {}).items() if row["requests"] or row["limited"]]
        last = max(days, default=None)
        return "today" if last == self._today else last

    def today(self, key: str) -> tuple[int, int, int, float]:
        """Requests that were served, requests that limits refused, tokens (of prompt and completion), cost."""
        row = self._days.get(key, {}).get(self._today)
        return (row["requests"], row["limited"], _tokens(row), row["cost"]) if row is not None else (0, 0, 0, 0.0)

    def shares(self, key: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Of each limit of a key that runs by day or month: how much of it is used."""
        return [(f"of {name}", f"{share:.1%}") for name, share in self._shares(key)]

    def share(self, key: Mapping[str, Any]) -> str | None:
        """The fullest of them; None where there is none."""
        shares = [share for _, share in self._shares(key)]
        return f"{max(shares):.0%}" if shares else None

    def _shares(self, key: Mapping[str, Any]) -> list[tuple[str, float]]:
        found: list[tuple[str, float]] = []
        _, _, tokens, cost = self.today(key["name"])
        if most := key.get("tokens_per_day"):
            found.append(("tokens_per_day", tokens / most))
        if budget := key.get("budget"):
            if budget.get("per", "month") == "month":
                days = self._days.get(key["name"], {})
                cost = sum(row["cost"] for day, row in days.items() if day[:7] == self._today[:7])
            found.append(("budget", cost / budget["amount"]))
        return found


def _tokens(row: Mapping[str, Any]) -> int:
    return int(row["prompt_tokens"] + row["generated_tokens"])
