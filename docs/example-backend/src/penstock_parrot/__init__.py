"""A backend for Penstock that repeats the last message, word by word. The smallest one that keeps every promise of the contract.

A real one would talk to an engine where this one sleeps; everything else would stay.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from gateway.errors import BadGateway, InvalidRequest, Unavailable
from gateway.plugin import AttemptFailed, Backend, Call, Endpoint, Plugin, Reply, Target, Terms, Usage, Verdict

DONE = b"data: [DONE]\n\n"


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What may stand under `backends.NAME` beside `kind`. An unknown key is refused for us."""

    delay_s: float = 0.0

    def __post_init__(self) -> None:
        if self.delay_s < 0:
            raise ValueError("delay_s must not be negative")


class Parrot(Backend):
    """The backend: one target, which is the parrot. Whatever else a backend may do (open, check, probe, go on elsewhere) has a default."""

    def __init__(self, name: str, config: Config) -> None:
        self._target = Target(f"{name}/perch")
        self._delay_s = config.delay_s

    def endpoints(self) -> frozenset[Endpoint]:
        """Everything else is a 404 that names who serves it."""
        return frozenset({Endpoint.CHAT})

    def targets(self) -> Sequence[Target]:
        """A snapshot. A target that is not ready says why, and when to ask again."""
        return [self._target]

    def send(self, target: str, call: Call, terms: Terms, trace: Mapping[str, str]) -> Reply:
        """One attempt, which does nothing before its `begin`."""
        return Squawk(call, self._delay_s)


class Squawk(Reply):
    """One attempt and its answer."""

    def __init__(self, call: Call, delay_s: float) -> None:
        self._call = call
        self._delay_s = delay_s
        self._words: list[str] = []
        self._events: list[bytes] = []
        self._at = 0

    async def begin(self) -> None:
        """Send the call and return when the first event (or the whole body) is there. It may be cancelled; `close` comes then."""
        call = self._call
        text = str(msgspec.json.decode(call.fields["messages"])[-1].get("content") or "nothing")
        if text == "fly":  # nobody else can help: the client is told, no other target is tried
            raise AttemptFailed("refused", InvalidRequest("Parrots do not take orders.", param="messages"), Verdict.CLIENT_FAULT)
        if text == "sing":  # busy is not broken
            raise AttemptFailed("busy", Unavailable("The parrot is eating.", retry_after_s=1), Verdict.BUSY)
        if text == "sleep":  # `detail` is logged and never shown
            raise AttemptFailed("broken", BadGateway("The parrot is gone.", detail="window open"), Verdict.SICK)
        await asyncio.sleep(self._delay_s)
        words = text.split(" ")
        whole = Usage(prompt_tokens=len(words), completion_tokens=len(words) * call.choices)
        if not call.stream:
            choices = [_choice(index, "message", {"role": "assistant", "content": text}, "stop") for index in range(call.choices)]
            self.body, self.usage = _encode(call, "chat.completion", choices, whole), whole
            return
        self.streams, self.content_type = True, b"text/event-stream; charset=utf-8"
        self._words, self._events = words, _events(call, words, whole)
        self.usage = Usage(prompt_tokens=len(words))

    async def next(self) -> bytes:
        """One or more whole events; empty after a true finish, and only then."""
        if self._at == len(self._events):
            return b""
        if self._at:
            await asyncio.sleep(self._delay_s)
            if self._at < len(self._words) and self._words[self._at] == "squawk":  # what breaks now is raised; `[DONE]` would be a lie
                raise AttemptFailed("cut", BadGateway("The parrot lost its thread."))
        self._at += 1
        self.usage = Usage(len(self._words), min(self._at, len(self._words)) * self._call.choices)
        return self._events[self._at - 1]

    def close(self) -> Usage | None:
        """Called once the answer is over, or before: then stop the engine here. It must not wait."""
        return self.usage


def _events(call: Call, words: list[str], usage: Usage) -> list[bytes]:
    """A block of events for each word, and the closing ones."""
    choices = range(call.choices)
    blocks = [b"".join(_event(call, [_choice(index, "delta", {"content": word + " "}, None)]) for index in choices) for word in words]
    closing = b"".join(_event(call, [_choice(index, "delta", {}, "stop")]) for index in choices)
    if call.show_usage:  # only for clients that asked
        closing += _event(call, [], usage)
    return [*blocks, closing + DONE]


def _choice(index: int, key: str, content: dict[str, str], finish: str | None) -> dict[str, Any]:
    return {"index": index, key: content, "finish_reason": finish}


def _encode(call: Call, kind: str, choices: list[dict[str, Any]], usage: Usage | None = None) -> bytes:
    body: dict[str, Any] = {"id": call.id, "object": kind, "created": int(time.time()), "model": call.model, "choices": choices}
    if usage is not None:
        counts = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
        body["usage"] = {**counts, "total_tokens": sum(counts.values())}
    return msgspec.json.encode(body)


def _event(call: Call, choices: list[dict[str, Any]], usage: Usage | None = None) -> bytes:
    return b"data: " + _encode(call, "chat.completion.chunk", choices, usage) + b"\n\n"


plugin = Plugin("parrot", Config, lambda name, config, env: Parrot(name, config))
