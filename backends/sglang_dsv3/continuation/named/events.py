"""The grammar of a stream with named events: what was delivered is read, what follows is written, from chat's chunks.

One object knows both sides, since where a stream broke off decides how its next event reads: which block or item is open, under which index
and id, what its closing events have to repeat, which number comes next.
"""

from __future__ import annotations

import abc
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec

from gateway.wire.sse import DONE

Event = dict[str, Any]


class NoChat(ValueError):
    """A request that cannot be said as a chat's, or not in a way that is sure to give the same prompt."""


def encoded(event: Event) -> bytes:
    """An event under its name."""
    return b"event: %s\ndata: %s\n\n" % (event["type"].encode(), msgspec.json.encode(event))


def new_id(prefix: str, digits: int = 32) -> str:
    """As SGLang makes up ids of blocks and items."""
    return prefix + uuid.uuid4().hex[:digits]


def _payloads(delivered: bytes) -> Iterator[Event]:
    for event in delivered.split(b"\n\n"):
        if (at := event.find(b"data: {")) >= 0:
            yield msgspec.json.decode(event[at + 6 :])


class Grammar(abc.ABC):
    """One stream. `read` what the client has, then `write` block after block of a chat's stream that goes on with it."""

    def __init__(self) -> None:
        # What was delivered, as a chat would have said it.
        self._deltas: list[Event] = []
        # Deltas of text, thoughts and calls: a token each, or more.
        self.passed = 0
        # Tokens of the prompt, where the stream has said how many.
        self.prompt_tokens = 0
        self.text = ""
        # Whether the last thing that was delivered is the end of a text: where no call can follow it was the end of all.
        self.said = False
        # Why it ended, once that is known.
        self.finish = ""
        self._calls = 0

    def read(self, delivered: bytes) -> None:
        """Whole events; raises msgspec.DecodeError, LookupError or TypeError where they are not of this grammar."""
        for event in _payloads(delivered):
            self._read(event)

    def as_chat(self) -> bytes:
        """What was delivered, as chat's chunks."""
        ends: list[Event] = [{"index": 0, "delta": {}, "finish_reason": self.finish}] if self.finish else []
        choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in self._deltas] + ends
        return b"".join(b"data: " + msgspec.json.encode({"choices": [choice]}) + b"\n\n" for choice in choices)

    def write(self, block: bytes) -> bytes:
        """What goes to the client for a block of chat's events, if anything."""
        return b"".join(encoded(event) for event in self._written(block))

    def _written(self, block: bytes) -> Iterator[Event]:
        for event in block.split(b"\n\n"):
            if event + b"\n\n" == DONE:
                yield from self._end()
            elif event.startswith(b"data: {"):
                chunk = msgspec.json.decode(event[6:])
                if chunk.get("usage"):
                    self._used(chunk["usage"])
                for choice in chunk["choices"]:
                    self.finish = choice.get("finish_reason") or self.finish
                    yield from self._delta(choice["delta"])

    def _delta(self, delta: Event) -> Iterator[Event]:
        """What one delta of a chat says, in the order in which SGLang says it."""
        if thoughts := delta.get("reasoning_content"):
            yield from self._think(thoughts)
        for call in delta.get("tool_calls") or ():
            function = call["function"]
            if function.get("name"):
                yield from self._call(call.get("id") or new_id("call_", 24), function["name"])
            if function.get("arguments"):
                yield from self._argue(function["arguments"])
        if text := delta.get("content"):
            yield from self._say(text)

    def _heard(self, **delta: Any) -> None:
        """Note a delta that was delivered."""
        self._deltas.append(delta)
        self.passed += 1
        self.text += delta.get("content", "")

    def _heard_call(self, id: str, name: str) -> None:
        self._heard(tool_calls=[{"index": self._calls, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}])
        self.passed -= 1  # which is no delta
        self._calls += 1

    def _heard_arguments(self, arguments: str) -> None:
        self._heard(tool_calls=[{"index": self._calls - 1, "function": {"arguments": arguments}}])

    @abc.abstractmethod
    def _read(self, event: Event) -> None:
        """One event that was delivered."""

    @abc.abstractmethod
    def _think(self, thoughts: str) -> Iterator[Event]: ...

    @abc.abstractmethod
    def _say(self, text: str) -> Iterator[Event]: ...

    @abc.abstractmethod
    def _call(self, id: str, name: str) -> Iterator[Event]: ...

    @abc.abstractmethod
    def _argue(self, arguments: str) -> Iterator[Event]: ...

    @abc.abstractmethod
    def _used(self, usage: Event) -> None:
        """Chat's usage, of the whole answer."""

    @abc.abstractmethod
    def _end(self) -> Iterator[Event]:
        """Everything that the client lacks of a whole answer."""
