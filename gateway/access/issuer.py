"""The keys that an identity provider signs its tokens with (a JSON Web Key Set): fetched, kept, and fetched again.

Keys that were fetched hold until others are: a provider that is down keeps nobody out whose token is good. They outlive the process in a
file, so that a gateway that is started meanwhile knows them too. What anybody may cause by a token is bounded: a key id that is not known
has the set fetched again, at most once in UNKNOWN_S however many there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from gateway.config import Issuer, without_secrets
from gateway.home import private, state_folder
from gateway.lifeline import Backoff
from gateway.supervision import once, supervise
from gateway.telemetry.metrics import ISSUER_FETCHES, ISSUER_UP, Metrics
from gateway.wire import address

log = logging.getLogger("penstock.issuer")

# How long one answer of a provider may take, and how large it may be; of its keys so many are looked at.
LIMIT_S, MAX_BYTES, MAX_KEYS = 5.0, 1 << 20, 100
# How often at most keys are fetched because a token names one that is not known, or because there are none yet.
UNKNOWN_S = 5.0
# Of RSA keys: below it anybody might find the private one, above it a signature takes the worker longer than its request.
RSA_BITS = (2048, 8192)
_DISCOVERY = "/.well-known/openid-configuration"
_KINDS = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}

Jwk = Mapping[str, Any]


class IssuerFailed(Exception):
    """The provider does not answer, or not with keys."""


class _Kept(msgspec.Struct):
    """Keys as they lie in a file, and whose they are."""

    issuer: str
    jwks_url: str | None
    keys: list[dict[str, Any]]


async def fetch(issuer: Issuer) -> list[dict[str, Any]]:
    """The provider's keys as it publishes them, those that could sign a token. Raises IssuerFailed."""
    try:
        context = ssl.create_default_context(cafile=issuer.ca_file)
    except OSError as error:
        raise IssuerFailed(f"ca_file cannot be used: {error}") from None
    timeout = aiohttp.ClientTimeout(total=LIMIT_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(ssl=context)) as session:
        url = issuer.jwks_url or await _discovered(session, issuer)
        found = (await _get(session, url)).get("keys")
    if not isinstance(found, list):
        raise IssuerFailed(f"{url} holds no list of keys")
    keys = [jwk for jwk in found[:MAX_KEYS] if isinstance(jwk, dict) and _signs(jwk)]
    if not keys:
        raise IssuerFailed(f"{url} holds no key that signs")
    return keys


async def _discovered(session: aiohttp.ClientSession, issuer: Issuer) -> str:
    url = issuer.issuer.rstrip("/") + _DISCOVERY
    document = await _get(session, url)
    if document.get("issuer") != issuer.issuer:
        raise IssuerFailed(f"{url} is of another issuer: {str(document.get('issuer'))[:200]!r}")
    found = document.get("jwks_uri")
    try:
        # What comes over TLS must not lead to keys that do not.
        address.check_url(str(found), ("https",) if url.startswith("https") else ("https", "http"), path=True)
    except ValueError as error:
        raise IssuerFailed(f"{url} says as jwks_uri {str(found)[:200]!r}, which {error}") from None
    return str(found)


