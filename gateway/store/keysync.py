"""Keys that were made while the gateway runs, as this process knows them: read anew whenever their version has changed.

What can be wrong with one key is that key's matter alone, and what can be wrong with the store is no reason to forget what is known. How
old the list is, is always known: `Keys.age_s`.

A version that goes back means that the store has lost changes: it was started without its data, or with an older state of it. Then what was
known here holds, with what has changed there since; what came back with an old state does not (a revoked key might be among it). That lasts
until an operator puts back what was lost, or gives it up: `restore`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from gateway.access import keys
from gateway.access.keys import KeyList, StoredKey
from gateway.access.limits.rules import StoreFailed, StoreRefused
from gateway.errors import ConfigError
from gateway.store.connect import SOCKET_TIMEOUT_S, Client, Command, Script

log = logging.getLogger("penstock.store")

# A revoked key stops working within twice this.
INTERVAL_S = 0.75
# How often at most the list is read for keys that are not known, and how long whoever brings one waits for it.
FRESH_S, _FRESH_LIMIT_S = 0.1, 0.5
# A reading that takes longer is given up, whatever keeps it.
_LIMIT_S = 2 * SOCKET_TIMEOUT_S
# How often something may be changed by others while a restoration is decided on; so many names are said in one line.
_TRIES, _NAMED = 5, 10
_pack = msgspec.msgpack.Encoder().encode

Keyring = Mapping[str, StoredKey]


class KeySync:
    """`learn` is given the whole list whenever it has changed; `confirmed` is called whenever that is known to be right, with how many of
    them the store has lost. Of all processes of a gateway one says in the log what is wrong (`speaks`)."""

    def __init__(
        self,
        client: Client,
        learn: Callable[[Keyring], None],
        confirmed: Callable[[int], None],
        known: KeyList,
        speaks: bool = False,
    ) -> None:
        self._client = client
        self._learn = learn
        self._confirmed = confirmed
        self._level = logging.ERROR if speaks else logging.DEBUG
        self._read_script, self._restore_script = Script("read_keys"), Script("restore_keys")
        self._names = [client.key("keys", *more) for more in ((), ("version",), ("restored",))]
        # What holds; of those that cannot be used the names, and why; and what of it the store has not (or has otherwise).
        self.known = known
        self.unreadable: dict[str, str] = {}
        self.lost: dict[str, StoredKey] = {}
        # What was last found in the store: version, last restoration, keys that can be used.
        self._version, self._restored = known.version, b""
        self._found: dict[str, StoredKey] = {}
        self._read_once = False
        # While keys are lost: what was known, and what was found when that was noticed.
        self._loss: tuple[Keyring, Keyring, bytes] | None = None
        self._read_at = time.monotonic()
        self._old = False
        self._one_at_a_time = asyncio.Lock()
        # When the last reading began that somebody asked for, and that reading.
        self._asked_at = float("-inf")
        self._asking: asyncio.Task[None] | None = None

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

    async def fresh(self) -> None:
        """Know what was stored up to now, for whoever meets a key that is not known. However many ask, the store is asked once in FRESH_S.
        What cannot be read stays unknown."""
        came_at = time.monotonic()
        while self._asked_at < came_at:
            if self._asking is None:
                self._asking = asyncio.get_running_loop().create_task(self._ask_soon())
            await asyncio.shield(self._asking)

    async def _ask_soon(self) -> None:
        try:
            await asyncio.sleep(max(0.0, self._asked_at + FRESH_S - time.monotonic()))
            self._asked_at = time.monotonic()
            with contextlib.suppress(StoreFailed, TimeoutError):
                async with asyncio.timeout(_FRESH_LIMIT_S):
                    await self.read()
        finally:
            self._asking = None

    async def read(self) -> None:
        """Once. Raises StoreFailed."""
        async with self._one_at_a_time:  # an answer that another has overtaken would look like a version that goes back
            await self._read()

    async def _read(self) -> None:
        known = (self._version, self._restored) if self._read_once else (-1, b"")
        answer = await self._ask(Command(self._read_script, [*self._names, self._client.key("keys", "nothing")], known))
        try:
            version = int(answer[0])
        except ValueError:
            raise StoreRefused(f"the version of the stored keys is {answer[0]!r}, not a number") from None
        if len(answer) > 2:
            self._changed(version, answer[1], *stored_keys(answer[2]))
        self._read_once = True
        self._read_at = time.monotonic()
        self.known = msgspec.structs.replace(self.known, at=time.time())
        self._confirmed(len(self.lost))
        if self._old:
            self._old = False
            log.log(self._level, "the stored keys are read again")

    async def _ask(self, command: Command) -> Any:
        answer: Any = (await self._client.run([command]))[0]
        if isinstance(answer, StoreRefused):
            raise answer
        return answer

    def _changed(self, version: int, restored: bytes, found: dict[str, StoredKey], unreadable: dict[str, str]) -> None:
        loss = self._loss
        if version < self._version:
            # What was made since the last reading was not lost and come back: it is new.
            loss = (self.known.keys, {name: entry for name, entry in found.items() if entry.created <= self.known.at}, restored)
        elif loss is not None and restored != loss[2]:
            loss = None
        # Under the version that was lost: whoever begins with this list must find that it is.
        known = KeyList(version, found) if loss is None else KeyList(self.known.version, what_holds(loss[0], loss[1], found))
        lost = {name: entry for name, entry in known.keys.items() if found.get(name) != entry}
        self._learn(known.keys)
        if version < self._version:
            log.log(
                self._level,
                "Redis has lost changes of the stored keys (version %d, last seen was %d): what is known here holds, and what it came back"
                " with does not, until `penstock keys restore`",
                version, self._version,
            )  # fmt: skip
        self._say(lost, unreadable)
        self._loss, self.known, self.lost, self.unreadable = loss, known, lost, unreadable
        self._version, self._restored, self._found = version, restored, found

    def _say(self, lost: Keyring, unreadable: Mapping[str, str]) -> None:
        for name, problem in unreadable.items():
            if self.unreadable.get(name) != problem:
                log.log(self._level, "the stored key '%s' cannot be used: %s", name, problem)
        if set(lost) - set(self.lost):
            names = ", ".join(sorted(lost)[:_NAMED]) + (", ..." if len(lost) > _NAMED else "")
            log.log(self._level, "Redis does not have %d stored keys that work here: %s", len(lost), names)

    async def restore(self, discard: bool) -> list[str]:
        """Put back into the store what it has lost, or give it up; their names. Raises StoreFailed."""
        for _ in range(_TRIES):
            await self.read()
            lost = self.lost
            if self._loss is None:
                return []
            drop = [] if discard else sorted(set(self._found) - set(self.known.keys))
            put = [] if discard else [part for name, entry in lost.items() for part in (name, msgspec.json.encode(entry).decode())]
            decided_on = [str(self._version), self._restored.decode()]
            content = _pack([*decided_on, self.known.version + 1, secrets.token_hex(8), drop, put])
            if await self._ask(Command(self._restore_script, self._names, [content])):
                await self.read()
                return sorted(lost)
        raise StoreFailed("its keys are being changed all the time")


def what_holds(known: Keyring, then: Keyring, now: Keyring) -> dict[str, StoredKey]:
    """Of keys that a store has lost: those that were known, with what has changed in the store between `then`, when it was noticed, and
    `now`."""
    held = {name: entry for name, entry in known.items() if name not in then or name in now}
    return held | {name: entry for name, entry in now.items() if then.get(name) != entry}


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
