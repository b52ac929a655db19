"""Who has called, in Redis: the minutes of the last calls in a sorted set, and who comes with tokens in a hash beside it."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from gateway.access.callers import Known, TokenCaller
from gateway.access.limits.rules import StoreRefused
from gateway.store.connect import Client, Command, Script

# So many are kept for the whole deployment.
MAX_CALLERS = 20_000
_pack = msgspec.msgpack.Encoder().encode


class CallerStore:
    """The parent's; both methods raise StoreFailed while Redis is gone."""

    def __init__(self, client: Client, keep_days: int) -> None:
        self._client = client
        self._keep_s = keep_days * 86400
        self._keys = [client.key("callers", part) for part in ("at", "tokens")]
        self._script = Script("callers")

    async def write(self, part: Known) -> None:
        """Some of them; what another gateway knows later stays."""
        if not part.at and not part.tokens:
            return
        at = [value for item in part.at.items() for value in item]
        tokens = [value for name, caller in part.tokens.items() for value in (name, msgspec.json.encode(caller).decode())]
        oldest = int(time.time()) - self._keep_s
        answer = (await self._client.run([Command(self._script, self._keys, [_pack([oldest, self._keep_s, MAX_CALLERS, at, tokens])])]))[0]
        if isinstance(answer, StoreRefused):
            raise answer

    async def read(self) -> Known:
        """All of them. One that another version has written, and that cannot be read, is left out."""
        found: Any = await self._client.execute("ZRANGE", self._keys[0], 0, -1, "WITHSCORES")
        at = {name.decode(errors="replace"): int(float(score)) for name, score in _pairs(found)}
        tokens: dict[str, TokenCaller] = {}
        for name, content in _pairs(await self._client.execute("HGETALL", self._keys[1])):
            try:
                tokens[name.decode(errors="replace")] = msgspec.json.decode(content, type=TokenCaller)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                continue
        return Known(at, tokens)


def _pairs(found: Any) -> list[tuple[bytes, Any]]:
    """Of an answer that redis-py has put together, or has not."""
    if isinstance(found, dict):
        return list(found.items())
    if found and isinstance(found[0], tuple | list):
        return [(one, two) for one, two in found]
    return list(zip(found[::2], found[1::2], strict=True))