async def _get(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    try:
        async with session.get(url, allow_redirects=False, headers={"accept": "application/json"}) as answer:
            if answer.status != 200:
                raise IssuerFailed(f"{url} answers with {answer.status}")
            content = b""
            async for part in answer.content.iter_chunked(1 << 16):
                content += part
                if len(content) > MAX_BYTES:
                    raise IssuerFailed(f"{url} answers with more than {MAX_BYTES >> 20} MB")
        return msgspec.json.decode(content, type=dict[str, Any])
    except TimeoutError:
        raise IssuerFailed(f"{url} does not answer within {LIMIT_S:g} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise IssuerFailed(f"{urlsplit(url).netloc} does not answer: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise IssuerFailed(f"{url} answers with no JSON object: {error}") from None


def _signs(jwk: Jwk) -> bool:
    operations = jwk.get("key_ops")
    return (
        jwk.get("kty") in _KINDS.values()
        and jwk.get("use", "sig") == "sig"
        and (not isinstance(operations, list) or "verify" in operations)
        and isinstance(jwk.get("kid", ""), str)
    )


def _fits(jwk: Jwk, algorithm: str) -> bool:
    """Whether a key may be used with an algorithm: by its kind, and by its own word where it has one."""
    said = jwk.get("alg")
    return jwk["kty"] == _KINDS[algorithm[:2]] and said in (None, algorithm, *(("Ed25519", "Ed448") if algorithm == "EdDSA" else ()))


class KeySet:
    """The keys of one provider in one worker. `changed` is called when some of them are no longer what they were."""

    def __init__(self, issuer: Issuer, home: Path, metrics: Metrics, changed: Callable[[], None]) -> None:
        self._issuer = issuer
        self._home = home
        self._metrics = metrics
        self._changed = changed
        self._keys: Sequence[Jwk] = self._read()
        self._ready: dict[tuple[str, str], jwt.PyJWK] = {}
        self._tried = self._down = False
        self._asked_at = float("-inf")
        self._fetching: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Fetch them now, and again and again."""
        self._metrics.put(ISSUER_UP, 0.0, (self._issuer.name,))
        self._following = supervise(f"keys of {self._issuer.name}", self._follow, self._metrics.failed)

    async def aclose(self) -> None:
        """Stop that."""
        tasks = [task for task in (self._following, self._fetching) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self) -> None:
        backoff = Backoff()
        while True:
            await self._fetched()
            # Not all workers of all gateways at once.
            delay_s = backoff.next(0.0) if self._down else self._issuer.refresh_s * random.uniform(0.9, 1.0)  # noqa: S311
            if not self._down:
                backoff = Backoff()
            await asyncio.sleep(delay_s)

    def known(self) -> bool:
        """Whether there are any."""
        return bool(self._keys)

    async def key(self, id: str | None, algorithm: str) -> jwt.PyJWK | None:
        """The key of this id, for this algorithm; without an id the only one that fits. None where there is none, which is said after the
        provider was asked again, or was asked a moment ago."""
        if not self._tried:
            await self._fetched()  # what lay in the file may have been withdrawn
        found = self._find(id, algorithm)
        if found is None and (id is not None or not self._keys):
            now = time.monotonic()
            if self._fetching is not None or now - self._asked_at >= UNKNOWN_S:
                self._asked_at = now
                await self._fetched()
                found = self._find(id, algorithm)
        return found

    def _find(self, id: str | None, algorithm: str) -> jwt.PyJWK | None:
        fitting = [jwk for jwk in self._keys if (id is None or jwk.get("kid") == id) and _fits(jwk, algorithm)]
        if len(fitting) != 1:
            return None
        place = str(fitting[0].get("kid")), algorithm
        found = self._ready.get(place)
        if found is None:
            try:
                found = jwt.PyJWK(dict(fitting[0]), algorithm=algorithm)
            except (jwt.PyJWTError, ValueError, TypeError, KeyError) as error:
                log.warning("issuer '%s': its key %.64r cannot be used: %s", self._issuer.name, place[0], error)
                return None
            bits = found.key.key_size if isinstance(found.key, RSAPublicKey) else RSA_BITS[0]
            if not RSA_BITS[0] <= bits <= RSA_BITS[1]:
                log.warning("issuer '%s': its key %.64r has %d bits; accepted: %d to %d", self._issuer.name, place[0], bits, *RSA_BITS)
                return None
            self._ready[place] = found
        return found

    async def _fetched(self) -> None:
        """Once, for everybody who waits for it."""
        if self._fetching is None:
            self._fetching = once(f"fetching keys of {self._issuer.name}", self._fetch(), self._metrics.failed)
        await asyncio.shield(self._fetching)

    async def _fetch(self) -> None:
        name = self._issuer.name
        try:
            keys = await fetch(self._issuer)
        except IssuerFailed as error:
            self._metrics.add(ISSUER_FETCHES, (name, "failed"))
            if not self._down:
                what = "those that are known still hold" if self._keys else "no token can be checked"
                log.error("issuer '%s': its keys cannot be fetched (%s): %s", name, without_secrets(str(error)), what)
            self._down = True
        else:
            self._metrics.add(ISSUER_FETCHES, (name, "ok"))
            if self._down:
                log.warning("issuer '%s': its keys can be fetched again", name)
            self._down = False
            self._learn(keys)
        finally:
            self._metrics.put(ISSUER_UP, float(not self._down), (name,))
            self._tried = True
            self._fetching = None

    def _learn(self, keys: list[dict[str, Any]]) -> None:
        if keys == self._keys:
            return
        withdrawn = [jwk for jwk in self._keys if jwk not in keys]
        self._keys = keys
        self._ready.clear()
        if withdrawn:
            self._changed()
        log.info("issuer '%s' has %d keys", self._issuer.name, len(keys))
        self._write(keys)

    @property
    def _file(self) -> Path:
        return self._home / "state" / f"issuer-{self._issuer.name}.json"

    def _read(self) -> list[dict[str, Any]]:
        try:
            kept = msgspec.json.decode(self._file.read_bytes(), type=_Kept)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return []  # they are fetched in any case
        ours = (kept.issuer, kept.jwks_url) == (self._issuer.issuer, self._issuer.jwks_url)
        return [jwk for jwk in kept.keys if _signs(jwk)] if ours else []

    def _write(self, keys: list[dict[str, Any]]) -> None:
        content = msgspec.json.encode(_Kept(self._issuer.issuer, self._issuer.jwks_url, keys))
        fresh = self._file.with_suffix(f".{os.getpid()}.new")
        try:
            state_folder(self._home)
            with open(fresh, "wb", opener=private) as out:
                out.write(content)
            fresh.replace(self._file)
        except OSError as error:
            log.warning("issuer '%s': its keys cannot be kept for the next start: %s", self._issuer.name, error)
            with contextlib.suppress(OSError):
                fresh.unlink()
