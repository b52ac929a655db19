"""The endpoints beside chat: the same path through the gateway, each in its own clients' words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.support import raw
from tests.support.processes import Gateway, Rehearsal, gateway, until

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def everything(scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway whose `deepseek-v3` generates, whose `embedder` embeds, and whose `echo` only chats."""
    every = scripted_sglang.backend()
    hosts = [{"url": scripted_sglang.url}]
    every["models"] |= {
        "embedder": {"backend": "vectors"},
        "echo": {"backend": "script"},
        "short": {"backend": "dsv3", "default_max_tokens": 77},
    }
    every["models"]["deepseek-v3"]["aliases"] = ["deepseek:latest"]
    every["backends"] |= {
        "vectors": {
            "kind": "sglang_dsv3",
            "hosts": hosts,
            "endpoints": ["/v1/embeddings", "/v1/rerank"],
            "allow_parameters": ["extra_key"],
        },
        "script": {"kind": "scripted"},
    }
    with gateway(tmp_path_factory.mktemp("everything"), every) as running:
        running.wait_ready()
        yield running


def ask(running: Gateway, path: str, model: str = "deepseek-v3", **fields: Any) -> raw.Answer:
    return raw.call(running.port, "POST", path, {"model": model, **fields})


@pytest.fixture
def client(everything: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=everything.base_url, api_key="none", max_retries=0) as found:
        yield found


def names(body: bytes) -> list[str]:
    return [line[7:] for line in body.decode().splitlines() if line.startswith("event: ")]


def test_embeddings_as_numbers_and_packed(client: openai.OpenAI) -> None:
    packed = client.embeddings.create(model="embedder", input="hi")  # the SDK asks for base64 and unpacks it
    plain = client.embeddings.create(model="embedder", input=["hi"], encoding_format="float")
    for answer in (packed, plain):
        assert answer.data[0].embedding == [0.25, -1.5]
        assert answer.model == "embedder"


@pytest.mark.parametrize(
    ("path", "model", "fields", "part"),
    [
        ("/v1/rerank", "embedder", {"query": "q", "documents": ["a"]}, b'"score": 0.9'),
        ("/v1/score", "deepseek-v3", {"query": "q", "items": ["a"], "label_token_ids": [1, 2]}, b'"scores": [[0.75, 0.25]]'),
        ("/tokenize", "deepseek-v3", {"prompt": "hi"}, b'"tokens": [271, 78]'),
    ],
)
def test_what_a_backend_declares_passes_through(
    everything: Gateway, scripted_sglang: Rehearsal, path: str, model: str, fields: dict[str, Any], part: bytes
) -> None:
    answer = ask(everything, path, model, **fields, x_new=[1.50])
    assert answer.status == 200
    assert part in answer.body
    assert json.loads(scripted_sglang.seen()["last_body"]) == {"model": model, **fields, "x_new": [1.50]}


@pytest.mark.parametrize(
    ("path", "model", "fields", "words"),
    [
        ("/v1/embeddings", "deepseek-v3", {"input": "x"}, "it is served for: embedder"),
        ("/v1/chat/completions", "embedder", {"messages": USER}, "it is served for: deepseek-v3, deepseek:latest, echo, short"),
        ("/v1/responses", "echo", {"input": "x"}, "it is served for: deepseek-v3, deepseek:latest, short"),
    ],
)
def test_what_a_backend_does_not_declare_is_a_404_that_says_who_would(
    everything: Gateway, path: str, model: str, fields: dict[str, Any], words: str
) -> None:
    answer = ask(everything, path, model, **fields)
    assert (answer.status, answer.error()["code"]) == (404, "unknown_url")
    assert words in answer.error()["message"]


def test_a_parameter_that_the_operator_allows_is_passed_on(everything: Gateway, scripted_sglang: Rehearsal) -> None:
    assert ask(everything, "/v1/embeddings", "embedder", input="x", extra_key="k").status == 200
    assert json.loads(scripted_sglang.seen()["last_body"])["extra_key"] == "k"
    assert ask(everything, "/v1/chat/completions", messages=USER, extra_key="k").error()["param"] == "extra_key"


