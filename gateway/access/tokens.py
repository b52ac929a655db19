"""Tokens of identity providers (JWT) as a second way to be a caller: whose a token is, and what it may.

A token is checked once and then known until it expires: its signature takes a worker as long as a small request. What a token says of its
holder is turned into what the rest of the gateway knows of a key: a name, a team, models, limits.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jwt

from gateway.access.callers import TokenCaller
from gateway.access.issuer import UNKNOWN_S, KeySet
from gateway.access.keys import Caller
from gateway.config import Allowance, Issuer, KeyEntry, Settings
from gateway.errors import InvalidKey, InvalidRequest, Unavailable, shortened
from gateway.telemetry.metrics import Metrics

# A larger token is refused unread; those of people in hundreds of groups have some kilobytes.
MAX_BYTES = 16 << 10
# So many tokens that were found good, and so many callers of a provider, are known at once to a worker.
_KNOWN = 10_000
# Of a caller's name: characters that stay as they are, beside letters, digits and `_.-~`; and how long it may be.
_PLAIN, _MAX_NAME = "@:+=,|", 256
# What a token must say, whatever else it says.
_REQUIRED = ["exp", "iss", "aud"]


class Tokens:
    """Those of every provider that is configured."""

    def __init__(self, settings: Settings, home: Path, metrics: Metrics) -> None:
        # What was found good, by its SHA-256: whose it is, and until when.
        self._good: dict[bytes, tuple[Caller, float]] = {}
        self._callers = {issuer.issuer: _Callers(issuer, settings) for issuer in settings.oidc}
        # A key that was withdrawn takes its tokens with it.
        self._keys = {issuer.issuer: KeySet(issuer, home, metrics, self._good.clear) for issuer in settings.oidc}

    def fresh(self) -> list[TokenCaller]:
        """Holders of tokens that were not known before, or not as this, since this was last asked."""
        return [caller for callers in self._callers.values() for caller in callers.fresh()]

    def open(self) -> None:
        """Fetch the providers' keys, now and again and again; they need not be there."""
        for keys in self._keys.values():
            keys.open()

    async def aclose(self) -> None:
        """Stop that."""
        await asyncio.gather(*(keys.aclose() for keys in self._keys.values()))

    async def find(self, secret: bytes) -> Caller:
        """Whose token this is. Raises InvalidKey for one that is not good, InvalidRequest for a good one whose holder may not call, and
        Unavailable where it cannot be told because the provider's keys are not known yet."""
        if len(secret) > MAX_BYTES:
            raise InvalidKey(f"a token of {len(secret)} bytes was sent; at most {MAX_BYTES} are read")
        digest = hashlib.sha256(secret).digest()
        known = self._good.get(digest)
        if known is not None:
            if time.time() < known[1]:
                return known[0]
            del self._good[digest]
        caller, until = await self._checked(secret)
        while len(self._good) >= _KNOWN:
            del self._good[next(iter(self._good))]  # the one that was found good first
        self._good[digest] = caller, until
        return caller

    async def _checked(self, secret: bytes) -> tuple[Caller, float]:
        """The caller, and until when the token is good."""
        try:
            said = jwt.decode_complete(secret, options={"verify_signature": False})
        except (jwt.PyJWTError, ValueError, RecursionError) as error:
            raise InvalidKey(f"the token is malformed: {shortened(str(error))}") from None
        header, claims = said["header"], said["payload"]
        url, algorithm, id = claims.get("iss"), header.get("alg"), header.get("kid")
        callers = self._callers.get(url) if isinstance(url, str) else None
        if callers is None:
            raise InvalidKey(f"the token is of an issuer that is not configured: {shortened(str(url))}")
        issuer = callers.issuer
        if algorithm not in issuer.algorithms:
            raise InvalidKey(f"the token is signed with {shortened(str(algorithm))}; accepted: {', '.join(issuer.algorithms)}")
        keys = self._keys[issuer.issuer]
        key = await keys.key(id, algorithm)
        if key is None:
            if not keys.known():
                raise Unavailable(
                    f"The identity provider '{issuer.name}' does not answer, so its tokens cannot be checked.",
                    code="identity_provider_unavailable", retry_after_s=UNKNOWN_S,
                )  # fmt: skip
            named = f"the key id {shortened(id)}" if id is not None else "no key id"
            raise InvalidKey(f"the token names {named}; '{issuer.name}' has no such key for {algorithm}")
        try:
            claims = jwt.decode(
                secret, key, algorithms=issuer.algorithms, audience=issuer.audience, issuer=issuer.issuer, leeway=issuer.leeway_s,
                options={"require": _REQUIRED},
            )  # fmt: skip
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise InvalidKey(f"the token of '{issuer.name}' is not good: {shortened(str(error))}") from None
        return callers.of(claims), float(claims["exp"]) + issuer.leeway_s


