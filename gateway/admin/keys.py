"""Keys are made, listed, changed, rotated and revoked. A key is shown once, when it is made; what is kept is its hash."""

from __future__ import annotations

import logging
import time
from typing import Any, Protocol

import msgspec

from gateway import config
from gateway.access import keys
from gateway.access.callers import Known, minute
from gateway.access.keys import StoredKey
from gateway.admin.handler import Answer, Request, StoredKeys, as_json, from_store
from gateway.config import Settings
from gateway.errors import ConfigError, InvalidRequest

log = logging.getLogger("penstock.admin")

# A key that was rotated goes on working for so long, unless it is said otherwise.
OVERLAP_S = 3600.0
MAX_OVERLAP_S = 30 * 86400.0
_OURS = ("hash", "created", "old_hash", "old_until")


class Owner(Protocol):
    """Whose keys these are."""

    @property
    def settings(self) -> Settings:
        """Those in force."""

    def stored_keys(self) -> StoredKeys | None:
        """Where keys are made; None without Redis."""

    async def callers(self) -> Known:
        """Who has called. Raises StoreFailed."""


class Keys:
    """The handlers of `/admin/keys`."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    def _stored(self) -> StoredKeys:
        stored = self._owner.stored_keys()
        if stored is None:
            raise InvalidRequest(
                "Keys can be made while the gateway runs only with Redis (set redis.url); without it they stand in the file.",
                status=409,
                code="no_store",
            )
        return stored

    async def show(self, request: Request) -> Answer:
        """Every key, without its hash, and whoever has come with a token; with the minute of the last call."""
        rows = [keys.shown(entry, "file") for entry in self._owner.settings.keys]
        if self._owner.stored_keys() is not None:
            usable, unusable = await from_store(self._stored().keys())
            rows += [keys.shown(entry, "stored") for _, entry in sorted(usable.items())]
            rows += [{"name": name, "problem": problem, "origin": "stored"} for name, problem in sorted(unusable.items())]
            lost = await from_store(self._stored().lost())
            rows += [keys.shown(entry, "lost") for name, entry in sorted(lost.items()) if name not in usable]
        known = await from_store(self._owner.callers())
        rows += [keys.shown(caller, "token") for _, caller in sorted(known.tokens.items())]
        for row in rows:
            if (at := known.at.get(str(row["name"]))) is not None:
                row["last_used"] = minute(at)
        return as_json({"keys": rows})

    async def create(self, request: Request) -> Answer:
        """A new key, shown this once."""
        stored = self._stored()
        tree = _object(request.content)
        for name in _OURS:
            if name in tree:
                raise InvalidRequest(f"'{name}' is the gateway's to set.", param=name, code="invalid_value")
        secret, digest = keys.new_secret()
        entry = self._checked({**tree, "hash": digest, "created": time.time()})
        await self._refuse_lost(entry.name)
        if entry.name in {key.name for key in self._owner.settings.keys} or not await from_store(stored.create(entry)):
            raise InvalidRequest(f"There is a key '{entry.name}' already.", status=409, code="name_taken", param="name")
        log.info("key '%s' was made", entry.name)
        return as_json({"key": secret, **keys.shown(entry, "stored")}, 201)

    async def edit(self, request: Request) -> Answer:
        """A key with other limits; what is null is as if it had never been set. The key itself stays as it is."""
        stored, name = self._stored(), request.parts["name"]
        change = _object(request.content)
        for field in ("name", *_OURS):
            if field in change:
                raise InvalidRequest(f"'{field}' of a key cannot be changed.", param=field, code="invalid_value")
        if not change:
            raise InvalidRequest("Nothing is to be changed: name at least one field of the key.", code="invalid_value")
        found = await self._found(stored, name)
        # A field that is not known must reach the check, also where it is null.
        known = set(StoredKey.__struct_fields__)
        tree = {**msgspec.to_builtins(found), **change}
        tree = {field: value for field, value in tree.items() if value is not None or field not in known}
        entry = self._checked(tree)
        if not await from_store(stored.put(entry)):
            raise _unknown(name)
        log.info("key '%s' was changed: %s", name, ", ".join(sorted(change)))
        return as_json(keys.shown(entry, "stored"))

    def _checked(self, tree: dict[str, Any]) -> StoredKey:
        try:
            return keys.checked(config.convert(tree, StoredKey, ""), self._owner.settings)
        except ConfigError as error:
            raise InvalidRequest(f"{error.path.lstrip('.') or 'key'}: {error.problem}", param=error.path.lstrip(".") or None) from None

    async def rotate(self, request: Request) -> Answer:
        """A new secret for a key; the former one works on for a while."""
        stored, name = self._stored(), request.parts["name"]
        found = await self._found(stored, name)
        overlap_s = _object(request.content or b"{}").get("overlap_s", OVERLAP_S)
        if not isinstance(overlap_s, int | float) or not 0 <= overlap_s <= MAX_OVERLAP_S:
            raise InvalidRequest(f"'overlap_s' must be 0 to {MAX_OVERLAP_S:.0f} seconds.", param="overlap_s", code="invalid_value")
        secret, digest = keys.new_secret()
        entry = msgspec.structs.replace(found, hash=digest, old_hash=found.hash, old_until=time.time() + overlap_s)
        if not await from_store(stored.put(entry)):
            raise _unknown(name)
        log.info("key '%s' was rotated", name)
        return as_json({"key": secret, **keys.shown(entry, "stored")})

    async def revoke(self, request: Request) -> Answer:
        """A key that works no more, on every gateway within two seconds."""
        stored, name = self._stored(), request.parts["name"]
        self._refuse_configured(name)
        await self._refuse_lost(name)
        if not await from_store(stored.drop(name)):  # also one that cannot be read
            raise _unknown(name)
        log.info("key '%s' was revoked", name)
        return as_json({"revoked": name})

    async def export(self, request: Request) -> Answer:
        """Every stored key with its hash, for a safe place; what Redis has lost is among them."""
        usable, _ = await from_store(self._stored().keys())
        lost = await from_store(self._stored().lost())
        return as_json({"keys": [entry for _, entry in sorted({**usable, **lost}.items())]})

    async def take(self, request: Request) -> Answer:
        """Keys as they were exported. Those that are there already stay as they are; with `check` nothing is stored."""
        stored, settings = self._stored(), self._owner.settings
        tree = _object(request.content)
        rows, check = tree.get("keys"), tree.get("check", False)
        if not isinstance(rows, list) or not isinstance(check, bool) or set(tree) - {"keys", "check"}:
            raise InvalidRequest('The body must be {"keys": [...]}, as it was exported, and "check": true or false.', code="invalid_value")
        entries: dict[str, StoredKey] = {}
        for index, row in enumerate(rows):
            where = f"keys.{index}"
            try:
                entry = keys.checked(config.convert(row, StoredKey, where), settings, where)
            except ConfigError as error:
                raise InvalidRequest(f"{error.path}: {error.problem}", param=error.path) from None
            self._refuse_configured(entry.name)
            if entries.setdefault(entry.name, entry) is not entry:
                raise InvalidRequest(f"{where}.name: '{entry.name}' is there twice.", param=f"{where}.name", code="invalid_value")
        usable, unusable = await from_store(stored.keys())
        there = {*usable, *unusable, *await from_store(stored.lost())}
        fresh = [entry for name, entry in entries.items() if name not in there]
        if not check:
            fresh = [entry for entry in fresh if await from_store(stored.create(entry))]
            log.info("%d keys were imported", len(fresh))
        imported = sorted(entry.name for entry in fresh)
        return as_json({"imported": imported, "kept": sorted(set(entries) - set(imported))})

    async def restore(self, request: Request) -> Answer:
        """What Redis has lost is put back, or with `discard` given up at every gateway."""
        discard = _object(request.content or b"{}").get("discard", False)
        if not isinstance(discard, bool):
            raise InvalidRequest("'discard' must be true or false.", param="discard", code="invalid_value")
        names = await from_store(self._stored().restore(discard))
        log.info("%d lost keys were %s", len(names), "given up" if discard else "put back")
        return as_json({"discarded" if discard else "restored": names})

    def _refuse_configured(self, name: str) -> None:
        if name in {key.name for key in self._owner.settings.keys}:
            raise InvalidRequest(f"The key '{name}' stands in the configuration file: change it there.", status=409, code="key_in_file")

    async def _refuse_lost(self, name: str) -> None:
        """What is done to a key that the store has lost would not be heard of by those that still know it."""
        if name in await from_store(self._stored().lost()):
            raise InvalidRequest(
                f"Redis has lost the key '{name}', which still works: put it back first (penstock keys restore), or give up all that is"
                " lost (penstock keys restore --discard).",
                status=409,
                code="lost_key",
            )

    async def _found(self, stored: StoredKeys, name: str) -> StoredKey:
        self._refuse_configured(name)
        await self._refuse_lost(name)
        usable, unusable = await from_store(stored.keys())
        if name in unusable:
            raise InvalidRequest(f"The key '{name}' cannot be used ({unusable[name]}): revoke it.", status=409, code="unusable_key")
        if name not in usable:
            raise _unknown(name)
        return usable[name]


def _unknown(name: str) -> InvalidRequest:
    return InvalidRequest(f"There is no key '{name}'.", status=404, code="unknown_key")


def _object(content: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The request body must be a JSON object: {error}.", code="invalid_json") from None
