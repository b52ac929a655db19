"""The gateway's HTTP, byte for byte, in front of the scripted SGLang server: shapes, errors, honest endings, people who leave."""

from __future__ import annotations

import email.utils
import json
import re
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import raw
from tests.support.processes import GOLDEN, ROOT, Gateway, Rehearsal, gateway, held_back, rehearsal, until

CHAT = "/v1/chat/completions"


def post(running: Gateway, prompt: str, **more: Any) -> raw.Answer:
    return raw.call(running.port, "POST", CHAT, raw.chat(prompt, **more))


def test_unknown_fields_reach_the_engine_and_come_back_unchanged(wired: Gateway, scripted_sglang: Rehearsal) -> None:
    extra = {"top_k": 4, "regex": "a|b", "separate_reasoning": True, "chat_template_kwargs": {"thinking": False}}
    extra["x_new"] = [1.0, None, {"é": "\u2028"}]
    answer = post(wired, "hello", **extra)
    assert answer.status == 200
    received = json.loads(scripted_sglang.seen()["last_body"])
    assert {name: received[name] for name in extra} == extra
    assert answer.json()["x_unknown"] == {"kept": [1, 2.50, "é"]}
    assert b'2.5,"\\u00e9"' in answer.body, "the engine's own bytes"
    assert answer.json()["id"] == received["rid"]


def test_the_clients_key_and_internal_headers_stay_here(wired: Gateway, scripted_sglang: Rehearsal) -> None:
    internal = ["x-override-rid", "x-override-priority", "x-data-parallel-rank", "x-smg-routing-key", "x-sglext-return-input-ids"]
    headers = {"authorization": "Bearer sk-client", "x-custom-labels": "{}", "cookie": "a=b", **dict.fromkeys(internal, "1")}
    assert raw.call(wired.port, "POST", CHAT, raw.chat("hi"), headers).status == 200
    received = {name.lower() for name in scripted_sglang.seen()["last_headers"]}
    assert received == {"host", "content-type", "content-length", "traceparent"}


def test_a_trace_goes_on_to_the_engine_under_a_parent_of_its_own(wired: Gateway, scripted_sglang: Rehearsal) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    sent = {"traceparent": f"00-{trace}-{parent}-01", "tracestate": "vendor=1"}
    answer = raw.call(wired.port, "POST", CHAT, raw.chat("hi"), sent)
    received = {name.lower(): value for name, value in scripted_sglang.seen()["last_headers"].items()}
    assert answer.headers["x-trace-id"] == trace
    assert received["tracestate"] == "vendor=1"
    assert re.fullmatch(f"00-{trace}-(?!{parent})[0-9a-f]{{16}}-01", received["traceparent"])
    broken = raw.call(wired.port, "POST", CHAT, raw.chat("hi"), {"traceparent": f"00-{trace}-{'0' * 16}-01", "tracestate": "vendor=1"})
    received = {name.lower(): value for name, value in scripted_sglang.seen()["last_headers"].items()}
    assert broken.headers["x-trace-id"] != trace
    assert received["traceparent"].split("-")[1] == broken.headers["x-trace-id"]
    assert "tracestate" not in received


@pytest.mark.parametrize("name", ["plain", "full"])
def test_a_stream_passes_byte_for_byte(wired: Gateway, name: str) -> None:
    recorded = (GOLDEN / f"sglang-0.5.23-chat-stream-{name}.sse").read_bytes()
    for split in (1, 7, 64, 100_000):
        prompt = f"[[golden sglang-0.5.23-chat-stream-{name}]] [[split {split}]]"
        answer = post(wired, prompt, stream=True, stream_options={"include_usage": True})
        assert answer.body == recorded
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert "content-encoding" not in answer.headers


