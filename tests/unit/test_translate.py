"""SGLang's words: what is edited on the way in, what its errors become on the way out, and when a stream is really finished."""

from __future__ import annotations

import json
from typing import Any

import pytest

from backends.sglang_dsv3 import answer, failures, stream, translate
from backends.sglang_dsv3.continuation import exact, resume
from backends.sglang_dsv3.shapes import Parsers
from gateway.errors import InvalidRequest
from gateway.plugin import AttemptFailed, Call, Endpoint, Reply, Terms, Usage, Verdict
from gateway.serving import calls
from tests.support.processes import GOLDEN


def call(**fields: Any) -> Call:
    return calls.parse(Endpoint.CHAT, json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}).encode())


def test_the_engine_gets_the_clients_fields_and_our_rid() -> None:
    sent = call(top_k=3, regex="a+", chat_template_kwargs={"thinking": True}, never_heard_of={"a": [1, None]})
    assert json.loads(translate.engine_body(sent, Terms())) == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "top_k": 3,
        "regex": "a+",
        "chat_template_kwargs": {"thinking": True},
        "never_heard_of": {"a": [1, None]},
        "rid": sent.id,
    }


def test_usage_is_always_asked_of_a_stream_and_other_options_stay() -> None:
    body = json.loads(
        translate.engine_body(call(stream=True, stream_options={"include_usage": False, "continuous_usage_stats": True, "x": 1}), Terms())
    )
    assert body["stream_options"] == {"include_usage": True, "x": 1}
    assert "stream_options" not in json.loads(translate.engine_body(call(stream_options={"include_usage": True}), Terms()))


def test_nulls_are_left_out() -> None:
    body = json.loads(translate.engine_body(call(n=None, logprobs=None, presence_penalty=None, stop=None, unknown=None), Terms()))
    assert set(body) == {"model", "messages", "rid"}


@pytest.mark.parametrize("name", ["rid", "bootstrap_host", "input_ids", "custom_logit_processor", "lora_path"])
def test_fields_that_steer_the_engines_inside_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        translate.refuse_internal(call(**{name: "x"}))
    assert (refused.value.param, refused.value.code) == (name, "unsupported_parameter")


BOUNDED: list[tuple[Endpoint, dict[str, Any], str]] = [
    (Endpoint.CHAT, {"messages": [{"role": "user", "content": "hi"}]}, "max_completion_tokens"),
    (Endpoint.COMPLETIONS, {"prompt": "hi"}, "max_tokens"),
    (Endpoint.RESPONSES, {"input": "hi"}, "max_output_tokens"),
]


@pytest.mark.parametrize(("endpoint", "fields", "name"), BOUNDED)
def test_the_cores_bound_is_written_where_the_client_names_none(endpoint: Endpoint, fields: dict[str, Any], name: str) -> None:
    def sent(**more: Any) -> dict[str, Any]:
        asked = calls.parse(endpoint, json.dumps({"model": "m", **fields, **more}).encode())
        found: dict[str, Any] = json.loads(translate.engine_body(asked, Terms(bound=7)))
        return found

    assert sent()[name] == 7
    assert sent(**{name: 5})[name] == 5
    if endpoint is Endpoint.CHAT:
        assert sent(max_tokens=5).get(name) is None, "the client's own is left as it is"
    assert name not in json.loads(translate.engine_body(calls.parse(endpoint, json.dumps({"model": "m", **fields}).encode()), Terms()))


def test_what_bounds_nothing_is_bounded_by_nobody() -> None:
    texts = calls.parse(Endpoint.EMBEDDINGS, b'{"model":"m","input":"hi"}')
    assert "max_tokens" not in json.loads(translate.engine_body(texts, Terms(bound=7)))


