"""What a client may do to us: slow, endless, huge and malformed requests, readers that stop, pages and proxies nobody asked for."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import raw
from tests.support.processes import Gateway, Rehearsal, gateway, held_back, until

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def strict(scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with little patience, two allowed origins, and a proxy in front of it."""
    settings: dict[str, Any] = {
        **scripted_sglang.backend(),
        "timeouts": {"head_s": 1, "body_s": 1, "client_s": 1},
        "security": {
            "body_limit_mb": 1,
            "cors": {"origins": ["https://app.example", "http://localhost:3000"], "max_age_s": 60},
            "trusted_proxies": ["127.0.0.0/8"],
        },
    }
    with gateway(tmp_path_factory.mktemp("strict"), settings) as running:
        running.wait_ready()
        yield running


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


SLOW = (
    b"POST /v1/chat/comple",
    HEAD,
    HEAD + b"content-length: 100\r\n\r\n",
    HEAD + b'content-length: 100\r\n\r\n{"model":',
    HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\n{    \r\n",
)


def test_a_request_that_does_not_arrive_is_given_up(strict: Gateway) -> None:
    with contextlib.ExitStack() as stack:
        silent, *peers = [stack.enter_context(raw.connect(strict.port)) for _ in (b"", *SLOW)]
        for peer, sent in zip(peers, SLOW, strict=True):
            peer.sendall(sent)
        assert raw.call(strict.port, "POST", CHAT, raw.chat("hi")).status == 200, "others are served meanwhile"
        for peer in peers:
            got = raw.rest(peer)
            assert got.startswith(b"HTTP/1.1 408 "), got[:200]
            assert b'"code":"request_timeout"' in got
            assert b"x-request-id: " in got
        assert raw.rest(silent) == b"", "who said nothing is told nothing"


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (HEAD + b"x: " + b"y" * (70 << 10), b"431", b"request_head_too_large"),
        (b"GET /" + b"y" * (70 << 10), b"431", b"request_head_too_large"),
        (HEAD + b"".join(b"x-%d: y\r\n" % number for number in range(9000)), b"431", b"request_head_too_large"),
        (HEAD + b"content-length: 2000000\r\n\r\n", b"413", b"request_too_large"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"100000\r\n%s\r\n" % (b" " * (1 << 20)) * 2, b"413", b"request_too_large"),
        (HEAD + b"content-length: " + b"9" * 5000 + b"\r\n\r\n", b"400", b"invalid_http"),
        (HEAD + b"content-length: -1\r\n\r\n", b"400", b"invalid_http"),
        (HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n", b"400", b"invalid_http"),
        (HEAD + b"x: \x01\r\n\r\n", b"400", b"invalid_http"),
        (HEAD + b"x\x00y: 1\r\n\r\n", b"400", b"invalid_http"),
    ],
)
def test_a_request_that_is_huge_or_broken_is_answered_and_ended(strict: Gateway, sent: bytes, status: bytes, code: bytes) -> None:
    with raw.connect(strict.port) as peer:
        peer.settimeout(10)
        peer.sendall(sent)
        got = raw.rest(peer)
    assert got.startswith(b"HTTP/1.1 " + status), got[:200]
    assert b'"code":"%s"' % code in got
    assert b"x-request-id: " in got


def test_a_second_request_on_a_connection_has_the_same_time_for_its_head(strict: Gateway) -> None:
    with raw.connect(strict.port) as peer:
        peer.settimeout(10)
        peer.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        assert peer.recv(65536).startswith(b"HTTP/1.1 200")
        peer.sendall(b"GET /livez HT")
        assert b"408 Request Timeout" in raw.rest(peer)


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (b'{"model":"deepseek-v3","messages":[{"role":"user"}],"model":"x"}', "model", "invalid_json"),
        (b'{"model":"deepseek-v3","messages":[{"role":"user"}],"n":' + b"9" * 5000 + b"}", "n", "invalid_value"),
        (b'{"model":"deepseek-v3","messages":[{"role":"user"}],"temperature":NaN}', None, "invalid_json"),
        (b'{"model":"deepseek-v3","messages":[{"role":"user"}],"max_tokens":-1}', "max_tokens", "invalid_value"),
        (b'{"model":"deepseek-v3","messages":[{"role":"user","content":"\xff"}]}', None, "invalid_json"),
        (b'{"model":"deepseek-v3","messages":[{"role":"user","content":"\\ud800"}]}', None, "invalid_json"),
        (b'{"model":"deepseek-v3","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "invalid_json"),
        (
            b'{"model":"deepseek-v3","messages":[{"role":"user"}],"x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
            None,
            "invalid_json",
        ),
        (b'{"model":"deepseek-v3","messages":[{"role":"user"}]} trailing', None, "invalid_json"),
        (b'\xef\xbb\xbf{"model":"deepseek-v3"}', None, "invalid_json"),
    ],
    ids=range(10),
)
def test_hostile_json_is_a_400(wired: Gateway, body: bytes, param: str | None, code: str) -> None:
    answer = raw.call(wired.port, "POST", CHAT, body)
    assert (answer.status, answer.error()["param"], answer.error()["code"]) == (400, param, code)


