"""Requests in rows: `GET /admin/requests?state=open|failed|refused|slow&key=NAME&model=NAME&host=ID&since=1h&last=50`; one, explained."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, Protocol

from gateway.access.limits.rules import StoreFailed
from gateway.admin.handler import Answer, Request, StoredKeys, as_json, from_store
from gateway.config import Settings
from gateway.errors import InvalidRequest
from gateway.telemetry import ring as records
from gateway.telemetry.listing import MAX_LISTED, STATES, Row, Sought
from gateway.wire.visible import visible_values

_ACCEPTED = ("state", "key", "model", "host", "since", "last", "of")
_ALL, _HERE = "gateways", "gateway"
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

    async def find(self, name: str) -> dict[str, Any] | None:
        """What became of the request of this id; None where it is not known, or not any more."""


class Requests:
    """The handlers of `/admin/requests`."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    async def show(self, request: Request) -> Answer:
        """Everything that is known, by default."""
        sought = sought_by(request.query)
        found = await self._keeper.requests(sought)
        if not found and sought.key is not None:
            await _know(self._keeper, sought.key)
        return as_json({"requests": found})

    async def explain(self, request: Request) -> Answer:
        """One of them."""
        name = request.parts["id"]
        found = await from_store(self._keeper.find(name))
        if found is None:
            raise InvalidRequest(
                f"No request '{name[:80]}' is known. Each worker remembers its last {records.KEPT}, and Redis the last of all.",
                status=404,
                code="unknown_request",
            )
        if request.query.get("format") == "text":
            return 200, b"text/plain; charset=utf-8", f"{records.readable(visible_values(found))}\n".encode()
        return as_json(found)


def seconds(span: str) -> int:
    """How many `1h` is; raises ValueError for what is not of SPANS."""
    found = _SPAN.fullmatch(span)
    if found is None:
        raise ValueError(span)
    return int(found[1]) * _SECONDS[found[2]]


def sought_by(query: Mapping[str, str]) -> Sought:
    """Which requests a query asks for; raises InvalidRequest."""
    for name in query:
        if name not in _ACCEPTED:
            near = _nearest(name, _ACCEPTED)
            raise InvalidRequest(f"Unknown parameter '{name}'{near}; accepted: {', '.join(_ACCEPTED)}.", param=name, code="invalid_value")
    state, of = query.get("state", ""), query.get("of", _ALL)
    if state and state not in STATES:
        raise InvalidRequest(f"'state' is {', '.join(STATES)}, or left out{_nearest(state, STATES)}.", param="state", code="invalid_value")
    if of not in (_ALL, _HERE):
        raise InvalidRequest(f"'of' is '{_ALL}', or '{_HERE}' for this one's alone.", param="of", code="invalid_value")
    last = query.get("last", str(Sought().last))
    if not (last.isascii() and last.isdecimal() and len(last) < 10) or not 1 <= int(last) <= MAX_LISTED:
        raise InvalidRequest(f"'last' must be 1 to {MAX_LISTED}.", param="last", code="invalid_value")
    try:
        since_s = seconds(query["since"]) if "since" in query else None
    except ValueError:
        raise InvalidRequest(f"'since' must be {SPANS}.", param="since", code="invalid_value") from None
    return Sought(state, query.get("key"), since_s, int(last), query.get("model"), query.get("host"), of == _HERE)


def _nearest(given: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(given, known, n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


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
