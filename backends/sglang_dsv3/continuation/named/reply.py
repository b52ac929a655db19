"""One attempt at the rest of a stream with named events: a chat that goes on, whose chunks are written as those events."""

from __future__ import annotations

from collections.abc import Callable

from backends.sglang_dsv3.continuation import resume
from backends.sglang_dsv3.continuation.counting import Counting
from backends.sglang_dsv3.continuation.named import Going, Written, go_on
from gateway.errors import BadGateway
from gateway.plugin import AttemptFailed, Call, Reply, Usage


class NamedReply(Written):
    """See `gateway.plugin.Reply`. `send` makes the attempt at the chat."""

    def __init__(self, going: Going, counting: Counting, send: Callable[[Call], Reply]) -> None:
        super().__init__(None, going.copy())
        self._going = going
        self._counting = counting
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
        """Tokens of the prompt, where the stream has not said how many, and of what was delivered."""
        grammar, chat, terms = self.grammar, self._going.chat, self._going.terms
        prompt = grammar.prompt_tokens or await self._counting.of_chat(chat) or terms.prompt_tokens
        limit = resume.limit_of(chat, terms)
        return Usage(prompt, await self._counting.at_least(chat.model, grammar.text, grammar.passed, limit))
