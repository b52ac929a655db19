"""A backend for Penstock that repeats the last message, word by word. The smallest one that keeps every promise of the contract.

A real one would talk to an engine where this one sleeps; everything else would stay.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from gateway.errors import BadGateway, InvalidRequest, Unavailable
from gateway.plugin import AttemptFailed, BackendEnv, Call, Endpoint, Reply, Service, Target, Usage, Verdict

DONE = b"data: [DONE]\n\n"


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What may stand under `backends.NAME` beside `kind`. An unknown key is refused for us."""

    delay_s: float = 0.0

    def __post_init__(self) -> None:
        if self.delay_s < 0:
            raise ValueError("delay_s must not be negative")


class Parrot:
    """The backend: one target, which is the parrot."""

    def __init__(self, name: str, config: Config) -> None:
        self._target = Target(f"{name}/perch")
        self._delay_s = config.delay_s

    async def open(self) -> None:
        """Make pools and clients here, not in `build`; succeed even when every host is down."""

    async def check(self) -> list[str]:
        """What an operator should know before serving, a line each."""
        return []

    async def probe(self, target: str) -> bool:
        """Whether the target would take a request now. Asked every second: it must cost no token."""
        return True

    async def verify(self, target: str) -> bool:
        """Asked when the target streams nothing while others do: this one may cost a token."""
        return True

    def resumable(self, call: Call) -> bool:
        """Whether an answer that broke off could be continued on another target; a parrot would begin anew."""
        return False

    def resume(self, call: Call, delivered: bytes, usage: Usage | None) -> Call | Reply | None:
        """How to go on after `delivered`; see `gateway.plugin`."""
        return None

    async def aclose(self) -> None:
        """Let go of everything; also called when `open` failed."""

    def endpoints(self) -> frozenset[Endpoint]:
        """Everything else is a 404 that names who serves it."""
        return frozenset({Endpoint.CHAT})

    def targets(self) -> Sequence[Target]:
        """A snapshot. A target that is not ready says why, and when to ask again."""
        return [self._target]

    def classify(self, outcome: Reply | BaseException) -> Verdict:
        """What an outcome says about its target."""
        if isinstance(outcome, Reply):
            return Verdict.OK
        return outcome.verdict if isinstance(outcome, AttemptFailed) else Verdict.SICK

    async def send(self, target: str, call: Call) -> Reply:
        """One attempt. Return when the first event (or the whole body) is there; when cancelled, stop the generation."""
        text = str(msgspec.json.decode(call.fields["messages"])[-1].get("content") or "nothing")
        if text == "fly":  # nobody else can help: the client is told, no other target is tried
            raise AttemptFailed("refused", InvalidRequest("Parrots do not take orders.", param="messages"), Verdict.CLIENT_FAULT)
        if text == "sing":  # busy is not broken
            raise AttemptFailed("busy", Unavailable("The parrot is eating.", retry_after_s=1), Verdict.BUSY)
        if text == "sleep":  # `detail` is logged and never shown
            raise AttemptFailed("broken", BadGateway("The parrot is gone.", detail="window open"), Verdict.SICK)
        await asyncio.sleep(self._delay_s)
        words = text.split(" ")
        usage = Usage(prompt_tokens=len(words), completion_tokens=len(words) * call.choices)
        if not call.stream:
            choices = [_choice(index, "message", {"role": "assistant", "content": text}, "stop") for index in range(call.choices)]
            return Reply(body=_encode(call, "chat.completion", choices, usage), usage=usage)
        reply = Reply(content_type=b"text/event-stream; charset=utf-8")
        reply.events = self._events(call, words, reply, usage)
        return reply

    async def _events(self, call: Call, words: list[str], reply: Reply, usage: Usage) -> AsyncIterator[bytes]:
        for number, word in enumerate(words):
            if word == "squawk" and number:  # what breaks after the first event is raised here; `[DONE]` would be a lie
                raise AttemptFailed("cut", BadGateway("The parrot lost its thread."))
            for index in range(call.choices):
                yield _event(call, [_choice(index, "delta", {"content": word + " "}, None)])
            await asyncio.sleep(self._delay_s)
        for index in range(call.choices):
            yield _event(call, [_choice(index, "delta", {}, "stop")])
        reply.usage = usage
        if call.show_usage:  # only for clients that asked
            yield _event(call, [], usage)
        yield DONE


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


class Plugin:
    """What the entry point names."""

    kind = "parrot"
    Config = Config

    def build(self, name: str, config: Config, env: BackendEnv) -> Parrot:
        """No I/O here."""
        return Parrot(name, config)

    def services(self, name: str, config: Config, env: BackendEnv) -> Sequence[Service]:
        """Processes that the gateway should run and keep alive for us: none."""
        return ()

    def commands(self) -> Sequence[Any]:
        """Commands to appear under `penstock`: none."""
        return ()


plugin = Plugin()