def test_a_reader_that_stops_is_cut_off_and_its_generation_stopped(strict: Gateway, scripted_sglang: Rehearsal) -> None:
    with raw.connect(strict.port) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        peer.sendall(raw.request("POST", CHAT, json.dumps(raw.chat("[[tokens 900000]]", stream=True)).encode()))
        assert peer.recv(1024).startswith(b"HTTP/1.1 200")
        rid = json.loads(scripted_sglang.seen()["last_body"])["rid"]
        until("its generation is aborted", lambda: rid in scripted_sglang.seen()["aborted"], 30)
    until("it counts as one that left", lambda: any(
        line.get("id") == rid and line["outcome"] == "ClientGone" for line in strict.requests()
    ))  # fmt: skip


def test_a_reader_of_200_megabytes_that_stops_costs_four_at_most(wired: Gateway, scripted_sglang: Rehearsal) -> None:
    worker = wired.workers()[0]
    for _ in range(3):  # what a first long stream makes the allocator keep is not this one's cost
        raw.call(wired.port, "POST", CHAT, raw.chat("[[tokens 5000]]", stream=True))
    before, sent = worker.memory_info().rss, scripted_sglang.seen()["events_sent"]
    with raw.connect(wired.port) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        peer.sendall(raw.request("POST", CHAT, json.dumps(raw.chat("[[tokens 900000]]", stream=True)).encode()))  # 230 bytes each
        assert peer.recv(1024).startswith(b"HTTP/1.1 200")
        assert held_back(scripted_sglang, sent) - sent < 450_000
        assert worker.memory_info().rss - before <= 4 << 20


def test_pages_of_allowed_origins_may_call_and_others_may_not(strict: Gateway, wired: Gateway) -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    preflight = raw.call(strict.port, "OPTIONS", CHAT, headers={"origin": "https://app.example", **asked})
    assert preflight.status == 204
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    assert preflight.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert preflight.headers["access-control-max-age"] == "60"
    assert preflight.headers["x-request-id"]
    stranger = raw.call(strict.port, "OPTIONS", CHAT, headers={"origin": "https://evil.example", **asked})
    assert not [name for name in stranger.headers if name.startswith("access-control")]
    for path, status in (("/v1/models", 200), ("/nope", 404)):
        answer = raw.call(strict.port, "GET", path, headers={"origin": "http://localhost:3000"})
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (status, "http://localhost:3000")
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert answer.headers["vary"] == "origin"
        other = raw.call(strict.port, "GET", path, headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
    closed_door = raw.call(wired.port, "OPTIONS", CHAT, headers={"origin": "https://app.example", **asked})
    assert closed_door.status == 405, "no origins are configured"


def test_a_proxys_word_counts_only_where_it_is_trusted(strict: Gateway, wired: Gateway) -> None:
    forwarded = {"x-forwarded-for": "203.0.113.9, 127.0.0.2", "x-request-id": "behind-a-proxy"}
    for running, client in ((strict, "203.0.113.9"), (wired, "127.0.0.1")):
        raw.call(running.port, "GET", "/v1/models", headers=forwarded)
        found = until("it is logged", lambda running=running: [l for l in running.requests() if l["request_id"] == "behind-a-proxy"])  # type: ignore[misc] # noqa: E741
        assert found[0]["client"] == client


def test_a_path_cannot_break_the_log(wired: Gateway) -> None:
    raw.call(wired.port, "GET", "/v1/%0aX:forged%0d%1b[2J", headers={"x-request-id": "forger"})
    found = until("it is logged", lambda: [line for line in wired.requests() if line["request_id"] == "forger"])
    assert "GET /v1/%0aX:forged%0d%1b[2J 404" in found[0]["message"]
