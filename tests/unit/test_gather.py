"""JSON answers put together from streams that SGLang wrote: calls, thoughts, log-probabilities, several choices."""

from __future__ import annotations

import json
from typing import Any

import pytest

from backends.sglang_dsv3.gather import gather
from gateway.plugin import AttemptFailed, Call, Endpoint
from gateway.wire import body
from tests.support.processes import GOLDEN

CALLS = [("get_weather", {"city": 'Berlin "Mitte"\nñ', "days": 3}), ("get_news", {"city": "Paris"})]
THOUGHT = "The user asks for two things.\nI call two tools."


def gathered(endpoint: Endpoint, name: str) -> dict[str, Any]:
    found = gather(Call(endpoint, "public", "m", {"model": body.encode("m")}))
    assert found is not None
    assert found.call.stream
    for event in (GOLDEN / f"{name}.sse").read_bytes().split(b"\n\n"):
        found.add(event + b"\n\n")
    answer: dict[str, Any] = json.loads(found.whole())
    return answer


@pytest.mark.parametrize("name", ["v32-thinks-and-calls", "v4-thinks-and-calls"])
def test_a_chat_with_thoughts_and_calls(name: str) -> None:
    answer = gathered(Endpoint.CHAT, name)
    (choice,) = answer["choices"]
    message = choice["message"]
    assert (choice["finish_reason"], message["role"], message["reasoning_content"]) == ("tool_calls", "assistant", THOUGHT)
    assert [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]] == CALLS
    assert [(call["index"], call["type"], call["id"][:5]) for call in message["tool_calls"]] == [
        (0, "function", "call_"),
        (1, "function", "call_"),
    ]
    assert (answer["id"], answer["object"], answer["usage"]["prompt_tokens"]) == ("public", "chat.completion", 42)


def test_calls_that_come_in_pieces() -> None:
    (choice,) = gathered(Endpoint.CHAT, "v4-in-pieces")["choices"]
    arguments = [json.loads(call["function"]["arguments"]) for call in choice["message"]["tool_calls"]]
    assert arguments == [{"city": "Berlin", "days": 3}, {"city": "Paris"}]
    assert choice["message"]["content"] == "I look. ñ 雨"


def test_messages_with_thoughts_and_calls() -> None:
    answer = gathered(Endpoint.MESSAGES, "messages-v32-thinks-and-calls")
    thinking, *calls = answer["content"]
    assert thinking == {"type": "thinking", "thinking": THOUGHT}
    assert [(call["name"], call["input"]) for call in calls] == CALLS
    assert answer["stop_reason"] == "tool_use"
    assert answer["usage"]["input_tokens"] == 42
    assert answer["usage"]["output_tokens"] > 100


def test_a_response_is_what_the_last_event_holds() -> None:
    answer = gathered(Endpoint.RESPONSES, "responses-v32-thinks-and-calls")
    assert [item["type"] for item in answer["output"]] == ["reasoning", "function_call", "function_call"]
    assert answer["status"] == "completed"


def test_several_choices_and_log_probabilities() -> None:
    both = gathered(Endpoint.CHAT, "sglang-0.5.23-chat-two-choices")
    assert [(choice["index"], choice["message"]["content"]) for choice in both["choices"]] == [(0, "stru._ sub"), (1, "acksesodule")]
    (choice,) = gathered(Endpoint.COMPLETIONS, "sglang-0.5.23-completions")["choices"]
    assert choice["text"] == "�urniz"
    assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"]) == 3


def test_what_is_asked_for_as_json_all_the_same() -> None:
    def taken(endpoint: Endpoint, **fields: Any) -> bool:
        return gather(Call(endpoint, "id", "m", {name: body.encode(value) for name, value in fields.items()})) is not None

    assert taken(Endpoint.CHAT, messages=[])
    assert not taken(Endpoint.CHAT, messages=[], logprobs=True)
    assert not taken(Endpoint.CHAT, messages=[], return_hidden_states=True)
    assert not taken(Endpoint.RESPONSES, input="x", background=True)
    assert not taken(Endpoint.EMBEDDINGS, input="x")


def test_events_of_no_answer_are_the_hosts_fault() -> None:
    found = gather(Call(Endpoint.CHAT, "id", "m", {}))
    assert found is not None
    with pytest.raises(AttemptFailed):
        found.add(b'data: {"nothing":"known"}\n\n')
