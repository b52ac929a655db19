"""What another engine is asked, to go on with a chat: by words (its own parsers go on reading them) or, where those would begin anew in the
middle of something, with the raw text over token ids and no parsers at all.

Whether the template has opened the thinking is not in the call: templates differ, and thinking is switched by their own words. So the
engine is asked for the prompt's ids (`/tokenize`), which cost it a millisecond and no token.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from backends.sglang_dsv3.continuation import markup, resume, unfinished
from backends.sglang_dsv3.shapes import Continuation, Delivered, many_tokens_decoder, tokens_decoder
from gateway.plugin import Call
from gateway.wire import body

# One more question to the host that is to go on: a path and a body, and its answer's.
Ask = Callable[[str, bytes], Awaitable[bytes]]

# What shapes the prompt, for /tokenize.
TEMPLATE = ("messages", "tools", "tool_choice", "chat_template_kwargs", "reasoning_effort", "continue_final_message")
# What an engine would do to raw text, or put into a prompt that is given already.
_PARSED = (
    *("tools", "tool_choice", "parallel_tool_calls", "response_format", "chat_template_kwargs", "reasoning_effort"),
    *("continue_final_message", "separate_reasoning", "stream_reasoning", "skip_special_tokens"),
)
_OPENINGS = (markup.THINK, markup.THINK + "\n")


def tokenize_body(call: Call) -> bytes:
    """What `/tokenize` is asked for the prompt."""
    return body.splice({name: call.fields[name] for name in TEMPLATE if name in call.fields}, {"model": call.model})


def prompt_ids(content: bytes) -> list[int]:
    """Its answer; raises msgspec.DecodeError."""
    return tokens_decoder.decode(content).tokens


async def openings(ask: Ask) -> list[list[int]]:
    """How a prompt ends that has opened the thinking; raises msgspec.DecodeError."""
    return many_tokens_decoder.decode(await ask("/tokenize", _raw(list(_OPENINGS)))).tokens


def opens(ids: list[int], ends: list[list[int]]) -> bool:
    """Whether a prompt does."""
    return any(end and ids[-len(end) :] == end for end in ends)


def amid_a_call(call: Call) -> bool:
    """Whether it goes on in the middle of a call, whose raw text comes then."""
    continues = call.continues
    return isinstance(continues, Continuation) and continues.given is not None and bool(continues.given.calls)


async def placed(call: Call, ask: Ask, ends: Callable[[], Awaitable[list[list[int]]]]) -> Call:
    """The call as it is sent. Raises msgspec.DecodeError where the engine answers nonsense."""
    continues = call.continues
    assert isinstance(continues, Continuation)
    given, parsers = continues.given, continues.parsers
    assert given is not None
    assert parsers is not None
    raw = resume.raw(call, given)
    if not raw and parsers.reasoning not in markup.THINKING:
        return call
    ids = prompt_ids(await ask("/tokenize", tokenize_body(call)))
    opened = False
    if parsers.reasoning in markup.THINKING:
        before = await _ids_before(call, ask) if _continues_itself(call) else ids
        opened = _still_thinking(call, opens(before, await ends()))
    if raw:
        text = markup.spoken(given, opened, resume.thoughts_apart(call))
        fields = await _over_ids(call, ids, text, given, parsers.tools, ask)
    else:
        fields = resume.as_words(call, given, parsers, opened)
    return msgspec.structs.replace(call, fields=fields)


async def _over_ids(call: Call, ids: list[int], text: str, given: Delivered, tools: str, ask: Ask) -> body.Fields:
    """The call's fields with the prompt as ids, and nothing that makes the engine read what it says."""
    more: dict[str, Any] = {"separate_reasoning": False}
    if given.calls:
        text += markup.called(tools, given.calls)
        more["skip_special_tokens"] = False
    else:
        more["ebnf"] = unfinished.rest(given.text)
    more["input_ids"] = ids + prompt_ids(await ask("/tokenize", _raw(text)))
    fields = {name: value for name, value in call.fields.items() if name not in _PARSED}
    return {**fields, **{name: body.encode(value) for name, value in more.items()}}


def _raw(text: str | list[str]) -> bytes:
    return msgspec.json.encode({"prompt": text, "add_special_tokens": False})


def _continues_itself(call: Call) -> bool:
    return resume.last_message(call).role == "assistant"


async def _ids_before(call: Call, ask: Ask) -> list[int]:
    """The prompt of a call that ends in the beginning of an answer, before that beginning."""
    bare = msgspec.structs.replace(call, fields={**call.fields, "messages": resume.without_last(call)})
    return prompt_ids(await ask("/tokenize", tokenize_body(bare)))


def _still_thinking(call: Call, opened: bool) -> bool:
    """Whether the answer begins in the middle of thoughts, the client's own beginning of it included."""
    last = resume.last_message(call)
    own = last.content if last.role == "assistant" and isinstance(last.content, str) else ""
    return (opened or markup.THINK in own) and markup.THOUGHT not in own