def test_what_continues_an_answer_is_bounded_by_what_is_left() -> None:
    delivered = b"".join(b'data: {"created":5,"choices":[{"index":0,"delta":{"content":"w "},"finish_reason":null}]}\n\n' for _ in range(3))
    for fields, terms in (({}, Terms(bound=10)), ({"max_tokens": 10}, Terms()), ({"max_completion_tokens": 10}, Terms(bound=10))):
        again = resume.resume(call(stream=True, **fields), terms, delivered, Usage(4, 3), Parsers())
        assert isinstance(again, Call)
        body = json.loads(translate.engine_body(again, terms))
        assert [body[name] for name in ("max_tokens", "max_completion_tokens") if name in body] == [7]
        assert body["messages"][-1] == {"role": "assistant", "content": "w w w "}
        ended = resume.resume(call(stream=True, **fields), terms, delivered, Usage(4, 10), Parsers())
        assert isinstance(ended, Reply), "the bound is reached"


@pytest.mark.parametrize("content", ['[{"type":"text"}]', "5"])
def test_what_was_delivered_in_a_shape_nobody_knows_is_not_continued(content: str) -> None:
    delivered = b'data: {"choices":[{"index":0,"delta":{"content":%s}}]}\n\n' % content.encode()
    assert resume.resume(call(stream=True), Terms(), delivered, None, Parsers()) is None


def test_false_for_what_is_internal_asks_for_nothing() -> None:
    translate.refuse_internal(call(return_hidden_states=False, rid=None))
    with pytest.raises(InvalidRequest):
        translate.refuse_internal(call(return_hidden_states=True))


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        ({"temperature": 0, "logit_bias": {"5": 1}, "stop_token_ids": [1], "ignore_eos": True, "stop": ["a"]}, True),
        ({"temperature": 0.7, "top_p": 0.9}, True),
        ({"temperature": "0"}, False),
        ({"temperature": 0, "top_p": "1"}, False),
        ({"temperature": 0, "logit_bias": {"5": "1"}}, False),
    ],
)
def test_numbers_in_quotes_do_not_go_where_nobody_reads_them_as_numbers(fields: dict[str, Any], taken: bool) -> None:
    assert exact.takes(call(stream=True, max_tokens=5, **fields), Terms(), Parsers()) == taken


OVER = "context_length_exceeded"


def flat(message: str) -> bytes:
    return json.dumps({"object": "error", "message": message, "type": "BadRequestError", "param": None, "code": 400}).encode()


@pytest.mark.parametrize(
    ("status", "body", "becomes", "code", "verdict"),
    [
        (400, flat("The input (9 tokens) is longer than the model's context length (4 tokens)."), 400, OVER, Verdict.CLIENT_FAULT),
        (400, flat("Requested token count exceeds the model's maximum context length of 4 tokens."), 400, OVER, Verdict.CLIENT_FAULT),
        (400, flat("max_completion_tokens is too large: 9."), 400, "invalid_value", Verdict.CLIENT_FAULT),
        (401, b'{"error":"Unauthorized"}', 502, "engine_error", Verdict.SICK),
        (404, b'{"detail":"Not Found"}', 502, "engine_error", Verdict.SICK),
        (503, flat("The request queue is full."), 503, "engine_overloaded", Verdict.BUSY),
        (429, b"", 503, "engine_overloaded", Verdict.BUSY),
        (500, flat("Internal server error: /sgl/x.py"), 502, "engine_error", Verdict.SICK),
        (500, b"<html>", 502, "engine_error", Verdict.SICK),
    ],
)  # fmt: skip
def test_an_engines_error_becomes_ours(status: int, body: bytes, becomes: int, code: str, verdict: Verdict) -> None:
    failure = failures.failure(status, body, call())
    assert (failure.error.status, failure.error.code, failure.verdict) == (becomes, code, verdict)
    assert "/sgl" not in failure.error.message
    if code == "context_length_exceeded":
        assert code in failure.error.message


def test_the_engines_own_words_reach_the_client_and_nothing_around_them() -> None:
    for shape in (flat("bad seed"), b'{"error":{"message":"bad seed"}}', b'{"error":"bad seed"}', b'{"detail":"bad seed"}', b"bad seed"):
        assert failures.failure(400, shape, call()).error.message == "bad seed"


