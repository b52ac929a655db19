"""The ledger for people and spreadsheets: `GET /admin/usage?from=2026-11-01&to=2026-11-30&key=NAME&model=NAME&by=key,day&format=csv`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import date
from typing import Protocol

from gateway.access import ledger
from gateway.access.ledger import Rows
from gateway.access.limits.rules import Row
from gateway.admin.handler import Answer, Handler, Request, as_json, from_store
from gateway.config import Settings
from gateway.errors import InvalidRequest

_PLACES = ("day", "key", "model")
_ACCEPTED = ("from", "to", "key", "model", "by", "format")
MAX_DAYS = 4000


class Keeper(Protocol):
    """Whose ledger it is."""

    @property
    def settings(self) -> Settings:
        """Those in force."""

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
        if not set(by) <= set(_PLACES):
            raise InvalidRequest(f"'by' takes {', '.join(_PLACES)}, separated by commas.", param="by", code="invalid_value")
        found: Rows = {}
        for (day, key, model), counts in (await from_store(keeper.usage(first, last))).items():
            if query.get("key", key) == key and query.get("model", model) == model:
                place = (day if "day" in by else "", key if "key" in by else "", model if "model" in by else "")
                ledger.add(found, Row(*place, counts))
        rows = ledger.shown(found)
        if query.get("format", "json") == "csv":
            return 200, b"text/csv; charset=utf-8", ledger.as_csv(rows)
        if query.get("format", "json") != "json":
            raise InvalidRequest("'format' is json or csv.", param="format", code="invalid_value")
        return as_json({"from": first, "to": last, "usage": rows})

    return show


def _day(query: Mapping[str, str], name: str, otherwise: str) -> str:
    value = query.get(name, otherwise)
    try:
        return date.fromisoformat(value).isoformat()
    except ValueError:
        raise InvalidRequest(f"'{name}' must be a day like 2026-11-25.", param=name, code="invalid_value") from None
