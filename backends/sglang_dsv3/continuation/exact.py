"""Exact continuation: a chat answer streamed from `/generate` over token ids, re-shaped into chat's events.

A chat stream does not tell its token ids while it runs; `/generate` does, with every event. So the prompt is turned into ids first
(`/tokenize`, which applies the chat template), then generated from; when the host dies another one gets prompt ids and generated ids, and
greedy generation goes on with exactly the token that would have come. The price is one more request before the first token and events that
grow with the answer (docs/failover.md has both, measured).

`/generate` has no parsers and other defaults than chat. Only calls that leave nothing to defaults are taken: a bound on tokens, a
temperature, and a `top_p` unless the temperature is 0. Everything else is continued by its text.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from backends.sglang_dsv3 import failures, stream, translate
from backends.sglang_dsv3.continuation import resume
from backends.sglang_dsv3.framing import Framing
from backends.sglang_dsv3.shapes import generate_decoder, tokens_decoder
from gateway.plugin import Call, Endpoint, Terms, Usage
from gateway.wire import body
from gateway.wire.sse import DONE

# Chat's names and /generate's, where they mean the same.
_SAME = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "stop", "stop_token_ids",
    "stop_regex", "no_stop_trim", "ignore_eos", "skip_special_tokens", "logit_bias",
)  # fmt: skip
_RENAMED = {"seed": "sampling_seed", "min_tokens": "min_new_tokens"}
# Of these, those that are numbers, truth values, or made of numbers.
_PLAIN = tuple(name for name in (*_SAME, *_RENAMED) if name not in ("stop", "stop_regex"))
# What shapes the prompt, for /tokenize.
_TEMPLATE = ("messages", "chat_template_kwargs", "reasoning_effort", "continue_final_message")
# Parameters that change nothing, and those that are handled by name here.
_HARMLESS = frozenset(
    [
        "model",
        "stream",
        "stream_options",
        "n",
        "max_tokens",
        "max_completion_tokens",
        "user",
        "metadata",
        "store",
        "service_tier",
        "logprobs",
    ]
)


class Progress:
    """One exact answer as it goes: ids of the prompt, those generated whose text the client has been given, and whether its first event
    (the role) was given. A call that goes on takes a copy: an attempt that fails before it has said anything must leave no trace."""

    def __init__(self, prompt_ids: list[int]) -> None:
        self.prompt_ids = prompt_ids
        # Ids of the attempts before, and of this one.
        self.before: list[int] = []
        self.since: list[int] = []
        self.opened = False
        self.created = int(time.time())

    @property
    def output_ids(self) -> list[int]:
        """All of them."""
        return self.before + self.since

    def copy(self) -> Progress:
        """The same, to go on from."""
        other = Progress(self.prompt_ids)
        other.before, other.opened, other.created = self.output_ids, self.opened, self.created
        return other


_plain_decoder = msgspec.json.Decoder(dict[str, float | bool | list[int] | dict[str, float]])


def takes(call: Call, terms: Terms) -> bool:
    """Whether a call can be answered exactly."""
    known = {*_SAME, *_RENAMED, *_TEMPLATE, *_HARMLESS}
    if call.endpoint is not Endpoint.CHAT or not resume.resumable(call) or not known.issuperset(call.fields):
        return False
    try:
        found = _plain_decoder.decode(body.splice({name: call.fields[name] for name in _PLAIN if name in call.fields}, {}))
    except msgspec.ValidationError:  # the chat endpoint reads "0.7" as a number, /generate does not
        return False
    temperature = found.get("temperature")
    return temperature is not None and (temperature == 0 or "top_p" in call.fields) and resume.limit_of(call, terms) is not None


def tokenize_body(call: Call) -> bytes:
    """What `/tokenize` is asked."""
    return body.splice({name: call.fields[name] for name in _TEMPLATE if name in call.fields}, {"model": call.model})


def prompt_ids(content: bytes) -> list[int]:
    """Its answer; raises msgspec.DecodeError."""
    return tokens_decoder.decode(content).tokens


def generate_body(call: Call, terms: Terms, progress: Progress, rank: int | None = None, order: str | None = None) -> bytes:
    """What `/generate` is asked: everything so far as the prompt, and the rest of the tokens."""
    parameters: dict[str, Any] = {name: call.fields[name] for name in _SAME if name in call.fields}
    parameters |= {new: call.fields[name] for name, new in _RENAMED.items() if name in call.fields}
    limit = resume.limit_of(call, terms)
    assert limit is not None
    parameters["max_new_tokens"] = limit - len(progress.output_ids)
    ids = progress.prompt_ids + progress.output_ids
    more: dict[str, Any] = {"extra_key": terms.salt} if terms.salt else {}
    if rank is not None:
        more["routed_dp_rank"] = rank
    if order is not None:
        more["priority"] = translate.priority(terms, order)
    return body.splice({}, {"rid": call.id, "input_ids": ids, "sampling_params": parameters, "stream": True, **more})


class Generated(stream.EventStream):
    """`/generate`'s events as chat's. What was delivered before (a continuation) is not said again."""

    def __init__(self, call: Call, terms: Terms, progress: Progress) -> None:
        super().__init__(call, terms, Framing(False))
        self._progress = progress
        self._said = 0
        self._finish = ""
        self._usage = Usage(len(progress.prompt_ids), len(progress.before))

    def used(self) -> Usage | None:
        """Exactly what was generated so far."""
        return self._usage

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        head = {"id": self._call.id, "object": "chat.completion.chunk", "created": self._progress.created, "model": self._call.model}
        return b"data: " + msgspec.json.encode({**head, "choices": choices, **more}) + b"\n\n"

    def _delta(self, finish: str | None = None, **delta: Any) -> bytes:
        return self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}])

    def _take(self, events: list[bytes]) -> bytes:
        out: list[bytes] = []
        for event in events:
            if event == DONE:
                out.append(self._ending())
                break
            if b'"error"' in event:
                self.failure = failures.error_of(event, self._call)
                if self.failure is not None:
                    break
            try:
                found = generate_decoder.decode(event[6:])
            except msgspec.DecodeError as error:
                self.failure = failures.nonsense(str(error))
                break
            total = len(self._progress.before) + len(found.output_ids)
            self._usage = Usage(len(self._progress.prompt_ids), total, found.meta_info.cached_tokens)
            finish = found.meta_info.finish_reason
            if finish is not None and finish.type == "abort":
                self.failure = failures.aborted()
                break
            if not self._progress.opened:
                self._progress.opened = True
                out.append(self._delta(role="assistant", content=""))
            if len(found.text) > self._said:
                out.append(self._delta(content=found.text[self._said :]))
                self._said = len(found.text)
                # Ids whose text is held back (half a character) are generated anew by whoever goes on.
                self._progress.since = found.output_ids
            if finish is not None:
                self._finish = finish.type
                out.append(self._delta(finish.type))
        return b"".join(out)

    def _ending(self) -> bytes:
        if not self._finish:
            self.failure = failures.cut("[DONE] without a finish")
            return b""
        self.complete = True
        self.usage = usage = self._usage
        if not self._call.show_usage:
            return DONE
        total = usage.prompt_tokens + usage.completion_tokens
        counts = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens, "total_tokens": total}
        return self._chunk([], usage={**counts, "prompt_tokens_details": {"cached_tokens": usage.cached_tokens or 0}}) + DONE