class _Callers:
    """What the tokens of one provider make of their holders."""

    def __init__(self, issuer: Issuer, settings: Settings) -> None:
        self.issuer = issuer
        self._settings = settings
        self._teams = {team.name for team in settings.teams}
        # Whoever comes with a new token has its limits compiled already.
        self._known: dict[tuple[str, str, str | None, tuple[str, ...] | None], Caller] = {}
        # What was last told of each, and what is to be told.
        self._told: dict[str, Caller] = {}
        self._fresh: dict[str, TokenCaller] = {}

    def fresh(self) -> list[TokenCaller]:
        """See `Tokens`."""
        fresh, self._fresh = self._fresh, {}
        return list(fresh.values())

    def of(self, claims: Mapping[str, Any]) -> Caller:
        """Raises InvalidKey where it cannot be told who it is, InvalidRequest for those who may not call."""
        issuer = self.issuer
        name = self._name(claim(claims, issuer.name_claim))
        mine = set(words(claim(claims, issuer.groups_claim)))
        group = next((group for group in issuer.groups if group.name in mine), None)
        if group is None and issuer.require_group:
            raise InvalidRequest(
                "Your token is good, but you are in none of the groups that may call.", status=403, code="not_in_group",
                detail=f"'{name}' is in none of the configured groups",
            )  # fmt: skip
        allowed: Allowance = group or issuer.default
        team = claim(claims, issuer.team_claim) if issuer.team_claim is not None else None
        team = team if isinstance(team, str) and team in self._teams else allowed.team
        named = claim(claims, issuer.models_claim) if issuer.models_claim is not None else None
        models = allowed.models if named is None else words(named)
        place = (name, group.name if group is not None else "", team, tuple(models) if models is not None else None)
        found = self._known.get(place)
        if found is not None and self._told.get(name) is found:
            return found
        fields = {field: getattr(allowed, field) for field in Allowance.__struct_fields__} | {"team": team, "models": models}
        if found is None:
            if len(self._known) >= _KNOWN:
                self._known.clear()
                self._told.clear()
            found = self._known[place] = Caller(KeyEntry(name=name, hash=issuer.issuer, **fields), self._settings)
        self._told[name] = found
        self._fresh[name] = TokenCaller(name=name, **fields)
        return found

    def _name(self, said: object) -> str:
        """What the rest of the gateway calls the holder: it can be no key's name, since those hold no colon, nor two holders' name."""
        if not isinstance(said, str) or not said:
            raise InvalidKey(f"the token of '{self.issuer.name}' has no text as '{self.issuer.name_claim}'")
        try:
            name = f"{self.issuer.name}:{quote(said, safe=_PLAIN)}"
        except UnicodeEncodeError:  # half of a surrogate pair
            raise InvalidKey(f"'{self.issuer.name_claim}' of the token of '{self.issuer.name}' is no text") from None
        if len(name) > _MAX_NAME:
            raise InvalidKey(f"'{self.issuer.name_claim}' of the token of '{self.issuer.name}' is too long for a name")
        return name


def claim(claims: Mapping[str, Any], path: str) -> Any:
    """A claim of that name, or else what its dots lead to; None where there is none."""
    if path in claims:
        return claims[path]
    here: Any = claims
    for part in path.split("."):
        if not isinstance(here, dict):
            return None
        here = here.get(part)
    return here


def words(value: Any) -> list[str]:
    """The texts of a list, or of one text with spaces between them."""
    if isinstance(value, str):
        return value.split()
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []
