"""A deterministic backend inside the worker: it keeps the contract honest and needs no engine.

It echoes the prompt, unless the prompt holds a command:

    [[fail busy]] [[fail sick]] [[fail client]]   the attempt is refused, with that verdict
    [[cut 3]]                                     the stream breaks after three events
    [[slow 0.2]]                                  so many seconds before every event
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from gateway.errors import BadGateway, InvalidRequest, Unavailable
from gateway.plugin import AttemptFailed, Backend, Call, Endpoint, Plugin, Reply, Target, Terms, Usage, Verdict
from gateway.wire.sse import DONE

_COMMAND = re.compile(r"\[\[(\w+) ?([\w.]*)\]\]")


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A backend that pretends."""

    targets: Annotated[int, Meta(ge=1, le=1000, description="how many hosts it pretends to have")] = 1


class ScriptedReply(Reply):
    """The prompt's own words back, or what its command asks for."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._events: list[bytes] = []
        self._pause_s = 0.0
        self._cut = -1
        self._at = 0
        self._whole = Usage()

    async def begin(self) -> None:
        """See `Reply`."""
        call = self._call
        text = _prompt(call)
        command, argument = _command(text)
        if command == "fail":
            raise _failure(argument)
        self._pause_s = float(argument) if command == "slow" else 0.0
        await asyncio.sleep(self._pause_s)
        words = re.findall(r"\S+\s*", text) or ["nothing"]
        self._whole = Usage(prompt_tokens=len(words), completion_tokens=len(words) * call.choices)
        if not call.stream:
            self.body, self.usage = _answer(call, text, self._whole), self._whole
            return
        self.streams, self.content_type = True, b"text/event-stream; charset=utf-8"
        self._cut = int(argument) * call.choices if command == "cut" else -1
        self._events = _events(call, words, self._whole)

    async def next(self) -> bytes:
        """See `Reply`."""
        if self._at == self._cut:
            raise AttemptFailed("cut", BadGateway("The script broke off."))
        if self._at == len(self._events):
            self.usage = self._whole
            return b""
        if self._at and self._at % self._call.choices == 0:
            await asyncio.sleep(self._pause_s)
        self._at += 1
        return self._events[self._at - 1]


class Scripted(Backend):
    """The backend."""

    def __init__(self, name: str, config: Config) -> None:
        self._targets = [Target(f"{name}/{index}") for index in range(config.targets)]

    def endpoints(self) -> frozenset[Endpoint]:
        """Chat and plain completions."""
        return frozenset({Endpoint.CHAT, Endpoint.COMPLETIONS})

    def targets(self) -> Sequence[Target]:
        """The pretended hosts, always ready."""
        return self._targets

    def send(self, target: str, call: Call, terms: Terms, trace: Mapping[str, str]) -> Reply:
        """See `ScriptedReply`."""
        return ScriptedReply(call)


def _prompt(call: Call) -> str:
    if call.endpoint is Endpoint.COMPLETIONS:
        return str(msgspec.json.decode(call.fields["prompt"]))
    messages = msgspec.json.decode(call.fields["messages"])
    last = messages[-1] if messages else {}
    if not isinstance(last, dict):
        raise _failure("client")
    return str(last.get("content", ""))


def _command(text: str) -> tuple[str, str]:
    found = _COMMAND.search(text)
    return (found[1], found[2]) if found else ("", "")


def _failure(kind: str) -> AttemptFailed:
    if kind == "client":
        return AttemptFailed("refused", InvalidRequest("The script refuses this request."), Verdict.CLIENT_FAULT)
    if kind == "busy":
        return AttemptFailed("busy", Unavailable("The script is busy.", retry_after_s=1), Verdict.BUSY)
    return AttemptFailed("broken", BadGateway("The script is broken."), Verdict.SICK)


def _shape(call: Call, choices: list[dict[str, Any]], stream: bool, **more: Any) -> dict[str, Any]:
    name = "text_completion" if call.endpoint is Endpoint.COMPLETIONS else f"chat.completion{'.chunk' if stream else ''}"
    return {"id": call.id, "object": name, "created": int(time.time()), "model": call.model, "choices": choices, **more}


def _usage(usage: Usage) -> dict[str, int]:
    total = usage.prompt_tokens + usage.completion_tokens
    return {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens, "total_tokens": total}


def _answer(call: Call, text: str, usage: Usage) -> bytes:
    content: dict[str, Any] = (
        {"text": text} if call.endpoint is Endpoint.COMPLETIONS else {"message": {"role": "assistant", "content": text}}
    )
    choices = [{"index": index, **content, "finish_reason": "stop"} for index in range(call.choices)]
    return msgspec.json.encode(_shape(call, choices, False, usage=_usage(usage)))


def _events(call: Call, words: list[str], usage: Usage) -> list[bytes]:
    def event(index: int, text: str, finish: str | None) -> bytes:
        piece: dict[str, Any] = {"text": text} if call.endpoint is Endpoint.COMPLETIONS else {"delta": {"content": text}}
        choice = {"index": index, **piece, "finish_reason": finish}
        return b"data: " + msgspec.json.encode(_shape(call, [choice], True)) + b"\n\n"

    events = [event(index, word, None) for word in words for index in range(call.choices)]
    events += [event(index, "", "stop") for index in range(call.choices)]
    if call.show_usage:
        events.append(b"data: " + msgspec.json.encode(_shape(call, [], True, usage=_usage(usage))) + b"\n\n")
    return [*events, DONE]


plugin = Plugin("scripted", Config, lambda name, config, env: Scripted(name, config))
