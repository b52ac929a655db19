"""Who may call: keys from the configuration and keys that were made while the gateway runs, found by the SHA-256 of what a client sends."""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping

import msgspec

from gateway import config
from gateway.access.limits import rules
from gateway.access.limits.rules import Limit, Unit
from gateway.config import Allowance, Budget, KeyEntry, Limits, Settings, checks, verify_key
from gateway.config.vocabulary import KeyHash
from gateway.errors import ConfigError

log = logging.getLogger("penstock.keys")

# A list of stored keys that was not confirmed for so long is old: a revoked key may still work.
STALE_S = 10.0
# Of a new key: what it begins with, so that a scanner for leaked secrets knows it, and its random bytes.
PREFIX = "sk-penstock-"
_BYTES = 32
# Of the hash of a key that nobody knows: enough to tell two of them apart, and too little to find the key.
_SHOWN_DIGITS = 8


class StoredKey(KeyEntry, kw_only=True, frozen=True):
    """A key that was made while the gateway runs. After a rotation the former one works on until `old_until` (seconds since 1970)."""

    created: float = 0.0
    old_hash: KeyHash | None = None
    old_until: float = 0.0


class KeyList(msgspec.Struct, frozen=True):
    """Stored keys by name, the version of the list (0 where none was ever stored), and when that was confirmed, in seconds since 1970."""

    version: int = 0
    keys: dict[str, StoredKey] = {}
    at: float = 0.0


def checked(entry: StoredKey, settings: Settings, path: str = "") -> StoredKey:
    """A key that may be stored: what a key in the file must satisfy, by the same rules. Raises ConfigError."""
    verify_key(entry, path, settings)
    return entry


def read(name: str, content: bytes) -> StoredKey:
    """A stored key as it was written, perhaps by another version or by hand; its models need not be ours. Raises ConfigError."""
    try:
        entry = _sound(content) or config.convert(msgspec.json.decode(content), StoredKey, "")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError("", str(error) or type(error).__name__) from None
    if entry.name != name:
        raise ConfigError("name", f"'{entry.name[:64]}' is stored under another name")
    return entry


def _sound(content: bytes) -> StoredKey | None:
    """The key, if nothing is wrong with it: the list is read whole at every change, and saying what is wrong takes far longer."""
    try:
        entry = msgspec.json.decode(content, type=StoredKey)
        for digest in (entry.hash, entry.old_hash):
            if digest is not None:
                checks.key_hash(digest)
        if entry.expires is not None:
            checks.instant(entry.expires)
    except (ValueError, OverflowError, RecursionError):  # msgspec's own are ValueErrors
        return None
    return entry


class Caller:
    """A key ready for use: who it is, what it may, and its limits by model."""

    __slots__ = ("_by_model", "_entry", "_limits", "_models", "expires_at", "max_grammar_bytes", "max_n", "max_prompt_bytes",
                 "max_tokens", "models", "name", "priority", "salt", "team", "weight")  # fmt: skip

    def __init__(self, entry: KeyEntry | None, settings: Settings) -> None:
        entry = entry or KeyEntry(name="", hash="")
        self._entry = entry
        self.name = entry.name
        self.models = frozenset(entry.models) if entry.models is not None else None
        self.max_n, self.max_tokens = entry.max_n, entry.max_tokens
        self.max_prompt_bytes, self.max_grammar_bytes = entry.max_prompt_bytes, entry.max_grammar_bytes
        self.priority, self.weight = entry.priority, entry.weight
        self.expires_at = config.instant(entry.expires) if entry.expires is not None else float("inf")
        isolated = entry.name and settings.limits.isolate_prefix_cache
        # Whoever shares a prefix cache can tell by its speed what others have asked. The name would do; its hash cannot be guessed at.
        self.salt = hashlib.sha256(f"penstock:{entry.name}:{entry.hash}".encode()).hexdigest()[:32] if isolated else ""
        # One that is not configured any more has no limits to share.
        self.team = next((team for team in settings.teams if team.name == entry.team), None)
        self._limits, self._models = settings.limits, settings.models
        self._by_model: dict[str, tuple[Limit, ...]] = {}

    def limits(self, model: str) -> tuple[Limit, ...]:
        """Every limit that a request for this (configured) model must pass, the model's own included."""
        found = self._by_model.get(model)
        if found is None:
            found = self._by_model[model] = tuple(self._compile(model))
        return found

    def _compile(self, model: str) -> Iterable[Limit]:
        entry, burst_s = self._entry, self._limits.burst_s
        if self.name:
            yield from compiled(f"key/{self.name}", f"key '{self.name}'", entry, burst_s)
            yield from spending(f"key/{self.name}", f"key '{self.name}'", entry.budget)
            if model in entry.per_model:
                whose = f"key '{self.name}' on model '{model}'"
                yield from compiled(f"key/{self.name}/model/{model}", whose, entry.per_model[model], burst_s)
        if self.team is not None:
            yield from compiled(f"team/{self.team.name}", f"team '{self.team.name}'", self.team, burst_s)
            yield from spending(f"team/{self.team.name}", f"team '{self.team.name}'", self.team.budget)
        yield from compiled(f"model/{model}", f"model '{model}'", self._models[model].limits, burst_s)


def spending(key: str, whose: str, budget: Budget | None) -> Iterable[Limit]:
    """A budget, as a limit."""
    if budget is not None:
        yield rules.quota(f"{key}/budget", whose, Unit.MONEY, budget.amount * rules.NANO, budget.per)


