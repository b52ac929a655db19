"""Keys that were made while the gateway runs, as every worker knows them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import msgspec

from gateway.access.keys import Keys, StoredKey
from gateway.access.limits.rules import StoreFailed
from gateway.store.connect import Client

log = logging.getLogger("penstock.store")

# A revoked key stops working within twice this.
INTERVAL_S = 0.75


class KeySync:
    """Reads them anew whenever their version has changed."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self._client = client
        self._keys = keys
        self._version: object = None

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            with contextlib.suppress(StoreFailed):
                await self.read()

    async def read(self) -> None:
        """Once. Raises StoreFailed."""
        version = await self._client.execute("GET", self._client.key("keys", "version"))
        if version != self._version or not self._version:
            self._keys.learn(stored_keys(await self._client.execute("HGETALL", self._client.key("keys"))))
            self._version = version


def stored_keys(found: Any) -> dict[str, StoredKey]:
    """Stored keys as Redis gives them; one that cannot be read (a later version's) is left out."""
    items = found.items() if isinstance(found, dict) else zip(found[::2], found[1::2], strict=True)
    keys: dict[str, StoredKey] = {}
    for name, content in items:
        try:
            keys[name.decode()] = msgspec.json.decode(content, type=StoredKey)
        except msgspec.DecodeError as error:
            log.error("the stored key '%s' cannot be read: %s", name.decode(), error)
    return keys
