"""Exact continuation: a chat answer streamed from `/generate` over token ids, re-shaped into chat's events.

A chat stream does not tell its token ids while it runs; `/generate` does, with every event. So the prompt is turned into ids first
(`/tokenize`, which applies the chat template), then generated from; when the host dies another one gets prompt ids and generated ids, and
greedy generation goes on with exactly the token that would have come. The price is one more request before the first token and events that
grow with the answer (docs/failover.md has both, measured).

`/generate` has no parsers: thoughts are told apart by our own splitter, and calls are held until the text ends, then read by the engine's
own detector (`/parse_function_call`), so that none is ever delivered half. It has other defaults than chat, too. Only calls that leave
nothing to defaults are taken: a bound on tokens, a temperature, and a `top_p` unless the temperature is 0. Everything else is continued by
its text.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from backends.sglang_dsv3 import failures, stream, translate
from backends.sglang_dsv3.continuation import joint, markup, placing, resume
from backends.sglang_dsv3.continuation.splitter import Splitter
from backends.sglang_dsv3.framing import Framing
from backends.sglang_dsv3.shapes import GenerateEvent, Parsers, generate_decoder, parsed_decoder
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
        "top_logprobs",
        "parallel_tool_calls",
    ]
)
_KNOWN = frozenset([*_SAME, *_RENAMED, *placing.TEMPLATE, *_HARMLESS])
# Parsers whose reading the splitter does, too.
_REASONING = frozenset(["", *markup.THINKING])
_TOOLS = frozenset(["", *markup.CALLING])


class Progress:
    """One exact answer as it goes: ids of the prompt, those generated whose text the client has been given, how that text is told apart,
    and whether its first event (the role) was given. A call that goes on takes a copy: an attempt that fails before it has said anything
    must leave no trace."""

    def __init__(self, prompt_ids: list[int], splitter: Splitter) -> None:
        self.prompt_ids = prompt_ids
        # Ids of the attempts before, and of this one; and how many of them were thoughts.
        self.before: list[int] = []
        self.since: list[int] = []
        self.thought_before = 0
        self.thought_since = 0
        self.splitter = splitter
        self.opened = False
        self.created = int(time.time())

    @property
    def output_ids(self) -> list[int]:
        """All of them."""
        return self.before + self.since

    def copy(self) -> Progress:
        """The same, to go on from."""
        other = Progress(self.prompt_ids, self.splitter.copy())
        other.before, other.opened, other.created = self.output_ids, self.opened, self.created
        other.thought_before = self.thought_before + self.thought_since
        return other


_plain_decoder = msgspec.json.Decoder(dict[str, float | bool | list[int] | dict[str, float]])


def takes(call: Call, terms: Terms, parsers: Parsers) -> bool:
    """Whether a call can be answered exactly by an engine with these parsers."""
    if call.endpoint is not Endpoint.CHAT or not resume.resumable(call) or not _KNOWN.issuperset(call.fields):
        return False
    if parsers.reasoning not in _REASONING or parsers.tools not in _TOOLS or resume.grammar(call) is not None:
        return False
    if _with_calls(call, parsers) and resume.asked(call, "logprobs"):
        return False
    try:
        found = _plain_decoder.decode(body.splice({name: call.fields[name] for name in _PLAIN if name in call.fields}, {}))
    except msgspec.ValidationError:  # the chat endpoint reads "0.7" as a number, /generate does not
        return False
    temperature = found.get("temperature")
    return temperature is not None and (temperature == 0 or "top_p" in call.fields) and resume.limit_of(call, terms) is not None


def _with_calls(call: Call, parsers: Parsers) -> bool:
    """Whether calls in its answer would be read as calls."""
    return bool(parsers.tools) and resume.asked(call, "tools") and bytes(call.fields.get("tool_choice", b"")) != b'"none"'


def splitter(call: Call, parsers: Parsers, thinking: bool) -> Splitter:
    """How the text of its answer is told apart; `thinking`: whether the prompt has opened the thinking."""
    return Splitter(parsers.reasoning, parsers.tools if _with_calls(call, parsers) else "", thinking)


def generate_body(call: Call, terms: Terms, progress: Progress, rank: int | None = None, order: str | None = None) -> bytes:
    """What `/generate` is asked: everything so far as the prompt, and the rest of the tokens."""
    parameters: dict[str, Any] = {name: call.fields[name] for name in _SAME if name in call.fields}
    parameters |= {new: call.fields[name] for name, new in _RENAMED.items() if name in call.fields}
    limit = resume.limit_of(call, terms)
    assert limit is not None
    parameters["max_new_tokens"] = limit - len(progress.output_ids)
    ids = progress.prompt_ids + progress.output_ids
    more: dict[str, Any] = {"extra_key": terms.salt} if terms.salt else {}
    if resume.asked(call, "tools") and bytes(call.fields.get("tool_choice", b"")) != b'"none"':
        parameters["skip_special_tokens"] = False  # as chat does
    if progress.splitter.thinking:
        more["require_reasoning"] = True  # which counts them
    if resume.asked(call, "logprobs"):
        more |= {"return_logprob": True, "return_text_in_logprobs": True, "logprob_start_len": -1}
        more["top_logprobs_num"] = call.fields["top_logprobs"] if resume.asked(call, "top_logprobs") else 0
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
        # Tokens whose probabilities were given.
        self._told = 0
        self._probable = resume.asked(call, "logprobs")
        self._finish = ""
        # The last events, while the engine is asked for the calls in the text.
        self._closing_words = b""
        self._pulse = joint.Pulse()
        self._usage = Usage(len(progress.prompt_ids), len(progress.before))

    def used(self) -> Usage | None:
        """Exactly what was generated so far."""
        return self._usage

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        head = {"id": self._call.id, "object": "chat.completion.chunk", "created": self._progress.created, "model": self._call.model}
        return b"data: " + msgspec.json.encode({**head, "choices": choices, **more}) + b"\n\n"

    def _delta(self, finish: str | None = None, probable: Any = None, **delta: Any) -> bytes:
        return self._chunk([{"index": 0, "delta": delta, "logprobs": probable, "finish_reason": finish}])

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
            self._count(found)
            finish = found.meta_info.finish_reason
            if finish is not None and finish.type == "abort":
                self.failure = failures.aborted()
                break
            if not self._progress.opened:
                self._progress.opened = True
                out.append(self._delta(role="assistant", content=""))
            if finish is not None:
                out.append(self._last(found, finish.type))
            elif len(found.text) > self._said:
                out.append(self._words(found, self._progress.splitter.feed(found.text[self._said :])))
                # Ids whose text is held back (half a character) are generated anew by whoever goes on.
                self._progress.since = found.output_ids
                self._progress.thought_since = found.meta_info.reasoning_tokens or 0
        return self._pulse.beat(b"".join(out)) if not self.complete and not self.asks else b"".join(out)

    def _count(self, found: GenerateEvent) -> None:
        progress, thought = self._progress, found.meta_info.reasoning_tokens or 0
        total = len(progress.before) + len(found.output_ids)
        self._usage = Usage(len(progress.prompt_ids), total, found.meta_info.cached_tokens, progress.thought_before + thought or None)

    def _words(self, found: GenerateEvent, told: tuple[str, str]) -> bytes:
        """What the text so far adds, with what is known of its tokens in the first event, where chat has it."""
        thoughts, words = told
        self._said = len(found.text)
        probable = self._probabilities(found) if self._probable else None
        if probable is not None and not thoughts and not words:
            return self._delta(None, probable)
        first = self._delta(None, probable, reasoning_content=thoughts) if thoughts else b""
        return first + (self._delta(None, None if thoughts else probable, content=words) if words else b"")

    def _last(self, found: GenerateEvent, finish: str) -> bytes:
        """The end of the text. Where a call is in it the end is told when the engine has read it; until then nothing has happened, so that
        whoever goes on instead does not begin behind the end."""
        self._finish = finish
        splitter = self._progress.splitter.copy()
        thoughts, words = splitter.feed(found.text[self._said :])
        more_thoughts, more_words = splitter.finish()
        last = self._words(found, (thoughts + more_thoughts, words + more_words))
        if splitter.calls:
            self._closing_words = last
            self.asks = joint.question(self._call, splitter.tools, splitter.calls)
            return b""
        self._progress.since = found.output_ids
        return last + self._delta(finish)

    def answered(self, content: bytes) -> bytes:
        """See `EventStream`."""
        self.asks = b""
        calls = joint.pieces(parsed_decoder.decode(content).calls, 0)
        finish = self._finish = "tool_calls" if calls and self._finish == "stop" else self._finish
        said = self._delta(tool_calls=calls) if calls else b""
        return self._closing_words + said + self._delta(finish) + self._ending()

    def _probabilities(self, found: GenerateEvent) -> Any:
        """Of the tokens since the last event, as chat has them; null bytes where a token is less than a character."""
        told, self._told = self._told, len(found.output_ids)
        tokens = (found.meta_info.output_token_logprobs or [])[told:]
        likely = (found.meta_info.output_top_logprobs or [])[told:]
        content = []
        for place, token in enumerate(tokens):
            others = likely[place] if place < len(likely) else None
            content.append({**_probability(token), "top_logprobs": [_probability(other) for other in others or ()]})
        return {"content": content, "refusal": None}

    def _ending(self) -> bytes:
        if self.asks:
            return b""
        if not self._finish:
            self.failure = failures.cut("[DONE] without a finish")
            return b""
        self.complete, self.reasons = True, [self._finish]
        self.usage = usage = self._usage
        if not self._call.show_usage:
            return DONE
        total = usage.prompt_tokens + usage.completion_tokens
        counts: dict[str, Any] = {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": total,
            "reasoning_tokens": usage.reasoning_tokens or 0,
        }
        return self._chunk([], usage={**counts, "prompt_tokens_details": {"cached_tokens": usage.cached_tokens or 0}}) + DONE


def _probability(token: tuple[float | None, int, str | None]) -> dict[str, Any]:
    text = token[2] or ""
    return {"token": text, "logprob": token[0], "bytes": None if "\ufffd" in text else list(text.encode())}
