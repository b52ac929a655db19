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
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from gateway.errors import BadGateway, InvalidRequest, Unavailable
from gateway.plugin import AttemptFailed, BackendEnv, Call, Endpoint, Reply, Service, Target, Usage, Verdict
from gateway.wire.sse import DONE

_COMMAND = re.compile(r"\[\[(\w+) ?([\w.]*)\]\]")


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`targets`: how many pretended hosts there are."""

    targets: int = 1


class ScriptedReply(Reply):
    """A reply whose `closed` tells a test what became of it."""

    closed = False

    def close(self) -> None:
        self.closed = True


class Scripted:
    """The backend."""

    def __init__(self, name: str, config: Config) -> None:
        self._targets = [Target(f"{name}/{index}") for index in range(config.targets)]

    async def open(self) -> None:
        """Nothing to do."""

    async def check(self) -> list[str]:
        """Nothing to find."""
        return []

    def endpoints(self) -> frozenset[Endpoint]:
        """Chat and plain completions."""
        return frozenset({Endpoint.CHAT, Endpoint.COMPLETIONS})

    def targets(self) -> Sequence[Target]:
        """The pretended hosts, always ready."""
        return self._targets

    async def probe(self, target: str) -> bool:
        """Always well."""
        return True

    async def verify(self, target: str) -> bool:
        """Always well."""
        return True

    def resumable(self, call: Call) -> bool:
        """An echo is not worth it."""
        return False

    def resume(self, call: Call, delivered: bytes, usage: Usage | None) -> Call | Reply | None:
        """See `resumable`."""
        return None

    async def aclose(self) -> None:
        """Nothing to let go of."""

    def classify(self, outcome: Reply | BaseException) -> Verdict:
        """As the failure itself says."""
        if isinstance(outcome, AttemptFailed):
            return outcome.verdict
        return Verdict.OK if isinstance(outcome, Reply) else Verdict.SICK

    async def send(self, target: str, call: Call) -> Reply:
        """The prompt's own words back, or what its command asks for."""
        text = _prompt(call)
        command, argument = _command(text)
        if command == "fail":
            raise _failure(argument)
        pause_s = float(argument) if command == "slow" else 0.0
        await asyncio.sleep(pause_s)
        words = re.findall(r"\S+\s*", text) or ["nothing"]
        usage = Usage(prompt_tokens=len(words), completion_tokens=len(words) * call.choices)
        if not call.stream:
            return ScriptedReply(body=_answer(call, text, usage), usage=usage)
        reply = ScriptedReply(content_type=b"text/event-stream; charset=utf-8")
        reply.events = _events(call, words, pause_s, int(argument) if command == "cut" else -1, reply, usage)
        return reply


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


async def _events(call: Call, words: list[str], pause_s: float, cut: int, reply: ScriptedReply, usage: Usage) -> AsyncIterator[bytes]:
    def event(index: int, text: str, finish: str | None) -> bytes:
        piece: dict[str, Any] = {"text": text} if call.endpoint is Endpoint.COMPLETIONS else {"delta": {"content": text}}
        choice = {"index": index, **piece, "finish_reason": finish}
        return b"data: " + msgspec.json.encode(_shape(call, [choice], True)) + b"\n\n"

    for count, word in enumerate(words):
        if count == cut:
            raise AttemptFailed("cut", BadGateway("The script broke off."))
        for index in range(call.choices):
            yield event(index, word, None)
        await asyncio.sleep(pause_s)
    for index in range(call.choices):
        yield event(index, "", "stop")
    reply.usage = usage
    if call.show_usage:
        yield b"data: " + msgspec.json.encode(_shape(call, [], True, usage=_usage(usage))) + b"\n\n"
    yield DONE


_Config = Config  # under this name where the plugin has a `Config` of its own


class _Plugin:
    kind = "scripted"
    Config = _Config

    def build(self, name: str, config: _Config, env: BackendEnv) -> Scripted:
        return Scripted(name, config)

    def services(self, name: str, config: _Config, env: BackendEnv) -> Sequence[Service]:
        return ()

    def commands(self) -> Sequence[Any]:
        return ()


plugin = _Plugin()
