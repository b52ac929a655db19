"""A client of whatever Redis is configured: one server, a master that sentinels name, or a cluster."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import redis.asyncio as redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from gateway.config import Redis
from gateway.errors import ConfigError

# An answer that takes longer than this will not come: the connection is given up, and with it whatever was asked on it.
SOCKET_TIMEOUT_S = 1.0
# What a client may raise whose server is gone.
FAILURES = (RedisError, OSError, TimeoutError)


class Script:
    """A script of ours, by its name and the SHA-1 that Redis knows it under."""

    def __init__(self, name: str) -> None:
        self.text = files("gateway.store").joinpath(f"lua/{name}.lua").read_text(encoding="utf-8")
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest().encode()


class Client:
    """Pipelines of scripts and plain commands; a script that the server has forgotten is told it again."""

    def __init__(self, settings: Redis) -> None:
        self._settings = settings
        self._client = _client(settings)

    def key(self, *parts: str) -> bytes:
        """A key of this deployment; as bytes, which redis-py passes on as they are."""
        return f"penstock:{{{self._settings.prefix}}}:{':'.join(parts)}".encode()

    async def run(self, commands: Sequence[tuple[Script, Sequence[bytes], Sequence[Any]]]) -> list[Any]:
        """Run scripts in their order, each atomic, in one round trip. Raises one of FAILURES."""
        answers = await self._pipeline([("EVALSHA", script.sha, len(keys), *keys, *arguments) for script, keys, arguments in commands])
        forgotten = [index for index, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if forgotten:
            for index in forgotten:
                script, keys, arguments = commands[index]
                answers[index] = await self._client.execute_command("EVAL", script.text, len(keys), *keys, *arguments)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    async def _pipeline(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False) if not self._settings.cluster else self._client.pipeline()
        for command in commands:
            pipeline.execute_command(*command)
        found: list[Any] = await pipeline.execute(raise_on_error=False)
        return found

    async def execute(self, *command: Any) -> Any:
        """One plain command. Raises one of FAILURES."""
        return await self._client.execute_command(*command)

    async def aclose(self) -> None:
        """Close every connection."""
        await self._client.aclose()


def _client(settings: Redis) -> Any:
    """Raises ConfigError for what only a file tells."""
    assert settings.url is not None
    options: dict[str, Any] = {
        "socket_timeout": SOCKET_TIMEOUT_S,
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
            places = [(place.rpartition(":")[0], int(place.rpartition(":")[2])) for place in settings.sentinels]
            parsed = redis.ConnectionPool.from_url(settings.url, **options).connection_kwargs
            kept = {name: value for name, value in parsed.items() if name not in ("host", "port")}
            asking = {"socket_timeout": SOCKET_TIMEOUT_S, "socket_connect_timeout": SOCKET_TIMEOUT_S, "protocol": 2}
            sentinel: Any = Sentinel(places, sentinel_kwargs=asking, **kept)  # type: ignore[no-untyped-call]
            return sentinel.master_for(settings.service)
        return redis.Redis.from_url(settings.url, **options)
    except (ValueError, RedisError) as error:
        raise ConfigError("redis.url", f"is not accepted: {error}") from None
