"""What may go on and as what, as far as the call and what was delivered tell; with real parsers and engines in tests/engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from backends.sglang_dsv3.continuation import resume, unfinished
from backends.sglang_dsv3.shapes import Continuation, Parsers
from gateway.plugin import Call, Endpoint, Reply, Terms, Usage
from gateway.wire import body

V31, V32, V4 = Parsers("deepseek-v3", "deepseekv31"), Parsers("deepseek-v3", "deepseekv32"), Parsers("deepseek-v4", "deepseekv4")
R1 = Parsers("deepseek-r1")
TOOLS = [{"type": "function", "function": {"name": "f"}}]
WORDS: dict[str, Any] = {"content": "w"}
THOUGHT: dict[str, Any] = {"reasoning_content": "t"}
CALLED: dict[str, Any] = {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": '{"a'}}]}


def chat(**fields: Any) -> Call:
    all_fields = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    return Call(Endpoint.CHAT, "c", "m", {name: body.encode(value) for name, value in all_fields.items()}, True)


def events(*deltas: dict[str, Any]) -> bytes:
    chunks = [{"created": 1, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)


def going_on(parsers: Parsers, fields: dict[str, Any], *deltas: dict[str, Any]) -> Call | Reply | None:
    return resume.resume(chat(**fields), Terms(), events({"role": "assistant", "content": ""}, *deltas), Usage(5, 2), parsers)


@pytest.mark.parametrize(
    ("parsers", "fields", "deltas", "goes_on"),
    [
        (V31, {"tools": TOOLS}, [WORDS], True),
        (V31, {"tools": TOOLS}, [THOUGHT, WORDS, CALLED], True),
        (V32, {"tools": TOOLS}, [THOUGHT, WORDS], True),
        (V32, {"tools": TOOLS}, [CALLED], False),
        (V4, {"tools": TOOLS}, [CALLED], False),
        (V31, {"tools": TOOLS, "tool_choice": "required"}, [THOUGHT], True),
        (V31, {"tools": TOOLS, "tool_choice": "required"}, [CALLED], False),
        (V31, {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, [WORDS], False),
        (V31, {"response_format": {"type": "json_object"}}, [{"content": '{"a'}], True),
        (V31, {"response_format": {"type": "json_object"}}, [{"content": "no object"}], False),
        (R1, {"response_format": {"type": "json_object"}}, [THOUGHT, {"content": '{"a'}], False),
        (V31, {"response_format": {"type": "json_schema"}}, [{"content": '{"a'}], False),
        (V31, {"response_format": {"type": "json_schema"}}, [THOUGHT], True),
        (V31, {"response_format": {"type": "text"}}, [WORDS], True),
        (V31, {"regex": "a"}, [], True),
        (V31, {"logprobs": True}, [WORDS], False),
        (Parsers(), {}, [THOUGHT], False),
        (Parsers("qwen3"), {}, [THOUGHT, WORDS], False),
        (V4, {"separate_reasoning": False}, [WORDS], False),
        (V31, {}, [WORDS, THOUGHT], False),
        (V31, {"stop": "wx"}, [WORDS], False),
        (V31, {"messages": [{"role": "assistant", "content": "Hi"}]}, [WORDS], False),
    ],
)
def test_what_goes_on(parsers: Parsers, fields: dict[str, Any], deltas: list[dict[str, Any]], goes_on: bool) -> None:
    assert isinstance(going_on(parsers, fields, *deltas), Call) is goes_on


def test_v4_is_given_thoughts_in_a_member_of_their_own() -> None:
    """Golden, from deepseek-recipe 0.2.0 (2026-11-28): `prefix` of this message makes `<｜Assistant｜><think>t` and `<think>t</think>w`."""
    for deltas, message in (
        ([THOUGHT], {"role": "assistant", "content": "", "reasoning_content": "t"}),
        ([THOUGHT, WORDS], {"role": "assistant", "content": "w", "reasoning_content": "t"}),
        ([WORDS], {"role": "assistant", "content": "w"}),
    ):
        again = going_on(V4, {}, *deltas)
        assert isinstance(again, Call)
        assert json.loads(bytes(again.fields["messages"]))[-1] == message
        assert json.loads(bytes(again.fields["continue_final_message"])) is True


def test_a_call_that_has_begun_is_kept_with_its_id() -> None:
    again = going_on(V31, {"tools": TOOLS}, CALLED, {"tool_calls": [{"index": 0, "function": {"arguments": '":1'}}]})
    assert isinstance(again, Call)
    assert isinstance(again.continues, Continuation)
    assert again.continues.given is not None
    assert [(call.id, call.name, call.arguments) for call in again.continues.given.calls] == [("c", "f", '{"a":1')]


def test_a_whole_object_lacks_its_end_alone() -> None:
    ended = going_on(V31, {"response_format": {"type": "json_object"}}, {"content": '{"a": 1}'})
    assert isinstance(ended, Reply)


@pytest.mark.parametrize("text", ["[", "x", '{"a" 1', '{"a":1 2', '{"a":tru3', '{"a":"\\x', '{"a":1]', "{,", '{"a":1}}', '{"a":01'])
def test_what_begins_no_object(text: str) -> None:
    with pytest.raises(unfinished.NotJSONError):
        unfinished.rest(text)
