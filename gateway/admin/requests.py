"""Requests in rows: `GET /admin/requests?state=open|failed|slow&key=NAME&since=1h&last=50`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Protocol

from gateway.access.limits.rules import StoreFailed
from gateway.admin.handler import Answer, Handler, Request, StoredKeys, as_json
from gateway.config import Settings
from gateway.errors import InvalidRequest
from gateway.telemetry.listing import MAX_LISTED, STATES, Row, Sought

_ACCEPTED = ("state", "key", "since", "last")
_SPAN = re.compile(r"(\d{1,9})([smhd])", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SPANS = "a whole number and s, m, h or d, such as 90s, 15m, 1h or 2d"


class Keeper(Protocol):
    """Who knows of requests, and of whose there are."""

    @property
    def settings(self) -> Settings:
        """Those in force."""

    def stored_keys(self) -> StoredKeys | None:
        """The keys that were made while gateways run; None without Redis."""

    async def requests(self, sought: Sought) -> list[Row]:
        """Those that are sought, of every worker, and of the whole deployment where they share a store."""


def handler(keeper: Keeper) -> Handler:
    """Everything that is known, by default."""

    async def show(request: Request) -> Answer:
        sought = _sought(request.query)
        found = await keeper.requests(sought)
        if not found and sought.key is not None:
            await _know(keeper, sought.key)
        return as_json({"requests": found})

    return show


def seconds(span: str) -> int:
    """How many `1h` is; raises ValueError for what is not of SPANS."""
    found = _SPAN.fullmatch(span)
    if found is None:
        raise ValueError(span)
    return int(found[1]) * _SECONDS[found[2]]


def _sought(query: Mapping[str, str]) -> Sought:
    for name in query:
        if name not in _ACCEPTED:
            raise InvalidRequest(f"Unknown parameter '{name}'; accepted: {', '.join(_ACCEPTED)}.", param=name, code="invalid_value")
    state = query.get("state", "")
    if state and state not in STATES:
        raise InvalidRequest(f"'state' is {', '.join(STATES)}, or left out.", param="state", code="invalid_value")
    last = query.get("last", str(Sought().last))
    if not (last.isascii() and last.isdecimal()) or not 1 <= int(last) <= MAX_LISTED:
        raise InvalidRequest(f"'last' must be 1 to {MAX_LISTED}.", param="last", code="invalid_value")
    try:
        since_s = seconds(query["since"]) if "since" in query else None
    except ValueError:
        raise InvalidRequest(f"'since' must be {SPANS}.", param="since", code="invalid_value") from None
    return Sought(state, query.get("key"), since_s, int(last))


async def _know(keeper: Keeper, name: str) -> None:
    """Raises InvalidRequest where no key of that name is known: no rows would look as if it had asked for nothing."""
    names = {key.name for key in keeper.settings.keys}
    stored = keeper.stored_keys()
    if stored is not None:
        try:
            usable, unreadable = await stored.keys()
        except StoreFailed:  # whether there is such a key cannot be said then
            return
        names |= {*usable, *unreadable}
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise InvalidRequest(f"There is no key '{name[:80]}'{hint}", param="key", status=404, code="unknown_key")