def test_a_clients_priority_is_neither_refused_nor_passed_on(everything: Gateway, scripted_sglang: Rehearsal) -> None:
    assert ask(everything, "/v1/chat/completions", messages=USER, priority=9).status == 200
    assert "priority" not in json.loads(scripted_sglang.seen()["last_body"])


@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [
        ("/v1/chat/completions", {"messages": USER}, "max_completion_tokens"),
        ("/v1/completions", {"prompt": "x"}, "max_tokens"),
        ("/v1/responses", {"input": "x"}, "max_output_tokens"),
    ],
)
def test_a_model_bounds_answers_whose_request_does_not(
    everything: Gateway, scripted_sglang: Rehearsal, path: str, fields: dict[str, Any], name: str
) -> None:
    assert ask(everything, path, "short", **fields).status == 200
    assert json.loads(scripted_sglang.seen()["last_body"])[name] == 77
    assert ask(everything, path, "short", **fields, **{name: 5}).status == 200
    assert json.loads(scripted_sglang.seen()["last_body"])[name] == 5


def test_responses_come_under_the_clients_model_name_and_our_id(client: openai.OpenAI, scripted_sglang: Rehearsal) -> None:
    answer = client.responses.create(model="deepseek-v3", input="hi")
    sent = json.loads(scripted_sglang.seen()["last_body"])
    assert sent["model"] == "rehearsed", "the engine takes no other name"
    assert (answer.model, answer.id, answer.status) == ("deepseek-v3", sent["request_id"], "completed")
    assert answer.output_text.startswith("token 0 ")


def test_a_stream_of_responses_passes_with_its_names(client: openai.OpenAI, everything: Gateway) -> None:
    events: list[Any] = list(client.responses.create(model="deepseek-v3", input="hi", stream=True))
    assert [event.type for event in events][:2] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    assert events[-1].response.model == "deepseek-v3"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta").startswith("token 0 token 1 ")
    line = until("it is logged", lambda: [line for line in everything.requests() if line.get("id") == events[-1].response.id])[0]
    assert (line["prompt_tokens"], line["completion_tokens"], line["stream"]) == (12, 8, True)


def test_messages_pass_as_json_and_as_a_stream(everything: Gateway) -> None:
    answer = ask(everything, MESSAGES, messages=USER, max_tokens=5)
    assert answer.json()["content"][0]["text"].startswith("token 0 ")
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    stream = ask(everything, MESSAGES, messages=USER, max_tokens=5, stream=True)
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert names(stream.body)[:2] == ["message_start", "content_block_start"]
    assert names(stream.body)[-1] == "message_stop"
    line = until("it is logged", lambda: [line for line in everything.requests() if line["request_id"] == stream.headers["x-request-id"]])[
        0
    ]
    assert (line["prompt_tokens"], line["completion_tokens"]) == (12, 5)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("prompt", "status", "kind"), [("[[refuse 503]]", 503, "overloaded_error"), ("[[refuse 500]]", 502, "api_error")])
def test_messages_errors_are_in_anthropics_shape(everything: Gateway, prompt: str, status: int, kind: str, stream: bool) -> None:
    answer = ask(everything, MESSAGES, messages=[{"role": "user", "content": prompt}], max_tokens=5, stream=stream)
    assert answer.status == status
    found = answer.json()
    assert (found["type"], found["error"]["type"], found["request_id"]) == ("error", kind, answer.headers["x-request-id"])
    assert set(found["error"]) == {"type", "message"}


