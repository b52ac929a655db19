"""The ledger for people and spreadsheets: `GET /admin/usage?from=2026-11-01&to=2026-11-30&key=NAME&model=NAME&by=key,day&format=csv`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import date
from typing import Protocol

import msgspec

from gateway.access import ledger
from gateway.access.callers import Known
from gateway.access.ledger import Rows
from gateway.access.limits.rules import Row
from gateway.access.used import Used
from gateway.admin.handler import Answer, Handler, Request, StoredKeys, as_json, from_store
from gateway.config import KeyEntry, Settings
from gateway.errors import InvalidRequest

_PLACES = ("day", "key", "model")
_GROUPS = (*_PLACES, "team")
_ACCEPTED = ("from", "to", "key", "model", "team", "by", "format")
_JOIN = "\x1f"
MAX_DAYS = 4000


class Keeper(Protocol):
    """Whose ledger it is."""

    @property
    def settings(self) -> Settings:
        """Those in force."""

    def stored_keys(self) -> StoredKeys | None:
        """The keys that were made while gateways run; None without Redis."""

    async def callers(self) -> Known:
        """Who has called. Raises StoreFailed."""

    async def usage(self, first: str, last: str) -> Rows:
        """The ledger of these days, both included."""


def handler(keeper: Keeper) -> Handler:
    """Today's by default."""

    async def show(request: Request) -> Answer:
        query = request.query
        for name in query:
            if name not in _ACCEPTED:
                raise InvalidRequest(f"Unknown parameter '{name}'; accepted: {', '.join(_ACCEPTED)}.", param=name, code="invalid_value")
        today = ledger.Days(keeper.settings.limits.timezone).at(time.time())["day"][0]
        first = _day(query, "from", query.get("to", today))
        last = _day(query, "to", today)
        if first > last or (date.fromisoformat(last) - date.fromisoformat(first)).days > MAX_DAYS:
            raise InvalidRequest(
                f"'from' must not be after 'to', nor more than {MAX_DAYS} days before it.", param="from", code="invalid_value"
            )
        by = query.get("by", ",".join(_PLACES)).split(",")
        if not set(by) <= set(_GROUPS):
            raise InvalidRequest(f"'by' takes {', '.join(_GROUPS)}, separated by commas.", param="by", code="invalid_value")
        teams = await _teams(keeper) if "team" in by or "team" in query else {}
        found: Rows = {}
        for (day, key, model), counts in (await from_store(keeper.usage(first, last))).items():
            team = teams.get(key, "")
            if query.get("key", key) == key and query.get("model", model) == model and query.get("team", team) == team:
                # A key is in one team, so that both fit where the key stands.
                who = f"{team if 'team' in by else ''}{_JOIN}{key if 'key' in by else ''}"
                ledger.add(found, Row(day if "day" in by else "", who, model if "model" in by else "", counts))
        rows = [_told_apart(row) for row in ledger.shown(found)]
        if query.get("format", "json") == "csv":
            return 200, b"text/csv; charset=utf-8", ledger.as_csv(rows)
        if query.get("format", "json") != "json":
            raise InvalidRequest("'format' is json or csv.", param="format", code="invalid_value")
        return as_json({"from": first, "to": last, "usage": rows})

    return show


async def _teams(keeper: Keeper) -> dict[str, str]:
    """The team of every key that there is, and of those who come with tokens; of a key that was revoked nobody knows it."""
    entries: list[KeyEntry] = list(keeper.settings.keys)
    stored = keeper.stored_keys()
    if stored is not None:
        usable, _ = await from_store(stored.keys())
        entries += [*usable.values(), *(await from_store(stored.lost())).values()]
    tokens = (await from_store(keeper.callers())).tokens.values()
    named = [*((caller.name, caller.team) for caller in tokens), *((entry.name, entry.team) for entry in entries)]
    return {name: team for name, team in named if team is not None}


def _told_apart(row: Used) -> Used:
    team, _, key = row.key.partition(_JOIN)
    return msgspec.structs.replace(row, key=key, team=team)


def _day(query: Mapping[str, str], name: str, otherwise: str) -> str:
    value = query.get(name, otherwise)
    try:
        return date.fromisoformat(value).isoformat()
    except ValueError:
        raise InvalidRequest(f"'{name}' must be a day like 2026-11-25.", param=name, code="invalid_value") from None
