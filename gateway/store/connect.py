"""A client of whatever Redis is configured: one server, a master that sentinels name, or a cluster. Its exceptions end here: what leaves
this file is StoreFailed, or StoreRefused in the place of a single answer."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import redis.asyncio as redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisClusterException, RedisError

from gateway.access.limits.rules import StoreFailed, StoreRefused
from gateway.config import Redis
from gateway.errors import ConfigError

# An answer that takes longer than this (and than `redis.store_timeout_ms`) will not come: the connection is given up, and with it whatever
# was asked on it.
SOCKET_TIMEOUT_S = 1.0
_FAILURES = (RedisError, RedisClusterException, OSError, TimeoutError)
# Error codes by which a server says that it cannot serve us at all, whatever we ask. In a script's error Redis 6.2 has them in the middle.
_UNFIT = re.compile(
    r"\b(READONLY|LOADING|OOM|MISCONF|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|MOVED|ASK|NOAUTH|NOPERM|WRONGPASS|NOREPLICAS|BUSY|UNKILLABLE)\b"
)


# What an operator should know of a server of which `Client.forgets` is true.
FORGETS = "keeps nothing on disk: stored keys and the ledger are gone when it is started again (set appendonly yes there)"


class Script:
    """A script of ours, by its name and the SHA-1 that Redis knows it under."""

    def __init__(self, name: str) -> None:
        self.text = files("gateway.store").joinpath(f"lua/{name}.lua").read_text(encoding="utf-8")
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest().encode()


class Command(NamedTuple):
    """A script with its keys and arguments."""

    script: Script
    keys: Sequence[bytes]
    arguments: Sequence[Any]


class Client:
    """Pipelines of scripts and plain commands. A script goes whole until the server has answered it once, so that the order of a round
    holds from the first; one that the server has forgotten since is told it again, behind the others."""

    def __init__(self, settings: Redis) -> None:
        self._settings = settings
        self._client = _client(settings)
        self._loaded: set[bytes] = set()

    def key(self, *parts: str) -> bytes:
        """A key of this deployment; as bytes, which redis-py passes on as they are."""
        return f"penstock:{{{self._settings.prefix}}}:{':'.join(parts)}".encode()

    async def run(self, commands: Sequence[Command]) -> list[Any]:
        """Run scripts in their order, each atomic, in one round trip. In the place of an answer stands a StoreRefused where a script met
        with a value that is not ours. Raises StoreFailed."""
        try:
            answers = await self._pipeline([self._call(command) for command in commands])
            forgotten = [index for index, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
            if forgotten:
                self._loaded.clear()
                for index, answer in zip(forgotten, await self._pipeline([self._call(commands[at]) for at in forgotten]), strict=True):
                    answers[index] = answer
            self._loaded.update(command.script.sha for command in commands)
            return [_judged(answer) if isinstance(answer, Exception) else answer for answer in answers]
        except _FAILURES as error:
            raise await self._failed(error) from None

    def _call(self, command: Command) -> tuple[Any, ...]:
        script, keys, arguments = command
        if script.sha in self._loaded:
            return ("EVALSHA", script.sha, len(keys), *keys, *arguments)
        return ("EVAL", script.text, len(keys), *keys, *arguments)

    async def _pipeline(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False) if not self._settings.cluster else self._client.pipeline()
        for command in commands:
            pipeline.execute_command(*command)
        found: list[Any] = await pipeline.execute(raise_on_error=False)
        return found

    async def execute(self, *command: Any) -> Any:
        """One plain command. Raises StoreFailed."""
        try:
            return await self._client.execute_command(*command)
        except _FAILURES as error:
            raise await self._failed(error) from None

    async def forgets(self) -> bool:
        """Whether all is gone when this server is started again; False where it does not say. Raises nothing."""
        with contextlib.suppress(StoreFailed):
            return [await self._configured(name) for name in ("save", "appendonly")] == ["", "no"]
        return False

    async def _configured(self, name: str) -> str | None:
        found = await self.execute("CONFIG GET", name)
        value = found.get(name) if isinstance(found, dict) else (found or [None])[-1]
        return value.decode() if isinstance(value, bytes) else value

    async def _failed(self, error: Exception) -> StoreFailed:
        """A server that answers that it is of no use to us is left: behind the same address, or by the sentinels' word, may be another one
        by now, and a connection that stays would never meet it (a master that was demoted keeps its clients)."""
        self._loaded.clear()
        if isinstance(error, RedisError) and _UNFIT.search(_words(error)):
            with contextlib.suppress(*_FAILURES):
                if self._settings.cluster:
                    await self._client.aclose()  # which it opens anew, nodes and all, when it is next asked
                else:
                    await self._client.connection_pool.disconnect()
        return StoreFailed(_words(error))

    async def aclose(self) -> None:
        """Close every connection."""
        await self._client.aclose()


def _judged(error: Exception) -> StoreRefused:
    """An error in the place of one answer: of that question alone, or (raised) of the whole server."""
    if not isinstance(error, RedisError) or _UNFIT.search(_words(error)):
        raise error
    return StoreRefused(_words(error))


def _words(error: Exception) -> str:
    """What the server or the system says, with the code that redis-py has taken out of it."""
    code = getattr(error, "status_code", None)
    return f"{code} {error}" if code else str(error) or type(error).__name__


def _client(settings: Redis) -> Any:
    """Raises ConfigError for what only a file tells."""
    assert settings.url is not None
    options: dict[str, Any] = {
        "socket_timeout": max(SOCKET_TIMEOUT_S, settings.store_timeout_ms / 1000),
        "socket_connect_timeout": SOCKET_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),  # what was not answered is for the store to judge
        "protocol": 2,
    }
    if settings.username is not None:
        options["username"] = settings.username
    if settings.password_file is not None:
        try:
            options["password"] = Path(settings.password_file).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise ConfigError("redis.password_file", f"cannot be read: {error}") from None
    if settings.ca_file is not None and settings.url.startswith("rediss://"):
        options["ssl_ca_certs"] = settings.ca_file
    try:
        if settings.cluster:
            return RedisCluster.from_url(settings.url, **options)
        if settings.sentinels:
            addresses = [(address.rpartition(":")[0], int(address.rpartition(":")[2])) for address in settings.sentinels]
            parsed = redis.ConnectionPool.from_url(settings.url, **options).connection_kwargs
            kept = {name: value for name, value in parsed.items() if name not in ("host", "port")}
            asking = {"socket_timeout": SOCKET_TIMEOUT_S, "socket_connect_timeout": SOCKET_TIMEOUT_S, "protocol": 2}
            sentinel: Any = Sentinel(addresses, sentinel_kwargs=asking, **kept)  # type: ignore[no-untyped-call]
            return sentinel.master_for(settings.service)
        return redis.Redis.from_url(settings.url, **options)
    except (ValueError, RedisError) as error:
        raise ConfigError("redis.url", f"is not accepted: {error}") from None
