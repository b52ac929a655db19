"""What a request may hold: by OpenAI's rules, where they are asked for (openai-python's own types say which parameters there are), and by
default whatever the engine may take, of which we read what we must know as it does."""

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


def parse(endpoint: Endpoint = Endpoint.CHAT, strict: bool = False, **fields: Any) -> Call:
    return calls.parse(endpoint, json.dumps(fields).encode(), strict=strict)


def chat(strict: bool = False, **fields: Any) -> Call:
    return parse(strict=strict, **{"model": "m", "messages": [USER], **fields})


def held(call: Call) -> dict[str, Any]:
    return {name: json.loads(bytes(value)) for name, value in call.fields.items()}


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


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", CHAT)
def test_a_chat_parameter_passes_as_it_was_sent(name: str, strict: bool) -> None:
    for value in CHAT[name][0]:
        assert held(chat(strict, **{name: value}))[name] == value


@pytest.mark.parametrize("name", CHAT)
def test_a_chat_parameter_that_breaks_openais_rules_is_named_with_what_is_accepted(name: str) -> None:
    for value, param in CHAT[name][1]:
        with pytest.raises(InvalidRequest) as refused:
            chat(strict=True, **{name: value})
        assert refused.value.param == param, value
        assert refused.value.status == 400
        assert param in refused.value.message
        assert refused.value.code in ("invalid_value", "invalid_type", "missing_required_parameter", "unsupported_parameter")


# What we must know ourselves, or what an engine would leave undone without a word; of all else the engine is the judge.
OURS = {"messages", "model", "n", "stream", "stream_options", "max_tokens", "max_completion_tokens", "functions", "function_call"}


@pytest.mark.parametrize("name", sorted(set(CHAT) - OURS))
def test_what_openai_refuses_is_the_engines_to_judge(name: str) -> None:
    for value, _ in CHAT[name][1]:
        assert held(chat(**{name: value}))[name] == value