def test_what_the_gateway_itself_refuses_is_in_the_endpoints_shape_too(everything: Gateway) -> None:
    missing = ask(everything, MESSAGES, messages=USER)
    assert (missing.status, missing.json()["error"]["type"]) == (400, "invalid_request_error")
    assert "'max_tokens'" in missing.json()["error"]["message"]
    unknown = ask(everything, MESSAGES, "nope", messages=USER, max_tokens=5)
    assert (unknown.status, unknown.json()["error"]["type"]) == (404, "not_found_error")
    assert raw.call(everything.port, "GET", MESSAGES).json()["type"] == "error"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (RESPONSES, {"input": "[[first-error 503]]"}),
        (RESPONSES, {"input": "[[abort 2]]"}),
        (MESSAGES, {"messages": [{"role": "user", "content": "[[abort 1]]"}], "max_tokens": 5}),
    ],
)
def test_a_failure_before_the_first_word_is_a_status(everything: Gateway, path: str, fields: dict[str, Any]) -> None:
    answer = ask(everything, path, **fields, stream=True)
    assert answer.status == 503
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("fault", ["die", "cut", "abort"])
def test_a_named_stream_that_breaks_ends_in_its_own_kind_of_error(everything: Gateway, client: openai.OpenAI, fault: str) -> None:
    answer = ask(everything, RESPONSES, input=f"[[{fault} 4]]", stream=True)
    assert answer.status == 200
    assert names(answer.body)[-1] == "error"
    assert names(answer.body)[:-1] == [*names(answer.body)[:2], "response.output_item.added", "response.content_part.added"]
    last = json.loads(answer.body.rstrip().rsplit(b"data: ", 1)[1])
    assert (last["type"], last["sequence_number"]) == ("error", 4)
    with pytest.raises(openai.APIError):
        list(client.responses.create(model="deepseek-v3", input=f"[[{fault} 4]]", stream=True))
    messages = ask(everything, MESSAGES, messages=[{"role": "user", "content": f"[[{fault} 4]]"}], max_tokens=5, stream=True)
    assert names(messages.body)[-1] == "error"
    assert json.loads(messages.body.rstrip().rsplit(b"data: ", 1)[1])["type"] == "error"
    assert b"message_stop" not in messages.body


def test_a_response_that_failed_is_no_answer(everything: Gateway) -> None:
    answer = ask(everything, RESPONSES, input="[[abort]]")
    assert (answer.status, answer.error()["code"]) == (503, "engine_overloaded")


def test_a_client_that_leaves_a_stream_of_responses_stops_the_engine(everything: Gateway, scripted_sglang: Rehearsal) -> None:
    with raw.connect(everything.port) as peer:
        body = {"model": "deepseek-v3", "input": "[[stall 4]]", "stream": True}
        peer.sendall(raw.request("POST", RESPONSES, json.dumps(body).encode()))
        got = b""
        while got.count(b"event: ") < 4:
            got += peer.recv(65536)
        rid = json.loads(scripted_sglang.seen()["last_body"])["request_id"]
    until("its generation is aborted", lambda: rid in scripted_sglang.seen()["aborted"], 1.5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_name_with_a_colon_is_exchanged_on_both_ways(everything: Gateway, scripted_sglang: Rehearsal, stream: bool) -> None:
    """To SGLang a colon means a LoRA adapter."""
    answer = ask(everything, "/v1/chat/completions", "deepseek:latest", messages=USER, stream=stream)
    assert json.loads(scripted_sglang.seen()["last_body"])["model"] == "rehearsed"
    assert b"rehearsed" not in answer.body
    models = [json.loads(line[6:])["model"] for line in answer.body.decode().splitlines() if line.startswith("data: {")]
    assert set(models or [answer.json()["model"]]) == {"deepseek:latest"}


def test_anthropics_sdks_send_their_key_elsewhere(tmp_path_factory: pytest.TempPathFactory, scripted_sglang: Rehearsal) -> None:
    keys = [{"name": "ours", "hash": "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"}]  # of `foo`
    with gateway(tmp_path_factory.mktemp("keys"), {**scripted_sglang.backend(), "keys": keys}) as running:
        running.wait_ready()
        body = {"model": "deepseek-v3", "messages": USER, "max_tokens": 5}
        assert raw.call(running.port, "POST", MESSAGES, body, {"x-api-key": "foo"}).status == 200
        refused = raw.call(running.port, "POST", MESSAGES, body, {"x-api-key": "bar"})
        assert (refused.status, refused.json()["error"]["type"]) == (401, "authentication_error")
        assert raw.call(running.port, "POST", "/v1/chat/completions", body, {"x-api-key": "foo"}).status == 200, "on whatever path"
        assert raw.call(running.port, "GET", "/v1/models", headers={"x-api-key": "foo", "anthropic-version": "2023-06-01"}).status == 200
