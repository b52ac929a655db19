"""What the parent sees and changes in Redis for the operator: stored keys, requests, and the ledger."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from typing import Any

import msgspec

from gateway.access import ledger
from gateway.access.keys import KeyList, StoredKey
from gateway.access.limits.rules import StoreFailed, StoreRefused
from gateway.config import Settings
from gateway.store.budgets import BudgetStore
from gateway.store.callers import CallerStore
from gateway.store.connect import FORGETS, Client, Command, Script
from gateway.store.keysync import KeySync, stored_keys
from gateway.supervision import supervise
from gateway.telemetry.listing import SLOW, Row, Sought, ordered, remembered
from gateway.telemetry.metrics import STORED_KEYS, Metrics

log = logging.getLogger("penstock.store")

_JOIN = "\x1f"
# So many remembered requests are read with one answer, at a few kilobytes each.
_AT_ONCE = 200


class AdminStore:
    """The parent's own connection; every method but `open` and `aclose` raises StoreFailed while Redis is gone.

    Beside it the parent follows the stored keys as its workers do, and says for all of them what is wrong.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._client = Client(settings.redis)
        self._metrics = metrics
        self._change_key = Script("change_key")
        self._sync = KeySync(self._client, lambda keys: None, self._count, KeyList(), speaks=True)
        self._following: asyncio.Task[None] | None = None
        self.callers = CallerStore(self._client, settings.limits.keep_days)
        self.budgets = BudgetStore(self._client)

    def open(self) -> None:
        """Follow the stored keys from now on."""
        self._following = supervise("stored keys", self._follow, self._metrics.failed)

    async def _follow(self) -> None:
        if await self._client.forgets():
            log.warning("redis.url: %s", FORGETS)
        await self._sync.run()

    def known(self) -> KeyList:
        """What holds now, whatever the store has, for a worker that begins."""
        return self._sync.known

    def _count(self, lost: int) -> None:
        self._metrics.put(STORED_KEYS, len(self._sync.known.keys), ("usable",))
        self._metrics.put(STORED_KEYS, len(self._sync.unreadable), ("unreadable",))
        self._metrics.put(STORED_KEYS, lost, ("lost",))

    async def aclose(self) -> None:
        """Close it."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await self._client.aclose()

    async def keys(self) -> tuple[dict[str, StoredKey], dict[str, str]]:
        """See `StoredKeys`."""
        found = await self._client.execute("HGETALL", self._client.key("keys"))
        return stored_keys([part for item in found.items() for part in item] if isinstance(found, dict) else found)

    async def lost(self) -> dict[str, StoredKey]:
        """See `StoredKeys`."""
        await self._sync.read()
        return self._sync.lost

    async def restore(self, discard: bool) -> list[str]:
        """See `StoredKeys`."""
        return await self._sync.restore(discard)

    async def create(self, key: StoredKey) -> bool:
        """False where one of that name is there already."""
        return await self._change("create", key.name, msgspec.json.encode(key))

    async def put(self, key: StoredKey) -> bool:
        """False where there is none of that name any more."""
        return await self._change("put", key.name, msgspec.json.encode(key))

    async def drop(self, name: str) -> bool:
        """False where there is none of that name."""
        return await self._change("drop", name, b"")

    async def _change(self, verb: str, name: str, content: bytes) -> bool:
        keys = [self._client.key("keys"), self._client.key("keys", "version")]
        answer = (await self._client.run([Command(self._change_key, keys, [verb, name, content])]))[0]
        if isinstance(answer, StoreRefused):
            raise answer
        with contextlib.suppress(StoreFailed):  # it is done; what is known here is behind it by no more than a moment
            await self._sync.read()
        return bool(answer)

    async def request(self, name: str) -> dict[str, Any] | None:
        """What happened to a request of any gateway, by either id."""
        for id in (name, await self._client.execute("HGET", self._client.key("requests", "ids"), name)):
            content = await self._client.execute("HGET", self._client.key("requests", "records"), id) if id else None
            if content is not None:
                found: dict[str, Any] = msgspec.json.decode(content)
                return found
        return None

    async def requests(self, sought: Sought) -> list[Row]:
        """What is remembered of requests of all gateways, the last to end first; see `ordered` for who is wanted."""
        records, times = (self._client.key("requests", part) for part in ("records", "times"))
        oldest = "-inf" if sought.since_s is None else time.time() - sought.since_s
        ids = await self._client.execute("ZREVRANGEBYSCORE", times, "+inf", oldest)
        rows: list[Row] = []
        for start in range(0, len(ids), _AT_ONCE):
            for content in await self._client.execute("HMGET", records, *ids[start : start + _AT_ONCE]):
                row = remembered(msgspec.json.decode(content), sought) if content is not None else None
                if row is not None:
                    rows.append(row)
            if len(rows) >= sought.last and sought.state != SLOW:
                break
        return ordered(rows, sought)

    async def usage_of(self, key: str, models: Sequence[str], first: str, last: str) -> ledger.Rows:
        """The same of one key, asked for by the names of its columns: whoever asks is no operator, and may ask often."""
        rows: ledger.Rows = {}
        places = [(model, column) for model in models for column in ledger.COLUMNS]
        fields = [_JOIN.join((key, *place)) for place in places]
        for day in _days(first, last):
            found = await self._client.execute("HMGET", self._client.key("usage", day), *fields)
            for (model, column), count in zip(places, found, strict=True):
                if count is not None:
                    rows.setdefault((day, key, model), {})[column] = int(count)
        return rows

    async def usage(self, first: str, last: str) -> ledger.Rows:
        """The ledger of these days, both included."""
        rows: ledger.Rows = {}
        for day in _days(first, last):
            found: Any = await self._client.execute("HGETALL", self._client.key("usage", day))
            items = found.items() if isinstance(found, dict) else zip(found[::2], found[1::2], strict=True)
            for field, count in items:
                key, model, column = field.decode().split(_JOIN)
                rows.setdefault((day, key, model), {})[column] = int(count)
        return rows


def _days(first: str, last: str) -> Iterator[str]:
    day, end = date.fromisoformat(first), date.fromisoformat(last)
    while day <= end:
        yield day.isoformat()
        day += timedelta(days=1)