# As it is sent, what we understand, and what the engine gets.
READ: list[tuple[Endpoint, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (Endpoint.CHAT, {"stream": "false"}, {"stream": False}, {"stream": False}),
    (Endpoint.CHAT, {"stream": "Yes"}, {"stream": True}, {"stream": True}),
    (Endpoint.CHAT, {"stream": 1}, {"stream": True}, {"stream": True}),
    (Endpoint.CHAT, {"n": "2"}, {"choices": 2}, {"n": 2}),
    (Endpoint.CHAT, {"n": 2.0}, {"choices": 2}, {"n": 2}),
    (Endpoint.CHAT, {"n": True}, {"choices": 1}, {"n": 1}),
    (Endpoint.CHAT, {"max_tokens": 4.0}, {"bound": 4}, {"max_tokens": 4}),
    (Endpoint.CHAT, {"max_tokens": "4"}, {"bound": 4}, {"max_tokens": 4}),
    (Endpoint.CHAT, {"max_tokens": " +4.00"}, {"bound": 4}, {"max_tokens": 4}),
    (Endpoint.CHAT, {"max_tokens": 0}, {"bound": None}, {}),
    (Endpoint.CHAT, {"max_completion_tokens": "0", "max_tokens": "7"}, {"bound": 7}, {"max_tokens": 7}),
    (Endpoint.CHAT, {"max_completion_tokens": 5, "max_tokens": -1}, {"bound": 5}, {"max_completion_tokens": 5, "max_tokens": -1}),
    (Endpoint.CHAT, {"stream_options": {"include_usage": 1, "x": 2}}, {"show_usage": True},
     {"stream_options": {"include_usage": True, "x": 2}}),
    (Endpoint.CHAT, {"stream_options": {"include_usage": None}}, {"show_usage": False}, {"stream_options": {"include_usage": None}}),
    (Endpoint.CHAT, {"stream_options": {}}, {"show_usage": False}, {"stream_options": {}}),
    (Endpoint.CHAT, {"functions": [], "function_call": "auto"}, {}, {}),
    (Endpoint.COMPLETIONS, {"n": "2", "prompt": ["a", "b"]}, {"choices": 4, "prompts": 2}, {"n": 2, "prompt": ["a", "b"]}),
    (Endpoint.COMPLETIONS, {"max_tokens": "0", "prompt": "x"}, {"bound": 0}, {"max_tokens": 0, "prompt": "x"}),
    (Endpoint.COMPLETIONS, {"logprobs": True, "prompt": "x"}, {}, {"logprobs": True, "prompt": "x"}),
    (Endpoint.RESPONSES, {"input": "x", "max_output_tokens": "3", "stream": "on"}, {"bound": 3, "stream": True},
     {"input": "x", "max_output_tokens": 3, "stream": True}),
    (Endpoint.MESSAGES, {"messages": [USER], "max_tokens": "3"}, {"bound": 3}, {"messages": [USER], "max_tokens": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("endpoint", "sent", "understood", "passed"), READ)
def test_what_we_must_know_is_read_as_the_engine_reads_it_and_passed_on_plainly(
    endpoint: Endpoint, sent: dict[str, Any], understood: dict[str, Any], passed: dict[str, Any]
) -> None:
    base = {"model": "m", "messages": [USER]} if endpoint is Endpoint.CHAT else {"model": "m"}
    call = parse(endpoint, **base, **sent)
    found = {"bound": calls.bound(call)} | {name: getattr(call, name) for name in ("stream", "choices", "prompts", "show_usage")}
    assert {name: found[name] for name in understood} == understood
    assert held(call) == base | passed


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"stream": "maybe"}, "stream", "Invalid type for 'stream': expected boolean, got string."),
        ({"stream": 2}, "stream", "Invalid type for 'stream': expected boolean, got number."),
        ({"n": 0}, "n", "Invalid value for 'n': expected integer >= 1."),
        ({"n": 129}, "n", "Invalid value for 'n': expected integer <= 128."),
        ({"n": []}, "n", "Invalid type for 'n': expected integer, got array."),
        ({"max_tokens": 1.5}, "max_tokens", "Invalid type for 'max_tokens': expected integer, got number."),
        ({"max_tokens": 10**400}, "max_tokens", "Invalid value for 'max_tokens': the number is too large."),
        ({"max_tokens": -1}, "max_tokens", "Invalid value for 'max_tokens': expected integer >= 1."),
        ({"max_completion_tokens": 1 << 31}, "max_completion_tokens",
         "Invalid value for 'max_completion_tokens': expected integer <= 2147483647."),
        ({"stream_options": 3}, "stream_options", "Invalid type for 'stream_options': expected object, got number."),
        ({"stream_options": {"include_usage": {}}}, "stream_options.include_usage",
         "Invalid type for 'stream_options.include_usage': expected boolean, got object."),
        ({"messages": "hi"}, "messages", "Invalid type for 'messages': expected array, got string."),
        ({"model": 5}, "model", "Invalid type for 'model': expected string, got number."),
        ({"model": ""}, "model", "Invalid value for 'model': expected string of length >= 1."),
        ({"model": None}, "model", "Missing required parameter: 'model'."),
        ({"functions": [{"name": "f"}]}, "functions", "'functions' is not supported any more: use 'tools'."),
        ({"function_call": {"name": "f"}}, "function_call", "'function_call' is not supported any more: use 'tool_choice'."),
    ],
)  # fmt: skip
def test_what_we_cannot_read_is_refused(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        chat(**fields)
    assert (refused.value.param, refused.value.message) == (param, message)


@pytest.mark.parametrize("endpoint", Endpoint)
@pytest.mark.parametrize("strict", [False, True])
def test_a_null_counts_as_absent_and_goes_no_further(endpoint: Endpoint, strict: bool) -> None:
    sent = {name: value for name, value in WHOLE.items() if name in calls.SPECS[endpoint].request.__struct_fields__}
    nulls = {name: None for name in calls.SPECS[endpoint].request.__struct_fields__ if name not in sent}
    call = parse(endpoint, strict, **sent, **nulls, cache_salt=None, never_heard_of=None)
    assert held(call) == sent


WHOLE = {"model": "m", "messages": [USER], "prompt": "p", "input": "i", "max_tokens": 5, "query": "q", "documents": ["d"], "items": ["i"]}


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
        chat(strict=True, **fields)
    assert refused.value.message == message


def test_top_logprobs_with_logprobs_pass() -> None:
    assert chat(strict=True, logprobs=True, top_logprobs=20).fields.keys() >= {"logprobs", "top_logprobs"}


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


@pytest.mark.parametrize("value", ["v" * 100_000, {"k" * 100_000: "loud"}])
def test_a_refusal_does_not_repeat_what_is_long(value: Any) -> None:
    for name in ("verbosity", "temperature", "metadata", "tool_choice"):
        with pytest.raises(InvalidRequest) as refused:
            chat(strict=True, **{name: value})
        assert len(refused.value.message) < 2000


def test_of_a_large_body_the_small_parameters_are_held_to_the_rules() -> None:
    filling = "x" * (1 << 20)
    for endpoint, sent, param in (
        (Endpoint.CHAT, {"messages": [{"role": "user", "content": filling}], "tools": [{"type": "custom"}]}, "tools[0].type"),
        (Endpoint.CHAT, {"messages": [{"role": "user", "content": filling}], "temperature": 3}, "temperature"),
        (Endpoint.CHAT, {"messages": [{"role": 5}], "x": filling}, "messages[0].role"),
        (Endpoint.COMPLETIONS, {"prompt": filling, "top_p": "1"}, "top_p"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            parse(endpoint, strict=True, model="m", **sent)
        assert refused.value.param == param


def test_a_long_name_of_a_model_is_not_kept() -> None:
    for name in ("m" * 300, "\u00e9" * 300, "m" * 1_000_000, "\U0001f600" * 100_000):
        for text in (json.dumps, lambda value: json.dumps(value, ensure_ascii=False)):
            call = calls.parse(Endpoint.CHAT, b'{"messages":[],"model":%s}' % text(name).encode())
            assert len(call.model) < 300
            assert call.model[:10] in ("mmmmmmmmmm", "\u00e9" * 10, "\U0001f600" * 10, "\\ud83d\\ude")
    assert chat(model="m" * 256).model == "m" * 256


@pytest.mark.parametrize(
    ("sent", "near"),
    [
        ("temprature", "temperature"), ("temperatur", "temperature"), ("temperature_", "temperature"), ("Temperature", "temperature"),
        ("tempreature", "temperature"), ("temparature", "temperature"), ("max_token", "max_tokens"), ("maxTokens", "max_tokens"),
        ("max-tokens", "max_tokens"), ("max_tokenss", "max_tokens"), ("tool", "tools"), ("strem", "stream"),
        ("respons_format", "response_format"),
        ("top_k", ""), ("min_p", ""), ("regex", ""), ("x", ""), ("seeds", "seed"), ("\u00e9temperature", ""), ("temperature\r\n", ""),
        ("t" * 900, ""), ("", ""), ("temperature\"", ""),
    ],
)  # fmt: skip
def test_a_slip_in_a_name_is_noticed(sent: str, near: str) -> None:
    warning = calls.near_miss(chat(False, **{sent: 1}))
    assert warning == (f"unknown parameter '{sent}', did you mean '{near}'?" if near else "")


def test_no_warning_for_what_is_known_or_there_already_and_only_for_a_few() -> None:
    assert calls.near_miss(chat(temperature=1, n=1)) == ""
    assert calls.near_miss(chat(temperature=1, temprature=1)) == ""
    many = {f"x{number}": 1 for number in range(900)}
    assert calls.near_miss(chat(False, **many, temprature=1)) == ""
    assert calls.near_miss(chat(temprature=1, seeds=1)).count("did you mean") == 2


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/chat/completions", "It is served at /v1/chat/completions: set base_url to https://gw:8000/v1."),
        ("/v1/v1/chat/completions", "It is served at /v1/chat/completions: set base_url to https://gw:8000/v1."),
        ("/openai/v1/chat/completions/", "It is served at /v1/chat/completions: set base_url to https://gw:8000/v1."),
        ("/completions", "It is served at /v1/completions: set base_url to https://gw:8000/v1."),
        ("/v1/v1/models/org/m", "It is served at /v1/models: set base_url to https://gw:8000/v1."),
        ("/v1/v1/messages", "It is served at /v1/messages: set base_url to https://gw:8000."),
        ("/v1/tokenize", "It is served at /tokenize: set base_url to https://gw:8000."),
        ("//v1", "The API is below https://gw:8000/v1: set base_url to that."),
        ("/v1/v1/", "The API is below https://gw:8000/v1: set base_url to that."),
        ("/", "The API is below https://gw:8000/v1: set base_url to that."),
        ("/v1/images/generations", "Please check the URL for typos."),
        ("/v1/messages/batches", "Please check the URL for typos."),
        ("/v1/chat/completions/chat/completions", "It is served at /v1/chat/completions: set base_url to https://gw:8000/v1."),
        ("/v1/v1/messages/count_tokens", "It is served at /v1/messages/count_tokens: set base_url to https://gw:8000."),
        ("/" + "x/" * 30_000, "Please check the URL for typos."),
    ],
)
def test_a_path_that_does_not_exist_says_how_to_set_the_client_right(path: str, hint: str) -> None:
    error = calls.unknown_url("POST", path, "https", "gw:8000")
    assert (error.status, error.code) == (404, "unknown_url")
    assert error.message.endswith(hint)


@pytest.mark.parametrize("host", ["", 'x"><script>', "h\x1b[2J", "h" * 300, "user:pass@h"])
def test_a_host_that_is_none_is_not_repeated(host: str) -> None:
    assert calls.unknown_url("GET", "/models", "http", host).message.endswith("set base_url to http://HOST/v1.")
