"""Tokens as a host counts them, where nobody has told how many there are."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from backends.sglang_dsv3.abandon import MAX_JSON_BYTES
from backends.sglang_dsv3.continuation import placing
from backends.sglang_dsv3.host import EngineHost
from backends.sglang_dsv3.transport import ConnectFailed, ConnectionLost, request
from gateway.plugin import Call
from gateway.wire import body


class Counting:
    """Asks one host, on behalf of one attempt."""

    def __init__(self, host: EngineHost, trace: Mapping[str, str], connect_s: float) -> None:
        self._host = host
        self._trace = trace
        self._connect_s = connect_s

    async def of_chat(self, chat: Call) -> int:
        """Of a chat's prompt; 0 where that is not told."""
        return len(await self._ids(placing.tokenize_body(chat)))

    async def of_prompt(self, model: str, prompt: str) -> int:
        """Of a completion's; 0 where that is not told."""
        return len(await self._ids(body.splice({}, {"model": model, "prompt": prompt})))

    async def ids(self, model: str, text: str) -> list[int]:
        """Of a text that stands somewhere in the middle; none where that is not told."""
        return await self._ids(body.splice({}, {"model": model, "prompt": text, "add_special_tokens": False})) if text else []

    async def at_least(self, model: str, text: str, passed: int, most: int | None) -> int:
        """How many an engine has made for a text that came in so many pieces: a token each, or more where it packs several into one. Half
        a character has no ids to go back to, and its replacement has ids of its own."""
        ids = [] if "\ufffd" in text else await self.ids(model, text)
        return max(passed, len(ids) if most is None else min(len(ids), most))

    async def _ids(self, asked: bytes) -> list[int]:
        """None where the host does not answer, who is asked for more than that next, and has then to say why."""
        try:
            response = await request(self._host.transport(), "POST", "/tokenize", asked, self._trace, self._connect_s)
            try:
                content = bytearray()
                while len(content) < MAX_JSON_BYTES and (part := await response.read()):
                    content += part
            finally:
                response.close()
            return placing.prompt_ids(bytes(content)) if response.status == 200 else []
        except (ConnectFailed, ConnectionLost, msgspec.DecodeError):
            return []