def compiled(key: str, whose: str, limits: Limits, burst_s: float) -> Iterable[Limit]:
    """What of rpm, tpm, max_in_flight and tokens_per_day is set, as limits."""
    if limits.rpm is not None:
        yield rules.rate(f"{key}/rpm", whose, Unit.REQUESTS, limits.rpm, burst_s)
    if limits.tpm is not None:
        yield rules.rate(f"{key}/tpm", whose, Unit.TOKENS, limits.tpm, burst_s)
    if limits.max_in_flight is not None:
        yield rules.slots(f"{key}/in_flight", whose, limits.max_in_flight)
    if limits.tokens_per_day is not None:
        yield rules.quota(f"{key}/day", whose, Unit.DAY, limits.tokens_per_day, "day")


class Keys:
    """Every key that is known now. Revoking one is not knowing it any more."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._confirmed_at = time.monotonic()
        self._lost = 0
        # Where keys are stored: has what was stored up to now learnt, before a key is said to be unknown.
        self.refresh: Callable[[], Awaitable[None]] | None = None
        self.known = KeyList()
        self.required = settings.keys_required()
        self.nobody = Caller(None, settings)
        self._configured = [
            (bytes.fromhex(entry.hash.removeprefix("sha256:")), Caller(entry, settings), float("inf")) for entry in settings.keys
        ]
        self._by_start: dict[bytes, list[tuple[bytes, Caller, float]]] = {}
        self._stored: dict[str, tuple[StoredKey, list[tuple[bytes, Caller, float]]]] = {}
        self._index()

    def learn(self, entries: Mapping[str, StoredKey]) -> None:
        """These are the stored keys from now on. One that has a configured key's name is not used."""
        configured = {entry.name for entry in self._settings.keys}
        known: dict[str, tuple[StoredKey, list[tuple[bytes, Caller, float]]]] = {}
        for name, entry in entries.items():
            before = self._stored.get(name)
            if name in configured:
                continue
            try:
                known[name] = before if before is not None and before[0] == entry else (entry, self._rows(entry))
            except Exception:  # a fault of ours; whatever it is, it is no reason to keep the others from being learnt or revoked
                log.exception("the stored key '%s' cannot be used", name)
        self._stored = known
        self._index()

    def _rows(self, entry: StoredKey) -> list[tuple[bytes, Caller, float]]:
        caller = Caller(entry, self._settings)
        hashes = [(entry.hash, float("inf")), *([(entry.old_hash, entry.old_until)] if entry.old_hash is not None else [])]
        return [(bytes.fromhex(digest.removeprefix("sha256:")), caller, until) for digest, until in hashes]

    def begin(self, known: KeyList) -> None:
        """With what was known to this gateway before."""
        self.known = known
        self.learn(known.keys)

    def confirmed(self, lost: int) -> None:
        """The stored keys are those that were last learnt; so many of them the store has lost."""
        self._confirmed_at = time.monotonic()
        self._lost = lost

    def age_s(self) -> float:
        """For how long the stored keys have not been confirmed, in seconds; 0 where there can be none."""
        return time.monotonic() - self._confirmed_at if self._settings.redis.url is not None else 0.0

    def problem(self) -> str:
        """What an operator should know of the stored keys, or ""."""
        age_s = self.age_s()
        if age_s > STALE_S:
            return f"the list of stored keys is {age_s:.0f} s old: a key revoked since then still works"
        return f"Redis has lost {self._lost} stored keys, which still work here: penstock keys restore" if self._lost else ""

    def _index(self) -> None:
        self._by_start = {}
        for row in (*self._configured, *(row for _, rows in self._stored.values() for row in rows)):
            self._by_start.setdefault(row[0][:8], []).append(row)

    def find(self, secret: bytes) -> Caller | None:
        """Whose key this is. Keys are found by the beginning of their hash, which tells nothing of the key, and compared in constant
        time."""
        digest = hashlib.sha256(secret).digest()
        found: Caller | None = None
        for expected, caller, until in self._by_start.get(digest[:8], ()):
            if hmac.compare_digest(digest, expected) and time.time() < min(until, caller.expires_at):
                found = caller
        return found

    def why_not(self, secret: bytes) -> str:
        """What an operator should know of a key that was refused; its name where it was good once."""
        digest = hashlib.sha256(secret).digest()
        for expected, caller, _ in self._by_start.get(digest[:8], ()):
            if hmac.compare_digest(digest, expected):
                return f"the key '{caller.name}' {'has expired' if time.time() >= caller.expires_at else 'was replaced: it was rotated'}"
        return f"no key is known whose SHA-256 begins with {digest.hex()[:_SHOWN_DIGITS]}"


def new_secret() -> tuple[str, str]:
    """A new key, and what is kept of it."""
    secret = PREFIX + secrets.token_urlsafe(_BYTES)
    return secret, hashed(secret)


def hashed(secret: str) -> str:
    """What is kept of a key."""
    return f"sha256:{hashlib.sha256(secret.encode()).hexdigest()}"


def shown(entry: Allowance, origin: str) -> dict[str, object]:
    """A key as `/admin/keys` shows it: everything but hashes."""
    tree: dict[str, object] = msgspec.to_builtins(entry)
    for name in ("hash", "old_hash"):
        tree.pop(name, None)
    return {**{name: value for name, value in tree.items() if value not in (None, {}, [])}, "origin": origin}