def test_a_validation_dump_is_shortened_to_place_and_reason() -> None:
    dump = "2 validation errors for ChatCompletionRequest\nmessages.0.role\n  Input should be 'user' [type=literal_error]\n"
    error = failures.failure(400, flat(dump), call()).error
    assert error.param == "messages[0].role"
    assert error.message == "Invalid value for 'messages[0].role': Input should be 'user'."


def test_paths_in_a_message_are_not_passed_on() -> None:
    assert "/usr" not in failures.failure(400, flat("bad thing in /usr/lib/python3/x.py"), call()).error.message


def run(recorded: bytes, size: int, **fields: Any) -> tuple[bytes, stream.EventStream, AttemptFailed | None]:
    """What a client would get of `recorded`, arriving in pieces of `size` bytes."""
    source, got = stream.Chunks(call(stream=True, **fields), Terms()), b""
    for at in range(0, len(recorded), size):
        got += source.feed(recorded[at : at + size])
        if source.complete or source.failure is not None:
            return got, source, source.failure
    return got + source.end(), source, source.failure


def test_done_counts_only_when_every_choice_has_finished() -> None:
    recorded = (GOLDEN / "sglang-0.5.23-chat-stream-plain.sse").read_bytes()
    _, _, failure = run(recorded, 100, n=2)
    assert failure is not None
    assert failure.cause == "cut"


def test_an_end_after_the_last_finish_lacks_only_its_closing_line() -> None:
    recorded = (GOLDEN / "sglang-0.5.23-chat-stream-plain.sse").read_bytes()
    got, _, failure = run(recorded.replace(b"data: [DONE]\n\n", b""), 100)
    assert failure is None
    assert got.endswith(b"data: [DONE]\n\n")


def test_words_that_look_like_a_finish_inside_the_text_do_not_count() -> None:
    text = json.dumps('"finish_reason":"stop" data: {"error": 1} "choices":[] "usage":{')
    event = b'data: {"id":"1","choices":[{"index":0,"delta":{"content":%s},"finish_reason":null}]}\n\n' % text.encode()
    got, _, failure = run(event + b"data: [DONE]\n\n", 1000)
    assert got == event
    assert failure is not None
    assert failure.cause == "cut"


def test_several_choices_come_under_our_id() -> None:
    events = b"".join(
        b'data: {"id":"%032d","choices":[{"index":%d,"delta":{},"finish_reason":"stop"}]}\n\n' % (index, index) for index in range(2)
    )
    got, source, failure = run(events + b"data: [DONE]\n\n", 50, n=2)
    assert failure is None
    assert source.ids == {f"{index:032d}" for index in range(2)}
    assert {json.loads(line[6:])["id"] for line in got.decode().splitlines() if line.startswith("data: {")} == {source._call.id}


@pytest.mark.parametrize("version", ["default", "step 7", 'a "quoted" ] one\\', "é"])
def test_which_weights_answered_is_a_text_as_openais_metadata_are(version: str) -> None:
    """Recorded of SGLang 0.5.23; clients that look at types warn of an array there, or refuse the answer."""
    versions = [{"version": version, "start": 0, "end": 3}, {"version": "next", "start": 3, "end": 9}]
    said = '"metadata":{"weight_version":"x","weight_versions":[]}'
    message = {"role": "assistant", "content": said}
    whole = {
        "id": "x", "object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "metadata": {"weight_version": version, "weight_versions": versions},
    }  # fmt: skip
    for ascii in (True, False):
        content = json.dumps(whole, separators=(",", ":"), ensure_ascii=ascii).encode()
        got = json.loads(answer.whole(content, call())[0])
        metadata = got.pop("metadata")
        assert metadata["weight_version"] == version
        assert json.loads(metadata["weight_versions"]) == versions
        assert got["choices"][0]["message"]["content"] == said
    other = json.dumps({**whole, "metadata": {"weight_versions": versions}}).encode()
    assert answer.whole(other, call())[0] == other, "a shape nobody knows stays as it is"
