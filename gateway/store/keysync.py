"""Keys that were made while the gateway runs, as this process knows them: read anew whenever their version has changed.

What can be wrong with one key is that key's matter alone, and what can be wrong with the store is no reason to forget what is known. How
old the list is, is always known: `Keys.age_s`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from gateway.access import keys
from gateway.access.keys import StoredKey
from gateway.access.limits.rules import StoreFailed, StoreRefused
from gateway.errors import ConfigError
from gateway.store.connect import SOCKET_TIMEOUT_S, Client, Command, Script

log = logging.getLogger("penstock.store")

# A revoked key stops working within twice this.
INTERVAL_S = 0.75
# A reading that takes longer is given up, whatever keeps it.
_LIMIT_S = 2 * SOCKET_TIMEOUT_S


class KeySync:
    """`learn` is given the whole list whenever it has changed, `confirmed` is called whenever it is known to be what is stored. Of all
    processes of a gateway one says in the log what is wrong (`speaks`)."""

    def __init__(
        self, client: Client, learn: Callable[[Mapping[str, StoredKey]], None], confirmed: Callable[[], None], speaks: bool = False
    ) -> None:
        self._client = client
        self._learn = learn
        self._confirmed = confirmed
        self._level = logging.ERROR if speaks else logging.DEBUG
        self._script = Script("read_keys")
        self._version = -1
        self._read_at = time.monotonic()
        self._old = False
        # How many can be used; of the others the names, and why.
        self.readable = 0
        self.unreadable: dict[str, str] = {}

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                async with asyncio.timeout(_LIMIT_S):
                    await self.read()
            except (StoreFailed, TimeoutError) as error:
                self._missed(error)

    def _missed(self, error: Exception) -> None:
        age_s = time.monotonic() - self._read_at
        if age_s > keys.STALE_S and not self._old:
            self._old = True
            log.log(self._level, "the stored keys were last read %.0f s ago (%s): a key revoked since then still works", age_s, error)

    async def read(self) -> None:
        """Once. Raises StoreFailed."""
        names = [self._client.key("keys", *more) for more in ((), ("version",), ("nothing",))]
        answer = (await self._client.run([Command(self._script, names, [self._version])]))[0]
        if isinstance(answer, StoreRefused):
            raise answer
        try:
            version = int(answer[0])
        except ValueError:
            raise StoreRefused(f"the version of the stored keys is {answer[0]!r}, not a number") from None
        if version != self._version:
            self._changed(*stored_keys(answer[1]))
            self._version = version
        self._read_at = time.monotonic()
        self._confirmed()
        if self._old:
            self._old = False
            log.log(self._level, "the stored keys are read again")

    def _changed(self, readable: Mapping[str, StoredKey], unreadable: dict[str, str]) -> None:
        for name, problem in unreadable.items():
            if self.unreadable.get(name) != problem:
                log.log(self._level, "the stored key '%s' cannot be used: %s", name, problem)
        self.readable, self.unreadable = len(readable), unreadable
        self._learn(readable)


def stored_keys(found: Sequence[bytes]) -> tuple[dict[str, StoredKey], dict[str, str]]:
    """Names and contents in turn, as Redis gives a hash: the keys that can be used, and what is wrong with the others."""
    readable: dict[str, StoredKey] = {}
    unreadable: dict[str, str] = {}
    for raw, content in zip(found[::2], found[1::2], strict=True):
        name = raw.decode(errors="backslashreplace")
        try:
            readable[name] = keys.read(name, content)
        except ConfigError as error:
            unreadable[name] = str(error)
    return readable, unreadable
