"""What a request may hold. The tables are those of OpenAI's API (openai-python's own types say which parameters there are)."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming, CompletionCreateParamsStreaming

from gateway.errors import InvalidRequest
from gateway.plugin import BOUNDS, Call, Endpoint
from gateway.serving import calls
from gateway.wire.requests import ChatRequest

USER = {"role": "user", "content": "hi"}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

# Every parameter of POST /v1/chat/completions: values that pass, and values that are refused with the place that is named.
CHAT: dict[str, tuple[list[Any], list[tuple[Any, str]]]] = {
    "messages": (
        [[{"role": role, "content": "x"}] for role in ("developer", "system", "user", "assistant", "tool", "function")]
        + [
            [{"role": "user", "content": [{"type": "text", "text": "x"}], "name": "ann"}],
            [{"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f"}}]}],
            [{"role": "assistant", "refusal": "no", "audio": {"id": "1"}, "function_call": {"name": "f"}}],
            [{"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "x", "prompt_cache_breakpoint": {}}]}],
        ],
        [([], "messages"), ("hi", "messages"), ([5], "messages[0]"), ([{"content": "x"}], "messages[0].role"),
         ([USER, {"role": 5}], "messages[1].role"), ([{"role": "user", "content": 5}], "messages[0].content"),
         ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0].type")],
    ),
    "model": (["m"], [("", "model"), (5, "model"), ([], "model")]),
    "audio": ([{"voice": "alloy", "format": "wav"}], [(5, "audio")]),
    "frequency_penalty": ([-2, 0, 2.0], [(-2.1, "frequency_penalty"), (3, "frequency_penalty"), ("1", "frequency_penalty")]),
    "function_call": ([], [("auto", "function_call"), ({"name": "f"}, "function_call")]),
    "functions": ([], [([{"name": "f"}], "functions"), ([], "functions")]),
    "logit_bias": ([{}, {"5": 100, "6": -100}], [({"5": 101}, "logit_bias"), ({"foo": 1}, "logit_bias"), ([], "logit_bias")]),
    "logprobs": ([True, False], [(1, "logprobs"), ("true", "logprobs")]),
    "max_completion_tokens": ([1, 4096], [(0, "max_completion_tokens"), (-1, "max_completion_tokens"), (1 << 40, "max_completion_tokens")]),
    "max_tokens": ([1, 4096], [(0, "max_tokens"), (-1, "max_tokens"), (1.5, "max_tokens"), (10**400, "max_tokens")]),
    "metadata": ([{}, {"a": "b"}], [({"a": 1}, "metadata"), ({"a": "x" * 513}, "metadata"), ({str(i): "" for i in range(17)}, "metadata")]),
    "modalities": ([["text"]], [("text", "modalities")]),
    "moderation": ([{"model": "x"}], [("x", "moderation")]),
    "n": ([1, 128], [(0, "n"), (129, "n"), (1.5, "n"), ("1", "n"), (True, "n")]),
    "parallel_tool_calls": ([True, False], [("yes", "parallel_tool_calls")]),
    "prediction": ([{"type": "content", "content": "x"}], [("x", "prediction")]),
    "presence_penalty": ([-2, 0, 2], [(-3, "presence_penalty"), (float("1e308"), "presence_penalty")]),
    "prompt_cache_key": (["k"], [(1, "prompt_cache_key")]),
    "prompt_cache_options": ([{"mode": "implicit", "ttl": "30m"}], [("x", "prompt_cache_options")]),
    "prompt_cache_retention": (["in_memory", "24h"], [(24, "prompt_cache_retention")]),
    "reasoning_effort": (["none", "low", "max", 0.5], [([], "reasoning_effort")]),
    "response_format": (
        [{"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}],
        [("json", "response_format"), ({}, "response_format.type"),
         ({"type": "json_schema", "json_schema": 5}, "response_format.json_schema")],
    ),
    "safety_identifier": (["x" * 128], [("x" * 129, "safety_identifier")]),
    "seed": ([0, -5, 2**63 - 1], [(2**63, "seed"), (1.5, "seed")]),
    "service_tier": (["auto", "flex"], [(1, "service_tier")]),
    "stop": (["x", ["a", "b", "c", "d"], []], [(["1", "2", "3", "4", "5"], "stop"), ([1], "stop[0]"), (5, "stop")]),
    "store": ([True, False], [("no", "store")]),
    "stream": ([True, False], [("yes", "stream"), (1, "stream")]),
    "stream_options": ([{"include_usage": True}, {"include_obfuscation": False}], [(3, "stream_options"),
                       ({"include_usage": 1}, "stream_options.include_usage")]),
    "temperature": ([0, 1.0, 2], [(-0.1, "temperature"), (2.1, "temperature"), ("hot", "temperature")]),
    "tool_choice": (
        ["none", "auto", "required", {"type": "function", "function": {"name": "f"}}],
        [("any", "tool_choice"), ({"type": "custom", "custom": {"name": "f"}}, "tool_choice.type"),
         ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}, "tool_choice.type"),
         ({"type": "function"}, "tool_choice.function")],
    ),
    "tools": (
        [[], [FUNCTION], [{"type": "function", "function": {"name": "f", "strict": True, "description": "d"}}]],
        [([{"type": "custom", "custom": {"name": "x"}}], "tools[0].type"),
         ([{"type": "function", "function": {}}], "tools[0].function.name"), ({}, "tools")],
    ),
    "top_logprobs": ([0], [(21, "top_logprobs"), (-1, "top_logprobs"), (5, "top_logprobs")]),  # 5 without logprobs
    "top_p": ([0, 0.5, 1], [(1.1, "top_p"), (-1, "top_p")]),
    "user": (["u"], [(5, "user")]),
    "verbosity": (["low", "medium", "high"], [("loud", "verbosity")]),
    "web_search_options": ([{"search_context_size": "low"}], [("x", "web_search_options")]),
}  # fmt: skip


def parse(endpoint: Endpoint = Endpoint.CHAT, **fields: Any) -> Call:
    return calls.parse(endpoint, json.dumps(fields).encode())


def chat(**fields: Any) -> Call:
    return parse(**{"model": "m", "messages": [USER], **fields})


def test_an_endpoint_is_one_row() -> None:
    assert set(calls.SPECS) == set(Endpoint)
    assert set(calls.SHAPES) == set(calls.OPERATIONS) == {endpoint.value for endpoint in Endpoint}
    for endpoint, spec in calls.SPECS.items():
        assert set(spec.prompt) <= set(spec.request.__struct_fields__), "a prompt stands where the endpoint has a parameter"
        assert spec.generates == (endpoint in BOUNDS), "what generates can be bounded"


def test_the_table_holds_every_parameter_the_sdk_knows() -> None:
    sdk = set(get_type_hints(CompletionCreateParamsNonStreaming)) | set(get_type_hints(CompletionCreateParamsStreaming))
    assert set(CHAT) == sdk == set(ChatRequest.__struct_fields__)
    assert len(sdk) == 37


@pytest.mark.parametrize("name", CHAT)
def test_a_chat_parameter_passes_as_it_was_sent(name: str) -> None:
    for value in CHAT[name][0]:
        assert json.loads(bytes(chat(**{name: value}).fields[name])) == value


@pytest.mark.parametrize("name", CHAT)
def test_a_chat_parameter_that_is_wrong_is_named_with_what_is_accepted(name: str) -> None:
    for value, param in CHAT[name][1]:
        with pytest.raises(InvalidRequest) as refused:
            chat(**{name: value})
        assert refused.value.param == param, value
        assert refused.value.status == 400
        assert param in refused.value.message
        assert refused.value.code in ("invalid_value", "invalid_type", "missing_required_parameter", "unsupported_parameter")


@pytest.mark.parametrize("name", sorted(set(CHAT) - {"model", "messages"}))
def test_a_null_counts_as_absent_and_goes_no_further(name: str) -> None:
    assert name not in chat(**{name: None}).fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": [{"type": "custom"}]}, "Invalid value 'custom' for 'tools[0].type'. Accepted: 'function'."),
        ({"verbosity": "loud"}, "Invalid value 'loud' for 'verbosity'. Accepted: 'high', 'low', 'medium'."),
        ({"tool_choice": "any"}, "Invalid value 'any' for 'tool_choice'. Accepted: 'auto', 'none', 'required'."),
        ({"n": 0}, "Invalid value for 'n': expected integer >= 1."),
        ({"stop": list("abcde")}, "Invalid value for 'stop': expected array of length <= 4."),
        ({"temperature": "hot"}, "Invalid type for 'temperature': expected number or null, got string."),
        ({"messages": [{}]}, "Missing required parameter: 'messages[0].role'."),
        ({"functions": [{"name": "f"}]}, "'functions' is not supported any more: use 'tools'."),
        ({"function_call": "auto"}, "'function_call' is not supported any more: use 'tool_choice'."),
        ({"top_logprobs": 3}, "'top_logprobs' needs 'logprobs': true."),
    ],
)
def test_a_refusal_says_what_where_and_what_is_accepted(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        chat(**fields)
    assert refused.value.message == message


def test_top_logprobs_with_logprobs_pass() -> None:
    assert chat(logprobs=True, top_logprobs=20).fields.keys() >= {"logprobs", "top_logprobs"}


@pytest.mark.parametrize(
    ("endpoint", "fields", "missing"),
    [
        (Endpoint.CHAT, {"messages": [USER]}, "model"),
        (Endpoint.CHAT, {"model": "m"}, "messages"),
        (Endpoint.COMPLETIONS, {"model": "m"}, "prompt"),
        (Endpoint.EMBEDDINGS, {"model": "m"}, "input"),
        (Endpoint.RESPONSES, {"model": "m"}, "input"),
        (Endpoint.MESSAGES, {"model": "m", "messages": [USER]}, "max_tokens"),
        (Endpoint.RERANK, {"model": "m", "query": "q"}, "documents"),
        (Endpoint.SCORE, {"model": "m", "query": "q"}, "items"),
        (Endpoint.TOKENIZE, {"prompt": "x"}, "model"),
    ],
)
def test_what_is_required_is_named(endpoint: Endpoint, fields: dict[str, Any], missing: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(endpoint, **fields)
    assert (refused.value.param, refused.value.code) == (missing, "missing_required_parameter")


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        (Endpoint.COMPLETIONS, {"prompt": "x", "best_of": 2, "echo": True, "logprobs": 5, "suffix": "y", "max_tokens": 0}),
        (Endpoint.EMBEDDINGS, {"input": "x", "encoding_format": "base64", "dimensions": 8}),
        (Endpoint.EMBEDDINGS, {"input": [[1, 2], [3]]}),
        (Endpoint.RESPONSES, {"input": [{"role": "user", "content": "x"}], "max_output_tokens": 5, "store": True}),
        (Endpoint.MESSAGES, {"messages": [USER], "max_tokens": 5, "system": "s", "stop_sequences": ["x"]}),
        (Endpoint.RERANK, {"query": "q", "documents": ["a", [{"type": "text", "text": "b"}]], "top_n": 1}),
        (Endpoint.SCORE, {"query": "q", "items": ["a"], "label_token_ids": [1, 2]}),
        (Endpoint.TOKENIZE, {"prompt": ["a", "b"]}),
        (Endpoint.TOKENIZE, {"messages": [USER]}),
    ],
)
def test_every_endpoint_keeps_what_it_was_sent(endpoint: Endpoint, fields: dict[str, Any]) -> None:
    call = parse(endpoint, model="m", **fields)
    assert {name: json.loads(bytes(value)) for name, value in call.fields.items()} == {"model": "m", **fields}
    assert call.id.startswith(calls.SPECS[endpoint].id_prefix)
    assert len(call.id) == len(calls.SPECS[endpoint].id_prefix) + 32


@pytest.mark.parametrize(("prompt", "n", "choices"), [("a", 1, 1), (["a", "b"], 1, 2), ([1, 2, 3], 1, 1), ([[1], [2]], 3, 6), ("a", 4, 4)])
def test_choices_are_counted_over_prompts(prompt: Any, n: int, choices: int) -> None:
    assert parse(Endpoint.COMPLETIONS, model="m", prompt=prompt, n=n).choices == choices


def test_a_foreign_content_type_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="application/json"):
        calls.parse(Endpoint.CHAT, b'{"model":"m","messages":[]}', b"text/plain; charset=utf-8")
