"""Streams with named events that go on: cut after any event, what is written from the same chat's chunks is what SGLang would have sent."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from backends.sglang_dsv3.continuation import named
from backends.sglang_dsv3.continuation.named import inputs, messages
from backends.sglang_dsv3.continuation.named.events import Grammar, NoChat
from backends.sglang_dsv3.continuation.named.messages import Messages
from backends.sglang_dsv3.continuation.named.responses import Responses
from gateway.plugin import Call, Endpoint
from gateway.wire import body
from tests.support.processes import GOLDEN

RECORDED = sorted(path.stem for kind in ("messages", "responses") for path in GOLDEN.glob(f"{kind}-*.sse"))
_ID = re.compile(r"\b(msg|rs|fc|call)_[0-9a-f]+\b")
DONE = b"data: [DONE]\n\n"


def events(content: bytes) -> list[bytes]:
    return [event + b"\n\n" for event in content.split(b"\n\n") if event]


def grammar(name: str) -> Grammar:
    if name.startswith("messages"):
        return Messages()
    summed_up = "summed-up" in name
    return Responses("calls" in name, summed_up, summed_up)


def chat_of(name: str) -> list[bytes]:
    """The same answer as a chat streams it: a chunk for each thing that named events tell in one (a call's name, its arguments)."""
    recorded = events((GOLDEN / f"{name.partition('-')[2].removesuffix('-summed-up')}.sse").read_bytes())

    def chunks() -> Iterator[dict[str, Any]]:
        for event in recorded[:-1]:
            chunk = json.loads(event[6:])
            delta = chunk["choices"][0]["delta"] if chunk["choices"] else {}
            for call in delta.get("tool_calls") or ():
                function = call["function"]
                if function["name"]:
                    yield {
                        "choices": [
                            {
                                "delta": {
                                    "tool_calls": [{**call, "id": call["id"].replace("_0", "_f"), "function": {"name": function["name"]}}]
                                }
                            }
                        ]
                    }
                if function["arguments"]:
                    arguments = {"index": call["index"], "function": {"arguments": function["arguments"]}}
                    yield {"choices": [{"delta": {"tool_calls": [arguments]}}]}
            if not delta.get("tool_calls") and delta.get("content") != "":
                yield chunk

    return [b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks()]


def numbered(content: bytes) -> list[Any]:
    """Events with their ids by the order in which those of a kind come."""
    seen: dict[str, list[str]] = {}

    def number(found: re.Match[str]) -> str:
        known = seen.setdefault(found[1], [])
        if found[0] not in known:
            known.append(found[0])
        return f"{found[1]}_{known.index(found[0])}"

    text = _ID.sub(number, content.decode())
    return [(event.split("\n")[0], json.loads(event.partition("data: ")[2])) for event in text.split("\n\n") if event]


@pytest.mark.parametrize("name", RECORDED)
def test_what_is_written_is_what_would_have_come(name: str) -> None:
    whole, chat = events((GOLDEN / f"{name}.sse").read_bytes()), chat_of(name)
    assert len(whole) > 5
    for cut in range(3, len(whole)):  # what comes before that is not given out as long as nothing follows it
        stream = grammar(name)
        stream.read(b"".join(whole[:cut]))
        done = stream.as_chat().count(b"\n\n")
        left = [*(chat[-1:] if stream.finish else chat[done:]), DONE]
        written = b"".join(stream.write(block) for block in left)
        assert numbered(b"".join(whole[:cut]) + written) == numbered(b"".join(whole)), f"cut after event {cut}: {whole[cut - 1]!r}"


@pytest.mark.parametrize("name", RECORDED)
def test_it_is_read_as_a_chat_would_have_said_it(name: str) -> None:
    stream = grammar(name)
    stream.read((GOLDEN / f"{name}.sse").read_bytes())
    said = {"content": "", "reasoning_content": "", "arguments": ""}
    for event in events(stream.as_chat()):
        (choice,) = json.loads(event[6:])["choices"]
        for part in ("content", "reasoning_content"):
            said[part] += choice["delta"].get(part, "")
        for call in choice["delta"].get("tool_calls", ()):
            said["arguments"] += call["function"]["arguments"]
    expected = {"content": "", "reasoning_content": "", "arguments": ""}
    for event in chat_of(name):
        for choice in json.loads(event[6:])["choices"]:
            for part in ("content", "reasoning_content"):
                expected[part] += choice["delta"].get(part) or ""
            for call in choice["delta"].get("tool_calls", ()):
                expected["arguments"] += call["function"].get("arguments", "")
    assert said == expected
    assert stream.text == said["content"]


def fields(**values: Any) -> body.Fields:
    return {name: body.encode(value) for name, value in values.items()}


def plain(found: body.Fields) -> dict[str, Any]:
    return {name: msgspec.json.decode(value) for name, value in found.items()}


def test_a_request_for_messages_is_the_chat_that_sglang_makes_of_it() -> None:
    asked = fields(
        max_tokens=9, temperature=0.5, top_k=3, stop_sequences=["END"], thinking={"type": "enabled", "budget_tokens": 2000},
        tools=[{"name": "look", "input_schema": {"type": "object"}}, {"type": "web_search_20250305", "name": "web_search"}],
        tool_choice={"type": "tool", "name": "look", "disable_parallel_tool_use": True}, metadata={"user_id": "x"},
        system=[{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}],
        messages=[
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": [
                {"type": "text", "text": "I look."}, {"type": "tool_use", "id": "t1", "name": "look", "input": {"q": 1}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
                {"type": "text", "text": "And?"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
            ]},
        ],
    )  # fmt: skip
    function = {"name": "look", "description": "", "parameters": {"type": "object"}, "strict": False}
    assert plain(messages.parameters(asked)) == {
        "max_tokens": 9, "temperature": 0.5, "top_k": 3, "stop": ["END"],
        "chat_template_kwargs": {"thinking": True, "enable_thinking": True},
        "tools": [{"type": "function", "function": function, "defer_loading": None}],
        "tool_choice": {"type": "function", "function": {"name": "look"}}, "parallel_tool_calls": False,
    }  # fmt: skip
    assert messages.messages(asked) == [
        {"role": "system", "content": "Be brief.\nBe kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "look", "arguments": '{"q": 1}'}}],
         "content": "I look."},
        {"role": "tool", "tool_call_id": "t1", "content": "rain"},
        {"role": "user", "content": [
            {"type": "text", "text": "And?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        ]},
    ]  # fmt: skip
    for content in ([{"type": "thinking", "thinking": "x"}], [{"type": "search_result"}]):
        with pytest.raises(NoChat):
            messages.messages(fields(messages=[{"role": "assistant", "content": content}]))
    with pytest.raises(NoChat):
        messages.messages(fields(messages=[{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]))


def test_a_request_for_a_response_is_the_chat_that_sglang_makes_of_it() -> None:
    asked = fields(
        max_output_tokens=9, temperature=0, stop="END", reasoning={"effort": "none"}, instructions="Be brief.",
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
        tools=[{"type": "function", "name": "look", "parameters": {"type": "object"}}], tool_choice={"type": "function", "name": "look"},
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm."}]},
            {"type": "message", "id": "msg_1", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
            {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"q":1}'},
            {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        ],
    )  # fmt: skip
    function = {"name": "look", "description": None, "parameters": {"type": "object"}, "strict": False}
    assert plain(inputs.parameters(asked)) == {
        "max_output_tokens": 9, "temperature": 0, "stop": "END", "reasoning_effort": "none",
        "chat_template_kwargs": {"thinking": False, "enable_thinking": False},
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
        "tools": [{"type": "function", "function": function}], "tool_choice": {"type": "function", "function": {"name": "look"}},
    }  # fmt: skip
    assert inputs.messages(asked) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "reasoning_content": "Hm.", "content": [{"type": "text", "text": "I look."}],
         "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"q":1}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]  # fmt: skip
    assert inputs.messages(fields(input=[{"role": "developer", "content": "Hush."}, {"role": "user", "content": "x"}]))[0] == {
        "role": "system", "content": "Developer instructions:\nHush.",
    }  # fmt: skip
    for item in ({"type": "custom_tool_call"}, {"role": "system", "content": "late"}, {"type": "reasoning", "encrypted_content": "x"}):
        with pytest.raises(NoChat):
            inputs.messages(fields(input=[{"role": "user", "content": "x"}, item]))
    for more in ({"previous_response_id": "resp_1"}, {"background": True}, {"tools": [{"type": "web_search"}]}):
        with pytest.raises(NoChat):
            inputs.parameters(fields(**more))


@pytest.mark.parametrize("endpoint", [Endpoint.MESSAGES, Endpoint.RESPONSES])
def test_what_could_go_on_is_told_by_the_parameters(endpoint: Endpoint) -> None:
    def resumable(**more: Any) -> bool:
        return named.resumable(Call(endpoint, "id", "m", fields(model="m", **more), stream=True))

    assert resumable()
    assert not named.resumable(Call(endpoint, "id", "m", fields(model="m")))
    if endpoint is Endpoint.RESPONSES:
        assert resumable(text={"format": {"type": "text"}})
        assert not resumable(previous_response_id="resp_1")
