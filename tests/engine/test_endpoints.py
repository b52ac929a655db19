"""What the real engine says on every endpoint it serves, and what becomes of its refusals."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.support import raw
from tests.support.processes import Gateway

MODEL = "deepseek-v3-tiny"
CHAT = "/v1/chat/completions"
USER: list[Any] = [{"role": "user", "content": "A secret in the prompt"}]


def ask(running: Gateway, path: str, **fields: Any) -> raw.Answer:
    return raw.call(running.port, "POST", path, {"model": MODEL, **fields})


def test_responses(served: Gateway) -> None:
    with openai.OpenAI(base_url=served.base_url, api_key="none", max_retries=0) as client:
        answer = client.responses.create(model=MODEL, input="hi", max_output_tokens=4)
        assert answer.id.startswith("resp_")
        assert answer.usage is not None
        assert 1 <= answer.usage.output_tokens <= 4
        events: list[Any] = list(client.responses.create(model=MODEL, input="hi", max_output_tokens=4, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text is not None


def test_messages(served: Gateway) -> None:
    answer = ask(served, "/v1/messages", messages=USER, max_tokens=4).json()
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", MODEL)
    stream = ask(served, "/v1/messages", messages=USER, max_tokens=4, stream=True)
    assert stream.body.startswith(b"event: message_start\n")
    assert stream.body.rstrip().endswith(b'data: {"type":"message_stop"}')


def test_tokenize_and_score(served: Gateway) -> None:
    tokens = ask(served, "/tokenize", prompt="hello world").json()
    assert tokens["count"] == len(tokens["tokens"]) > 0
    scores = ask(served, "/v1/score", query="is it", items=["yes", "no"], label_token_ids=[5, 6], apply_softmax=True).json()["scores"]
    assert [round(sum(row), 3) for row in scores] == [1, 1]


def test_embeddings_are_not_what_this_model_does(served: Gateway) -> None:
    answer = ask(served, "/v1/embeddings", input="x")
    assert (answer.status, answer.error()["code"]) == (404, "unknown_url")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": [{"role": "bad", "content": "A secret"}]}, "messages[0].role", "must be one of 'system'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]},
            "messages[0].content[0].type",
            "Input should be 'text'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]}, None, "only supports text"),
        ({"messages": USER, "top_p": 0}, "top_p", "top_p must be in (0, 1]"),
        ({"messages": USER, "response_format": {"type": "xyz"}}, "response_format.type", "Input should be 'text'"),
        (
            {"messages": USER, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
            "response_format",
            'Unsupported type "nonsense"',
        ),
        ({"messages": USER, "tool_choice": "required"}, None, "Tools cannot be empty"),
        ({"messages": USER, "max_tokens": 400_000}, "max_tokens", "too large"),
        ({"messages": [{"role": "user", "content": "word " * 8000}]}, "messages", "context_length_exceeded"),
        ({"messages": USER, "regex": "a", "ebnf": "root ::= 'a'"}, None, ""),
        ({"messages": USER, "min_p": 7}, "min_p", ""),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_engines_refusals_say_what_and_where_and_nothing_else(
    served: Gateway, fields: dict[str, Any], param: str | None, words: str, stream: bool
) -> None:
    answer = ask(served, CHAT, **fields, stream=stream)
    assert answer.status == 400
    error = answer.error()
    assert error["param"] == param
    assert words in error["message"]
    assert len(error["message"]) < 400
    for leak in ("secret", "/", "Traceback", "validation error", "function-after", "ctx"):
        assert leak not in error["message"].replace("n/a", "")
    assert error["type"] == "invalid_request_error"