def test_every_answer_has_a_request_id(wired: Gateway) -> None:
    for method, path, status in [
        ("GET", "/v1/models", 200), ("GET", "/livez", 200), ("GET", "/readyz", 200),
        ("GET", "/nope", 404), ("GET", "/", 404), ("GET", "/v1/modelsx", 404), ("GET", "/v1/models/none", 404),
        ("DELETE", CHAT, 405), ("GET", CHAT, 405), ("POST", "/v1/models", 405), ("POST", CHAT, 400),
    ]:  # fmt: skip
        answer = raw.call(wired.port, method, path)
        assert answer.status == status, (method, path)
        assert answer.headers["x-request-id"].startswith("req_")
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-trace-id"])
        assert int(answer.headers["openai-processing-ms"]) >= 0
        assert answer.headers["openai-version"] == "2020-10-01"
        if status >= 400:
            answer.error()
        if status == 405:
            assert answer.headers["allow"] in ("POST", "GET, HEAD")
    sent = raw.call(wired.port, "GET", "/v1/models", headers={"x-request-id": "my-trace.1"})
    assert sent.headers["x-request-id"] == "my-trace.1"
    unsafe = raw.call(wired.port, "GET", "/v1/models", headers={"x-request-id": 'a"b c'})
    assert unsafe.headers["x-request-id"].startswith("req_")


def test_what_is_no_http_gets_an_answer_in_the_same_shape(wired: Gateway) -> None:
    for nonsense in (b"hello\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n", b"GET / HTTP/1.1\r\nx: \x01\x00\r\n\r\n"):
        with raw.connect(wired.port) as peer:
            peer.sendall(nonsense)
            answer = raw.read(peer)
        assert (answer.status, answer.error()["code"]) == (400, "invalid_http")
        assert answer.headers["x-request-id"].startswith("req_")


def test_the_jdks_client_is_answered_though_it_offers_http2_with_every_request(wired: Gateway, scripted_sglang: Rehearsal) -> None:
    """On one connection, bodies of 0, 100 and 200 kB behind the head: none of them is taken for a request."""
    before = scripted_sglang.seen()["requests"]
    ask = ["java", str(ROOT / "tests" / "java" / "Ask.java"), f"{wired.base_url}/chat/completions", json.dumps(raw.chat("hi PADDING")), "3"]
    done = subprocess.run(ask, capture_output=True, text=True, timeout=60, check=False)
    answers = done.stdout.splitlines()
    assert [answer.split(" ", 2)[:2] for answer in answers] == [["HTTP_1_1", "200"]] * 3, done.stderr
    assert [json.loads(answer.split(" ", 2)[2])["object"] for answer in answers] == ["chat.completion"] * 3
    assert scripted_sglang.seen()["requests"] == before + 3
    assert not [line for line in wired.output().splitlines() if "upgrade" in line.lower() or "uvicorn" in line]


