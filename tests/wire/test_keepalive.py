"""`timeouts.keepalive_s`: comments while an engine is silent before its first event, what the SDKs make of them, and what they cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.support import raw
from tests.support.processes import Gateway, Rehearsal, gateway, rehearsal, until

COMMENT = b": waiting for the engine\n\n"
# SHA-256 of `foo`.
KEYS = [{"name": "ours", "hash": "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae", "rpm": 1000}]
PATHS = ["/v1/chat/completions", "/v1/responses", "/v1/messages"]


def body(path: str, prompt: str) -> dict[str, Any]:
    said = {"input": prompt} if path == "/v1/responses" else {"messages": [{"role": "user", "content": prompt}]}
    return {"model": "deepseek-v3", "stream": True, **said, **({"max_tokens": 9} if path == "/v1/messages" else {})}


@pytest.fixture(scope="module")
def patient(scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that keeps streams alive, and gives an engine two seconds to begin."""
    settings = {**scripted_sglang.backend(), "keys": KEYS, "timeouts": {"keepalive_s": 0.1, "first_token_s": 2}}
    with gateway(tmp_path_factory.mktemp("patient"), settings) as running:
        running.wait_ready()
        yield running


def stream(running: Gateway, path: str, prompt: str) -> raw.Answer:
    return raw.call(running.port, "POST", path, body(path, prompt), {"x-api-key": "foo"})


@pytest.mark.parametrize("path", PATHS)
def test_comments_come_while_the_engine_is_silent_and_the_answer_after_them(patient: Gateway, path: str) -> None:
    answer = stream(patient, path, "[[late 1]] [[tokens 2]]")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert int(answer.headers["x-ratelimit-remaining-requests"]) < 1000, "headers come with the first comment, and are whole"
    waiting, rest = answer.body.rsplit(COMMENT, 1)
    assert waiting == COMMENT * waiting.count(COMMENT), "nothing but comments, and none later"
    assert waiting.count(COMMENT) >= 2
    assert b"token 1 " in rest


def test_an_engine_that_answers_at_once_is_not_commented(patient: Gateway) -> None:
    for path in PATHS:
        assert stream(patient, path, "hi").body.count(b"\n: ") == 0


def test_the_sdks_take_no_notice(patient: Gateway) -> None:
    with openai.OpenAI(base_url=patient.base_url, api_key="foo", max_retries=0) as client:
        chunks = list(
            client.chat.completions.create(model="deepseek-v3", messages=[{"role": "user", "content": "[[late 1]] sdk"}], stream=True)
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).startswith("token 0 token 1 ")
        events = list(client.responses.create(model="deepseek-v3", input="[[late 1]] sdk", stream=True))
        assert [event.type for event in events][:2] == ["response.created", "response.in_progress"]
        assert events[-1].type == "response.completed"
    with (
        anthropic.Anthropic(base_url=patient.root, api_key="foo", max_retries=0) as claude,
        claude.messages.stream(model="deepseek-v3", messages=[{"role": "user", "content": "[[late 1]] sdk"}], max_tokens=9) as said,
    ):
        assert "".join(said.text_stream).startswith("token 0 token 1 ")


@pytest.mark.parametrize("path", PATHS)
def test_what_goes_wrong_after_the_first_comment_is_an_event_in_the_endpoints_words(patient: Gateway, path: str) -> None:
    """The 200 is out: a status it can be no more, and no SDK tries again by itself."""
    answer = stream(patient, path, "[[stall 0]]")
    assert answer.status == 200
    assert answer.body.startswith(COMMENT)
    assert b"[DONE]" not in answer.body
    last = answer.body.rsplit(COMMENT, 1)[1]
    told = json.loads(last.rstrip().rsplit(b"data: ", 1)[1])
    assert told["error"]["message"].startswith("The engine did not send its first token within 2 s.")
    assert last.startswith(b"data: " if path == "/v1/chat/completions" else b"event: error\n")
    assert (told["error"]["type"] == "timeout_error") is (path == "/v1/messages")


def test_the_sdks_raise_it_once(patient: Gateway, scripted_sglang: Rehearsal) -> None:
    silent: list[Any] = [{"role": "user", "content": "[[stall 0]] once"}]
    with (
        openai.OpenAI(base_url=patient.base_url, api_key="foo", max_retries=2) as client,
        pytest.raises(openai.APIError, match="first token"),
    ):
        list(client.chat.completions.create(model="deepseek-v3", messages=silent, stream=True))
    with (
        anthropic.Anthropic(base_url=patient.root, api_key="foo", max_retries=2) as claude,
        pytest.raises(anthropic.APIStatusError, match="first token"),
        claude.messages.stream(model="deepseek-v3", messages=silent, max_tokens=9) as said,
    ):
        list(said)
    assert scripted_sglang.seen()["asked"]["[[stall 0]] once"] == 2, "one request each, though they may retry"


def test_a_refusal_that_comes_in_time_is_still_a_status(patient: Gateway) -> None:
    assert stream(patient, PATHS[0], "[[refuse 400]]").status == 400
    assert stream(patient, PATHS[2], "[[refuse 503]]").status == 503


def test_another_host_is_tried_behind_the_comments(folder: Any) -> None:
    """What is committed is the status, not the host."""
    with rehearsal() as silent, rehearsal() as well:
        hosts = [{"url": silent.url}, {"url": well.url, "priority": 1}]
        config = {"models": {"deepseek-v3": {"backend": "d"}}, "backends": {"d": {"kind": "sglang_dsv3", "hosts": hosts}}}
        silent.behave(hung=True)
        with gateway(folder, {**config, "timeouts": {"keepalive_s": 0.1, "first_token_s": 1}}) as running:
            running.wait_all_hosts()
            answer = raw.call(running.port, "POST", PATHS[0], body(PATHS[0], "hi"))
            assert answer.status == 200
            assert answer.body.count(COMMENT) >= 2
            assert answer.body.endswith(b"data: [DONE]\n\n")
            assert b"token 7 " in answer.body
            assert (silent.seen()["requests"], well.seen()["requests"]) == (1, 1)


def test_a_client_that_leaves_among_the_comments_stops_the_engine(patient: Gateway, scripted_sglang: Rehearsal) -> None:
    with raw.connect(patient.port) as peer:
        content = json.dumps(body(PATHS[0], "[[stall 0]] leaving")).encode()
        peer.sendall(raw.request("POST", PATHS[0], content, {"x-api-key": "foo"}))
        got = b""
        while got.count(COMMENT) < 2:
            got += peer.recv(65536)
        id = json.loads(scripted_sglang.seen()["last_body"])["rid"]
    until("its generation is aborted", lambda: id in scripted_sglang.seen()["aborted"], 1.5)
