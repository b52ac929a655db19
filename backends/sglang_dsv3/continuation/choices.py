"""Streams of several choices that go on: `n` above 1, several prompts, and prompts that are no single text.

Each choice that has not ended goes on by itself, as an answer of one choice would (see `resume`), all of them at one host. They begin
together and are passed on one after the other: in what order the chunks of several choices come is nobody's promise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from backends.sglang_dsv3.continuation import resume
from backends.sglang_dsv3.continuation.counting import Counting
from gateway.errors import BadGateway
from gateway.plugin import AttemptFailed, Call, Endpoint, Reply, Terms, Usage
from gateway.wire import body
from gateway.wire.sse import DONE

Event = dict[str, Any]
# How a stream of one choice is continued, from what of it was delivered and what it has used.
Again = Callable[[Call, bytes, Usage | None], Call | Reply | None]


class Parts(msgspec.Struct, frozen=True):
    """`Call.continues` of such a stream: what of each choice was delivered, as one of one choice would have been. `again`: how one of one
    choice is continued."""

    call: Call
    terms: Terms
    created: int
    delivered: dict[int, bytes]
    again: Again


def several(call: Call) -> bool:
    """Whether an answer to this call goes on so."""
    if call.choices != 1:
        return call.endpoint is Endpoint.CHAT or call.endpoint is Endpoint.COMPLETIONS
    return call.endpoint is Endpoint.COMPLETIONS and memoryview(call.fields["prompt"])[0] != ord('"')


def resumable(call: Call) -> bool:
    """See `Backend.resumable`."""
    return resume.resumable(msgspec.structs.replace(call, choices=1, prompts=1))


def prompts(call: Call) -> list[str | list[int]]:
    """Of a completion, one by one; of a chat its only one is left to its messages."""
    if call.endpoint is Endpoint.CHAT:
        return [""]
    found = msgspec.json.decode(call.fields["prompt"])
    return [found] if isinstance(found, str) or (found and isinstance(found[0], int)) else found


def resume_several(call: Call, terms: Terms, delivered: bytes, again: Again) -> Call | None:
    """How to go on; None where one of the choices cannot."""
    found: dict[int, list[Event]] = {}
    created = 0
    for event in delivered.split(b"\n\n"):
        if not event.startswith(b"data: {"):
            continue
        chunk = msgspec.json.decode(event[6:])
        created = created or chunk["created"]
        for choice in chunk["choices"]:
            found.setdefault(choice["index"], []).append({**chunk, "choices": [{**choice, "index": 0}]})
    said = {index: b"".join(b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks) for index, chunks in found.items()}
    parts = Parts(call, terms, created, said, again)
    if any(again(_alone(parts, index), content, None) is None for index, content in said.items()):
        return None
    return msgspec.structs.replace(call, continues=parts)


def _alone(parts: Parts, index: int) -> Call:
    """One choice as a call of its own. Where the prompt is token ids its text stands for them until it is known which ids it has."""
    call = parts.call
    fields = {name: value for name, value in call.fields.items() if name != "n"}
    if call.endpoint is Endpoint.COMPLETIONS:
        prompt = prompts(call)[index * call.prompts // call.choices]
        fields["prompt"] = body.encode(prompt if isinstance(prompt, str) else "")
    return msgspec.structs.replace(call, id=f"{call.id}-{index}", fields=fields, show_usage=True, choices=1, prompts=1, continues=None)


class Choices(Reply):
    """See `gateway.plugin.Reply`. `send` makes the attempt at one of them."""

    streams = True
    content_type = b"text/event-stream; charset=utf-8"

    def __init__(self, parts: Parts, counting: Counting, send: Callable[[Call], Reply]) -> None:
        self._parts = parts
        self._counting = counting
        self._send = send
        self._going: dict[int, Reply] = {}
        self._left: list[int] = []
        self._ended = False
        self._first = b""
        # Tokens of each prompt, and of each choice so far.
        self._prompts: list[int] = []
        self._used: dict[int, int] = {}

    async def begin(self) -> None:
        """See `Reply`."""
        parts = self._parts
        for prompt in prompts(parts.call):
            self._prompts.append(await self._count(prompt))
        for index in range(parts.call.choices):
            if (reply := await self._reply(index)) is not None:
                self._going[index] = reply
        try:
            async with asyncio.TaskGroup() as group:
                for reply in self._going.values():
                    group.create_task(reply.begin())
        except* AttemptFailed as failed:
            raise failed.exceptions[0] from None
        self._left = list(self._going)
        self.connected_at = min((reply.connected_at for reply in self._going.values()), default=0.0)
        self._first = await self.next()

    async def _count(self, prompt: str | list[int]) -> int:
        call = self._parts.call
        if isinstance(prompt, list):
            return len(prompt)
        if call.endpoint is Endpoint.CHAT:
            return await self._counting.of_chat(call) or self._parts.terms.prompt_tokens
        return await self._counting.of_prompt(call.model, prompt)

    async def _reply(self, index: int) -> Reply | None:
        """Whatever gives the rest of one choice; None where it has ended."""
        parts = self._parts
        call, alone, said = parts.call, _alone(parts, index), parts.delivered.get(index, b"")
        prompt = prompts(call)[index * call.prompts // call.choices]
        found = resume.read(said)
        limit = resume.limit_of(alone, parts.terms)
        self._used[index] = await self._counting.at_least(call.model, found.text, found.chunks, limit)
        if found.finished:
            return None
        again: Call | Reply | None = alone  # of which the client has nothing yet, not even who speaks
        if said:
            usage = Usage(self._prompts[index * call.prompts // call.choices], self._used[index])
            again = parts.again(alone, said, usage)
        if again is None:
            raise AttemptFailed("broken", BadGateway("The answer cannot be continued."))
        if isinstance(again, Reply):
            return again
        if isinstance(prompt, list):
            ids = await self._counting.ids(call.model, found.text)
            again = msgspec.structs.replace(again, fields={**again.fields, "prompt": body.encode(prompt + ids)})
        return self._send(again)

    async def next(self) -> bytes:
        """See `Reply`."""
        block, self._first = self._first, b""
        while not block and self._left:
            index = self._left[0]
            said = await self._going[index].next()
            if said:
                block = self._written(index, said)
            else:
                del self._left[0]
        if not block and not self._ended:
            self._ended = True
            return self._closing()
        return block

    def _written(self, index: int, block: bytes) -> bytes:
        """Chunks of one choice as those of one of several."""
        call, out = self._parts.call, []
        for event in block.split(b"\n\n"):
            if not event.startswith(b"data: {"):
                continue
            chunk = msgspec.json.decode(event[6:])
            if chunk["choices"]:
                chunk |= {"id": call.id, "created": self._parts.created, "choices": [{**chunk["choices"][0], "index": index}]}
                out.append(b"data: " + msgspec.json.encode(chunk) + b"\n\n")
            elif chunk.get("usage"):
                self._used[index] = chunk["usage"]["completion_tokens"]
        return b"".join(out)

    def _closing(self) -> bytes:
        call, usage = self._parts.call, self._total()
        if not call.show_usage:
            return DONE
        kind = "chat.completion.chunk" if call.endpoint is Endpoint.CHAT else "text_completion"
        head = {"id": call.id, "object": kind, "created": self._parts.created, "model": call.model, "choices": []}
        total = usage.prompt_tokens + usage.completion_tokens
        counts = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens, "total_tokens": total}
        return b"data: " + msgspec.json.encode({**head, "usage": counts}) + b"\n\n" + DONE

    def _total(self) -> Usage:
        """Each prompt once, each choice's tokens, as if one host had answered."""
        return Usage(sum(self._prompts), sum(self._used.values()))

    def close(self) -> Usage | None:
        """See `Reply`."""
        finishes: list[str] = []
        for index, reply in self._going.items():
            usage = reply.close()
            if usage is not None and usage.completion_tokens:
                self._used[index] = usage.completion_tokens
            finishes += reply.finishes
        self.finishes = finishes
        self.usage = self._total() if self._used else None
        return self.usage
