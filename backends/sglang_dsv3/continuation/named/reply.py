"""One attempt at the rest of a stream with named events: a chat that goes on, whose chunks are written as those events."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from backends.sglang_dsv3.abandon import MAX_JSON_BYTES
from backends.sglang_dsv3.continuation import exact
from backends.sglang_dsv3.continuation.named import Going, Written, go_on
from backends.sglang_dsv3.host import EngineHost
from backends.sglang_dsv3.transport import ConnectFailed, ConnectionLost, request
from gateway.errors import BadGateway
from gateway.plugin import AttemptFailed, Call, Reply, Terms, Usage
from gateway.wire import body


class NamedReply(Written):
    """See `gateway.plugin.Reply`. `send` makes the attempt at the chat."""

    def __init__(
        self, host: EngineHost, going: Going, terms: Terms, trace: Mapping[str, str], connect_s: float, send: Callable[[Call], Reply]
    ) -> None:
        super().__init__(None, going.copy())
        self._host = host
        self._going = going
        self._terms = terms
        self._trace = trace
        self._connect_s = connect_s
        self._send = send
        self._first = b""

    async def begin(self) -> None:
        """See `Reply`. What was used so far is counted first, where no engine has told."""
        going = self._going
        found = go_on(going, self.grammar, going.usage or await self._count())
        if found is None:
            raise AttemptFailed("broken", BadGateway("The answer cannot be continued."))
        chat = self.chat = found if isinstance(found, Reply) else self._send(found)
        chat.prefilled = self.prefilled
        await chat.begin()
        self.connected_at = chat.connected_at
        self._first = await super().next()

    async def next(self) -> bytes:
        """See `Reply`."""
        block, self._first = self._first, b""
        return block or await super().next()

    async def _count(self) -> Usage:
        """Tokens of the prompt, where the stream has not said how many, and of what was delivered: as many as there were deltas, or as the
        text has where an engine packs several into one."""
        grammar, chat = self.grammar, self._going.chat
        prompt = grammar.prompt_tokens or await self._tokens(exact.tokenize_body(chat)) or self._terms.prompt_tokens
        said = body.splice({}, {"model": chat.model, "prompt": grammar.text, "add_special_tokens": False})
        return Usage(prompt, max(grammar.passed, await self._tokens(said) if grammar.text else 0))

    async def _tokens(self, asked: bytes) -> int:
        """How many there are; 0 where the host does not say, who is asked for the answer next and has then to say why."""
        try:
            response = await request(self._host.transport(), "POST", "/tokenize", asked, self._trace, self._connect_s)
            try:
                content = bytearray()
                while len(content) < MAX_JSON_BYTES and (part := await response.read()):
                    content += part
            finally:
                response.close()
            return len(exact.prompt_ids(bytes(content))) if response.status == 200 else 0
        except (ConnectFailed, ConnectionLost, msgspec.DecodeError):
            return 0