def curl(wired: Gateway, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["curl", "-sv", f"{wired.base_url}/chat/completions", "-H", "content-type: application/json", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_curl_may_offer_http2_and_not_insist_on_it(wired: Gateway) -> None:
    body = json.dumps(raw.chat("hi"))
    offered = curl(wired, "--http2", "-d", body)
    assert "Upgrade: h2c" in offered.stderr
    assert json.loads(offered.stdout)["object"] == "chat.completion"
    insisted = curl(wired, "--http2-prior-knowledge", "-d", body)
    assert insisted.returncode
    assert "GOAWAY, error=13" in insisted.stderr, "HTTP_1_1_REQUIRED"
    until("it is logged", lambda: "127.0.0.1 speaks HTTP/2 at once" in wired.output())


@pytest.mark.parametrize("arguments", [["-H", "expect: 100-continue"], ["-H", "transfer-encoding: chunked"], ["--http1.0"]])
def test_curl_may_wait_send_chunks_and_speak_http_1_0(wired: Gateway, arguments: list[str]) -> None:
    done = curl(wired, *arguments, "-d", json.dumps(raw.chat("hi " * 20_000)))
    assert json.loads(done.stdout)["object"] == "chat.completion", done.stderr
    assert ("100 Continue" in done.stderr) == ("expect: 100-continue" in arguments)
    streamed = curl(wired, *arguments, "-d", json.dumps(raw.chat("hi", stream=True)))
    assert streamed.stdout.endswith("data: [DONE]\n\n")
    assert ("< transfer-encoding: chunked" in streamed.stderr) == ("--http1.0" not in arguments)


def test_headers_that_ask_for_another_form_of_an_answer_are_not_heard(wired: Gateway) -> None:
    plain = raw.call(wired.port, "GET", "/v1/models")
    asking = {
        "range": "bytes=0-3", "if-none-match": "*", "if-modified-since": "Wed, 25 Nov 2026 00:00:00 GMT", "accept": "text/html",
        "accept-encoding": "gzip, br, identity;q=0", "accept-charset": "utf-16", "accept-language": "de", "te": "trailers, deflate",
        "prefer": "return=minimal", "cache-control": "only-if-cached", "max-forwards": "0", "pragma": "no-cache",
        "expect": "something-else",
        "keep-alive": "timeout=1000", "proxy-connection": "keep-alive", "cookie": "a=b", "x-http-method-override": "DELETE",
        "via": "1.1 a, 1.0 b", "from": "a@b.example", "referer": "http://elsewhere/", "user-agent": "\xff", "date": "yesterday",
        "content-range": "bytes 0-3/9", "content-language": "de", "content-location": "/nope", "proxy-authorization": "Basic eDp5",
        "trailer": "x-sum", "forwarded": "for=1.2.3.4", "if-range": "x", "if-match": "x", "if-unmodified-since": "x",
    }  # fmt: skip
    answer = raw.call(wired.port, "GET", "/v1/models", headers=asking)
    assert (answer.status, answer.body) == (200, plain.body)
    assert not {"content-encoding", "content-range", "etag", "transfer-encoding", "set-cookie", "server"} & set(answer.headers)


def test_methods_are_those_of_the_route(wired: Gateway) -> None:
    whole, head = (raw.call(wired.port, method, "/v1/models") for method in ("GET", "HEAD"))
    assert head.body == b""
    assert (head.status, head.headers["content-length"]) == (200, str(len(whole.body)))
    for method in ("TRACE", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND", "QUERY"):
        answer = raw.call(wired.port, method, "/v1/models")
        assert (answer.status, answer.error()["code"], answer.headers["allow"]) == (405, "method_not_supported", "GET, HEAD")
    assert raw.call(wired.port, "OPTIONS", "*").error()["code"] == "unknown_url"


def test_every_answer_has_its_date(wired: Gateway) -> None:
    for path, status in (("/v1/models", 200), ("/nope", 404), ("/v1/models HTTP/9.9\r\nx: ", 400)):
        answer = raw.call(wired.port, "GET", path)
        assert answer.status == status
        assert abs(email.utils.parsedate_to_datetime(answer.headers["date"]).timestamp() - time.time()) < 30


def test_websocket_is_refused_with_the_status_that_clients_go_on_from(wired: Gateway) -> None:
    offer = {
        "connection": "Upgrade, close",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    answer = raw.call(wired.port, "GET", "/v1/responses", headers=offer)
    assert (answer.status, answer.error()["code"]) == (426, "upgrade_required")
    elsewhere = raw.call(wired.port, "GET", "/v1/models", headers=offer)
    assert elsewhere.status == 200


def test_two_workers_serve_and_one_that_dies_takes_nobody_with_it(folder: Path, scripted_sglang: Rehearsal) -> None:
    with gateway(folder, {**scripted_sglang.backend(), "listen": {"workers": 2}}) as running:
        running.wait_ready()
        first, second = until("both run", lambda: running.workers() if len(running.workers()) == 2 else [])
        first.kill()
        for _ in range(5):
            until("the other one answers", lambda: post(running, "hi").status == 200)
        until("it is replaced", lambda: len(running.workers()) == 2 and first.pid not in [found.pid for found in running.workers()])
        assert second.is_running()


def test_nothing_of_the_engine_is_proxied_by_default(wired: Gateway) -> None:
    for path in ("/abort_request", "/flush_cache", "/server_info", "/generate", "/v1/loads", "/metrics", "/schema"):
        assert raw.call(wired.port, "POST", path).error()["code"] == "unknown_url"


def test_models_are_listed_and_found_with_a_slash_either_way(wired: Gateway) -> None:
    listed = raw.call(wired.port, "GET", "/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["deepseek-v3", "org/deepseek"]
    for path in ("org%2Fdeepseek", "org/deepseek"):
        model = raw.call(wired.port, "GET", f"/v1/models/{path}").json()
        assert model["id"] == "org/deepseek"
        assert set(model) >= {"id", "created", "object", "owned_by"}
    assert raw.call(wired.port, "GET", "/v1/models/other").error()["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b'{"model":"deepseek-v3"}', 400, "missing_required_parameter"),
        (b'{"model":"other","messages":[{"role":"user","content":"x"}]}', 404, "model_not_found"),
        (b'{"model":"deepseek-v3","messages":[{"role":"user","content":"x"}],"rid":"x"}', 400, "unsupported_parameter"),
        (b'{"model":"deepseek-v3","messages":[{"role":"user","content":"x"}],"n":0}', 400, "invalid_value"),
        (b'{"model":"deepseek-v3","model":"x","messages":[{"role":"user","content":"x"}]}', 400, "invalid_json"),
    ],
)
def test_bad_requests_are_refused_in_openais_shape(wired: Gateway, body: bytes, status: int, code: str) -> None:
    answer = raw.call(wired.port, "POST", CHAT, body)
    assert (answer.status, answer.error()["code"]) == (status, code)


def test_a_body_over_the_limit_is_refused_before_it_is_sent(wired: Gateway) -> None:
    answer = raw.call(wired.port, "POST", CHAT, headers={"content-length": str(64 << 20)})
    assert (answer.status, answer.error()["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "status", "code"),
    [
        ("[[refuse 400]]", 400, "context_length_exceeded"),
        ("[[refuse 422]]", 400, "invalid_value"),
        ("[[refuse 401]]", 502, "engine_error"),
        ("[[refuse 404]]", 502, "engine_error"),
        ("[[refuse 500]]", 502, "engine_error"),
        ("[[refuse 503]]", 503, "engine_overloaded"),
        ("[[die 0]]", 502, "engine_error"),
    ],
)
def test_an_engines_refusal_is_a_true_status(wired: Gateway, prompt: str, status: int, code: str, stream: bool) -> None:
    answer = post(wired, prompt, stream=stream)
    assert (answer.status, answer.error()["code"]) == (status, code)
    assert b"/sgl" not in answer.body
    if status == 503:
        assert 1 <= int(answer.headers["retry-after"]) <= 60


def test_an_error_as_first_event_of_a_200_becomes_its_status(wired: Gateway) -> None:
    answer = post(wired, "[[first-error 503]]", stream=True)
    assert (answer.status, answer.error()["code"]) == (503, "engine_overloaded")
    assert post(wired, "[[first-error 400]]", stream=True).status == 400


@pytest.mark.parametrize("prompt", ["[[garbage]]", "[[endless]]"])
def test_nonsense_from_the_engine_is_a_502_and_costs_little(wired: Gateway, prompt: str) -> None:
    before = wired.workers()[0].memory_info().rss
    assert post(wired, prompt, stream=True).status == 502
    assert wired.workers()[0].memory_info().rss - before < 64 << 20


@pytest.mark.parametrize("prompt", ["[[die 3]]", "[[cut 3]]", "[[false-done 3]]", "[[abort 3]]", "[[mid-error 3]]"])
def test_an_answer_that_breaks_ends_in_one_error_event_and_never_in_done(wired: Gateway, prompt: str) -> None:
    answer = post(wired, prompt, stream=True)
    events = answer.body.split(b"\n\n")
    assert answer.status == 200
    assert len(events) == 5  # three events, the error, and nothing after the last blank line
    assert events[-1] == b""
    error = json.loads(events[3].removeprefix(b"data: "))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"] in error["message"]
    assert b"[DONE]" not in answer.body
    assert b"abort" not in b"".join(events[:3])


def test_a_json_answer_that_was_aborted_is_no_answer(wired: Gateway) -> None:
    answer = post(wired, "[[abort]]")
    assert (answer.status, answer.error()["code"]) == (503, "engine_aborted")


def _read_events(peer: socket.socket, count: int) -> bytes:
    got = b""
    while got.count(b"\n\n") < count:  # the head ends in \r\n\r\n, which is none of these
        part = peer.recv(65536)
        assert part, got
        got += part
    return got


def test_events_are_flushed_one_by_one(wired: Gateway) -> None:
    """The engine is silent after three events: they must be here although nothing follows."""
    with raw.connect(wired.port) as peer:
        peer.sendall(raw.request("POST", CHAT, json.dumps(raw.chat("[[stall 3]]", stream=True)).encode()))
        assert _read_events(peer, 3).count(b"token ") == 2


def test_headers_wait_for_the_first_event(wired: Gateway, scripted_sglang: Rehearsal) -> None:
    """The engine has said 200 long ago; the client has not been told anything before there is something to tell."""
    before = scripted_sglang.seen()["requests"]
    with raw.connect(wired.port) as peer:
        peer.sendall(raw.request("POST", CHAT, json.dumps(raw.chat("[[stall 0]]", stream=True)).encode()))
        until("the engine has the request", lambda: scripted_sglang.seen()["requests"] > before)
        peer.settimeout(0.3)
        with pytest.raises(TimeoutError):
            peer.recv(1)


@pytest.mark.parametrize(
    ("prompt", "more", "events"),
    [
        ("[[stall 2]]", {"stream": True}, 2),
        ("[[stall 0]]", {"stream": True}, 0),
        ("[[stall]]", {}, 0),
        ("[[stall 5]]", {"stream": True, "n": 2}, 5),
    ],
    ids=["mid-stream", "before the first event", "JSON", "two choices"],
)
def test_a_client_that_leaves_stops_the_engine(
    wired: Gateway, scripted_sglang: Rehearsal, prompt: str, more: dict[str, Any], events: int
) -> None:
    before = scripted_sglang.seen()
    with raw.connect(wired.port) as peer:
        peer.sendall(raw.request("POST", CHAT, json.dumps(raw.chat(prompt, **more)).encode()))
        until("the engine has the request", lambda: scripted_sglang.seen()["requests"] > before["requests"])
        _read_events(peer, events)
    rid, ids = json.loads(scripted_sglang.seen()["last_body"])["rid"], scripted_sglang.seen()["last_ids"]
    until("its generation is aborted", lambda: set(ids) <= set(scripted_sglang.seen()["aborted"]), 1.5)
    until("its connection is closed", lambda: scripted_sglang.seen()["open"] <= before["open"])
    until("it is logged as the client's doing", lambda: any(
        line.get("id") == rid and line["outcome"] == "client_gone" for line in wired.requests()
    ))  # fmt: skip


def test_a_client_that_stays_gets_all_of_a_long_answer(wired: Gateway) -> None:
    answer = post(wired, "[[tokens 20000]]", stream=True)
    assert answer.body.count(b'"content":"token ') == 20000
    assert answer.body.endswith(b"data: [DONE]\n\n")


def test_connections_are_used_again(wired: Gateway) -> None:
    with raw.connect(wired.port) as peer:
        for _ in range(3):
            body = json.dumps(raw.chat("hi")).encode()
            peer.sendall(raw.request("POST", CHAT, body, {"connection": "keep-alive"}))
            got = b""
            while b"\r\n\r\n" not in got:
                got += peer.recv(65536)
            head, _, rest = got.partition(b"\r\n\r\n")
            length = int(next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")).split(b":")[1])
            while len(rest) < length:
                rest += peer.recv(65536)
            assert json.loads(rest)["object"] == "chat.completion"


@pytest.mark.slow
def test_silence_has_a_limit_in_every_phase(folder: Path, scripted_sglang: Rehearsal) -> None:
    timeouts = {"first_token_s": 1.0, "between_tokens_s": 1.0, "request_s": 1.2}
    with gateway(folder, {**scripted_sglang.backend(), "timeouts": timeouts}) as running:
        running.wait_ready()
        for prompt, more in (("[[stall 0]]", {"stream": True}), ("[[stall]]", {})):
            answer = post(running, prompt, **more)
            assert (answer.status, answer.error()["code"]) == (504, "engine_timeout")
        answer = post(running, "[[stall 2]]", stream=True)
        assert answer.status == 200
        assert b"engine_timeout" in answer.body
        assert b"[DONE]" not in answer.body
        before = scripted_sglang.seen()["events_sent"]
        with raw.connect(running.port) as peer:
            peer.sendall(raw.request("POST", CHAT, json.dumps(raw.chat("[[tokens 60000]]", stream=True)).encode()))
            held_back(scripted_sglang, before)  # for longer than the engine may be silent: but it is the client who is slow
            assert raw.read(peer).body.endswith(b"data: [DONE]\n\n")
        long = post(running, "[[tokens 5]] [[pace 0.3]]", stream=True)
        assert long.body.endswith(b"data: [DONE]\n\n"), "an answer that keeps coming may take longer than any of the limits"


def test_keys_are_asked_for_everywhere_but_for_the_probes(folder: Path, scripted_sglang: Rehearsal) -> None:
    keys = [{"name": "ours", "hash": "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"}]  # of `foo`
    with gateway(folder, {**scripted_sglang.backend(), "keys": keys}) as running:
        running.wait_ready()
        for headers in ({}, {"authorization": "Bearer bar"}, {"authorization": "Basic foo"}, {"authorization": "foo"}):
            for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/nope")):
                answer = raw.call(running.port, method, path, headers=headers)
                assert (answer.status, answer.error()["code"]) == (401, "invalid_api_key" if headers else "missing_api_key")
        assert raw.call(running.port, "POST", CHAT, raw.chat("hi"), {"authorization": "Bearer foo"}).status == 200
        assert raw.call(running.port, "GET", "/livez").status == 200
        until("the key's name is in the log", lambda: any(line.get("key") == "ours" for line in running.requests()))
        assert "Bearer" not in running.output().split("Or in Python")[1]


def test_a_dead_host_is_not_noticed_while_another_lives(folder: Path, scripted_sglang: Rehearsal) -> None:
    config = scripted_sglang.backend()
    config["backends"]["dsv3"]["hosts"] = [{"url": "http://127.0.0.1:9", "weight": 5}, {"url": scripted_sglang.url, "weight": 1}]
    with gateway(folder, config) as running:
        running.wait_ready()
        assert [post(running, "hi").status for _ in range(12)] == [200] * 12


def test_a_fault_moves_to_the_next_host_before_the_first_event_and_once_each(folder: Path) -> None:
    with rehearsal() as one, rehearsal() as two:
        config = one.backend()
        config["backends"]["dsv3"]["hosts"] = [{"url": one.url}, {"url": two.url}]
        with gateway(folder, config) as running:
            running.wait_ready()
            for prompt, status in (("[[refuse 500]]", 502), ("[[first-error 503]]", 503), ("[[refuse 400]]", 400)):
                before = one.seen()["requests"] + two.seen()["requests"]
                answer = post(running, prompt, stream=True)
                attempts = one.seen()["requests"] + two.seen()["requests"] - before
                assert (answer.status, attempts) == (status, 1 if status == 400 else 2)
                # Where engines were only busy the client may come again: it is told when.
                assert answer.headers.get("x-should-retry") == ("false" if status == 502 else None)
                assert ("retry-after" in answer.headers) == (status == 503)


@pytest.mark.slow
def test_memory_does_not_grow_with_requests(folder: Path, scripted_sglang: Rehearsal) -> None:
    """From request 5,000 to request 20,000 the gateway grows by at most 2 MB."""
    with gateway(folder, {**scripted_sglang.backend(), "log": {"requests": False}}) as running:
        running.wait_ready()
        worker, parent = running.workers()[0], psutil.Process(running.process.pid)
        _load(running.port, 5_000)
        before = worker.memory_info().rss + parent.memory_info().rss
        _load(running.port, 15_000)
        grown = worker.memory_info().rss + parent.memory_info().rss - before
        assert grown <= 2 << 20, f"grown by {grown / (1 << 20):.1f} MB"


def _load(port: int, count: int, connections: int = 8) -> None:
    """So many requests, every other one a stream, over a few connections that are kept open."""
    kinds = [json.dumps(raw.chat("hello [[tokens 4]]", stream=stream)).encode() for stream in (False, True)]
    requests = [raw.request("POST", CHAT, body, {"connection": "keep-alive"}) for body in kinds]
    ends = (b'}]"}}', b"0\r\n\r\n")
    peers = [raw.connect(port) for _ in range(connections)]
    try:
        for number in range(count // connections):
            for peer in peers:
                peer.sendall(requests[number % 2])
            for peer in peers:
                got = b""
                while not got.endswith(ends[number % 2]):
                    part = peer.recv(65536)
                    assert part, got
                    got += part
                assert got.startswith(b"HTTP/1.1 200")
    finally:
        for peer in peers:
            peer.close()
