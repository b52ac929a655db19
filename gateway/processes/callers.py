"""What the parent keeps of who has called: in Redis, for all gateways, or in a file; written once a minute, however many call."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from gateway.access.callers import MINUTE, Calls, Known, TokenCaller
from gateway.access.limits.rules import StoreFailed
from gateway.home import private
from gateway.processes.usage import Usage

if TYPE_CHECKING:
    from gateway.store.callers import CallerStore

log = logging.getLogger("penstock.parent")

# So many callers are known; of more those are forgotten that have not called for the longest.
MAX_CALLERS = 20_000


class _Kept(msgspec.Struct):
    """As it lies in the file."""

    at: dict[str, int]
    tokens: dict[str, TokenCaller]


class Callers:
    """`store` gives Redis' part, or None without it. `exhausted`: quotas that refused a request, until they are looked at."""

    def __init__(self, usage: Usage) -> None:
        self._usage = usage
        self.store: Callable[[], CallerStore | None] = lambda: None
        self.exhausted: set[str] = set()
        self._at: dict[str, int] = {}
        self._tokens: dict[str, TokenCaller] = {}
        # What the store, or the file, does not have yet.
        self._fresh: set[str] = set()
        self._failed = False

    @property
    def tokens(self) -> dict[str, TokenCaller]:
        """Who came with a token, as it is known here."""
        return self._tokens

    def teams(self) -> dict[str, str]:
        """The team of each of them that has one."""
        return {name: caller.team for name, caller in self._tokens.items() if caller.team is not None}

    def take(self, calls: Calls) -> None:
        """What a worker has noted."""
        for name, at in calls.at.items():
            if name:
                self._saw(name, int(at) // MINUTE * MINUTE)
        for caller in calls.tokens:
            self._tokens[caller.name] = caller
            self._fresh.add(caller.name)
        self.exhausted.update(calls.exhausted)
        if len(self._at) > MAX_CALLERS or len(self._tokens) > MAX_CALLERS:
            self._forget()

    def _saw(self, name: str, at: int) -> None:
        if at > self._at.get(name, 0):
            self._at[name] = at
            self._fresh.add(name)

    def _forget(self) -> None:
        """A tenth, so that this stays rare."""
        names = sorted({*self._at, *self._tokens}, key=lambda name: self._at.get(name, 0))
        for name in names[: len(names) - MAX_CALLERS * 9 // 10]:
            self._at.pop(name, None)
            self._tokens.pop(name, None)

    async def known(self) -> Known:
        """All of them, by all gateways. Raises StoreFailed."""
        store = self.store()
        if store is not None:
            await self._write_to(store)
            found = await store.read()
            self._learn(found)
        return Known(self._at, self._tokens)

    def _learn(self, found: Known) -> None:
        for name, at in found.at.items():
            self._at[name] = max(at, self._at.get(name, 0))
        self._tokens = {**found.tokens, **self._tokens}
        if len(self._at) > MAX_CALLERS or len(self._tokens) > MAX_CALLERS:
            self._forget()

    async def _write_to(self, store: CallerStore) -> None:
        fresh, self._fresh = self._fresh, set()
        try:
            await store.write(self._part(fresh))
        except BaseException:
            self._fresh |= fresh
            raise

    def _part(self, names: set[str]) -> Known:
        return Known(
            {name: self._at[name] for name in names if name in self._at},
            {name: self._tokens[name] for name in names if name in self._tokens},
        )

    def read(self) -> None:
        """What an earlier life has left in the file; nothing, where that cannot be read: it is only ever an hour's or a day's knowledge."""
        try:
            path = self._usage.beside("callers")
            kept = msgspec.json.decode(path.read_bytes(), type=_Kept) if path is not None else _Kept({}, {})
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return
        self._learn(Known(kept.at, kept.tokens))

    async def write_forever(self) -> None:
        """Once a minute, if there is anything new."""
        if self.store() is not None:
            await self._try()
        while True:
            await asyncio.sleep(MINUTE)
            if self._fresh:
                await self._try()

    async def _try(self) -> None:
        try:
            await self.write()
        except (StoreFailed, OSError) as error:
            if not self._failed:
                log.error("when callers have called cannot be kept (%s); it is known here until it can", error)
            self._failed = True
        else:
            self._failed = False

    async def write(self) -> None:
        """Now. Raises StoreFailed or OSError."""
        if self.store() is not None:
            await self.known()
            return
        if (path := self._usage.beside("callers")) is not None and self._fresh:
            self._fresh.clear()
            await asyncio.to_thread(_write, path, msgspec.json.encode(_Kept(self._at, self._tokens)))


def _write(path: Path, content: bytes) -> None:
    fresh = path.with_suffix(".new")
    with open(fresh, "wb", opener=private) as out:
        out.write(content)
    fresh.replace(path)
