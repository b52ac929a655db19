"""What a client may do to us: slow, endless, huge and malformed requests, readers that stop, pages and proxies nobody asked for."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
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


FOO = "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"


@pytest.fixture(scope="module")
def keyed(scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that asks for a key, which is `foo`."""
    settings = {**scripted_sglang.backend(), "keys": [{"name": "ours", "hash": FOO}]}
    with gateway(tmp_path_factory.mktemp("keyed"), settings) as running:
        running.wait_ready()
        yield running


def flood(peer: socket.socket, piece: bytes, most: int) -> tuple[int, bytes]:
    """Send it over and over until the other side closes or `most` bytes have left; how many did, and what came back."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < most:
            peer.sendall(piece)
            sent += len(piece)
    return sent, raw.rest(peer)


@pytest.mark.parametrize("key", ["", "authorization: Bearer foo\r\n"], ids=["without a key", "with a key"])
@pytest.mark.parametrize(
    ("begun", "endless"),
    [
        (b"0\r\n", b"x: " + b"y" * 65_000 + b"\r\n"),
        (b"0\r\nx: ", b"y" * 65_000),
        (b"1;a=", b"y" * 65_000),
        (b"", b"1;a=" + b"y" * 65_000 + b"\r\nz\r\n"),
    ],
    ids=["trailers", "one trailer", "one chunk extension", "chunk extensions"],
)
def test_a_hundred_megabytes_around_a_body_take_no_memory(keyed: Gateway, key: str, begun: bytes, endless: bytes) -> None:
    worker = keyed.workers()[0]
    raw.call(keyed.port, "POST", CHAT, raw.chat("hi"), {"authorization": "Bearer foo"})
    before = worker.memory_info().rss
    with raw.connect(keyed.port) as peer:
        peer.sendall(HEAD + key.encode() + b"transfer-encoding: chunked\r\n\r\n" + begun)
        sent, got = flood(peer, endless, 100 << 20)
        assert worker.memory_info().rss - before <= 8 << 20
    assert sent < 100 << 20
    assert not got or got.startswith((b"HTTP/1.1 401 ", b"HTTP/1.1 413 "))


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        (CHAT, "transfer-encoding: chunked\r\n", b"401"),
        (CHAT, "content-length: 30000000\r\n", b"401"),
        ("/nope", "authorization: Bearer foo\r\ntransfer-encoding: chunked\r\n", b"404"),
        (CHAT, "authorization: Bearer foo\r\ncontent-length: 60000000\r\n", b"413"),
    ],
)
def test_a_request_that_was_refused_is_not_read_on(keyed: Gateway, path: str, headers: str, status: bytes) -> None:
    before = keyed.workers()[0].num_fds()
    with raw.connect(keyed.port) as peer:
        peer.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\n{headers}\r\n".encode())
        got = raw.rest(peer)
        assert got.startswith(b"HTTP/1.1 " + status), got
        assert b"\r\nconnection: close\r\n" in got
        until("it is closed though the client stays", lambda: keyed.workers()[0].num_fds() <= before, 15)


PIECES = (
    b"GET /v1/models HTTP/1.1\r\n", b"POST /v1/chat/completions HTTP/1.1\r\n", b"POST /v1/messages HTTP/1.0\r\n",
    b"OPTIONS * HTTP/1.1\r\n",
    b"CONNECT x:1 HTTP/1.1\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"host: x\r\n", b"authorization: Bearer foo\r\n",
    b"connection: close\r\n",
    b"connection: upgrade\r\nupgrade: h2c\r\n", b"content-type: application/json\r\n", b"content-length: 3\r\n", b"content-length: 90\r\n",
    b"transfer-encoding: chunked\r\n", b"expect: 100-continue\r\n", b"x: y\r\n", b"\r\n", b"\n", b"\0", b"3\r\nabc\r\n", b"5;x=y\r\n",
    b"0\r\n\r\n",
    b"x" * 5000, b"{}\n", b'{"model":"deepseek-v3","messages":[{"role":"user","content":"hi"}],"max_tokens":1}       ',
    b"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer foo\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer foo\r\ncontent-type: application/json\r\n",
)  # fmt: skip
# PENSTOCK_FUZZ=100000 tries that many.
STRANGERS = int(os.environ.get("PENSTOCK_FUZZ", "1500"))


def test_whatever_strangers_send_is_answered_and_leaves_nothing(keyed: Gateway) -> None:
    chance = random.Random(13)
    worker = keyed.workers()[0]

    def send() -> set[bytes]:
        pieces = [chance.choice(PIECES) if chance.random() < 0.9 else chance.randbytes(20) for _ in range(chance.randrange(1, 20))]
        with raw.connect(keyed.port) as peer, contextlib.suppress(ConnectionError):
            peer.sendall(b"".join(pieces))
            if chance.random() < 0.9:  # others leave at once
                got = b""
                peer.settimeout(0.02)
                with contextlib.suppress(TimeoutError):
                    while part := peer.recv(65536):
                        got += part
                return set(re.findall(rb"HTTP/1\.1 (\d{3}) ", got))
        return set()

    for _ in range(100):
        send()
    before = worker.memory_info().rss
    statuses = set().union(*(send() for _ in range(STRANGERS)))
    assert (
        {b"200", b"400", b"401"}
        <= statuses
        <= {b"100", b"200", b"400", b"401", b"404", b"405", b"408", b"413", b"415", b"431", b"501", b"505"}
    )
    until("every connection is gone", lambda: len(worker.net_connections("tcp")) <= 4)  # the listener and the engine's
    until("nothing is being answered", lambda: keyed.admin("/admin/workers").json()["workers"][0]["open"] == 0)
    assert worker.memory_info().rss - before <= 8 << 20
    assert "Traceback" not in keyed.output()
    assert "unforeseen" not in keyed.output()


def test_a_client_in_the_middle_of_its_upload_sees_the_refusal(keyed: Gateway) -> None:
    with raw.connect(keyed.port) as peer:
        peer.sendall(HEAD + b"content-length: 20000000\r\n\r\n")
        for _ in range(200):
            peer.sendall(b" " * 100_000)
        assert raw.rest(peer).startswith(b"HTTP/1.1 401 ")


def test_what_strangers_send_is_logged_by_us_in_few_lines(wired: Gateway) -> None:
    for _ in range(60):
        with raw.connect(wired.port) as peer:
            peer.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
            assert raw.rest(peer).startswith(b"HTTP/1.1 400 ")
    lines = [json.loads(line) for line in wired.output().splitlines() if line.startswith("{")]
    refused = [line for line in lines if line["message"].startswith("refused what 127.0.0.1 sent: 400, This is no HTTP/1.1 request: ")]
    assert {(line["logger"], line["level"]) for line in refused} == {("penstock.http", "info")}
    assert 1 <= len(refused) <= 40, "20 in any ten seconds"
    assert not [line for line in lines if line["logger"].startswith("uvicorn")]


def test_a_gateway_without_descriptors_refuses_and_recovers(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    few = tmp_path / "python"
    few.write_text(f'#!/bin/sh\nulimit -n 256\nexec {sys.executable} "$@"\n')
    few.chmod(0o755)
    with gateway(tmp_path, scripted_sglang.backend(), python=str(few)) as running:
        running.wait_ready()
        worker = running.workers()[0]
        body = json.dumps(raw.chat("[[stall 1]]", stream=True)).encode()
        with contextlib.ExitStack() as stack:
            busy = [stack.enter_context(raw.connect(running.port)) for _ in range((256 - 32) * 4 // 9)]
            for peer in busy:
                peer.sendall(raw.request("POST", CHAT, body))
            assert all(peer.recv(1024).startswith(b"HTTP/1.1 200 ") for peer in busy), "with a connection to the engine each"
            assert worker.num_fds() < 256
            answer = raw.call(running.port, "POST", CHAT, raw.chat("hi"))
            assert (answer.status, answer.error()["code"], answer.headers["retry-after"]) == (503, "too_many_connections", "1")
            idle = [stack.enter_context(raw.connect(running.port)) for _ in range(400)]
            before = sum(worker.cpu_times()[:2])
            for peer in idle:
                assert raw.rest(peer) == b"", "those who say nothing are closed, in favour of those who do"
            assert sum(worker.cpu_times()[:2]) - before < 2.0, "the accept loop does not spin"
        until("all is well again", lambda: raw.call(running.port, "POST", CHAT, raw.chat("hi")).status == 200)
        assert running.workers() == [worker]
        assert "Too many open files" not in running.output()


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
        line.get("id") == rid and line["outcome"] == "client_gone" for line in strict.requests()
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


def test_a_client_that_asks_on_and_reads_nothing_costs_four_megabytes_at_most(wired: Gateway) -> None:
    worker = wired.workers()[0]
    assert len(raw.call(wired.port, "GET", "/openapi.json").body) > 50_000
    before = worker.memory_info().rss
    with raw.connect(wired.port) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        peer.settimeout(2)
        asked = raw.request("GET", "/openapi.json", headers={"connection": "keep-alive"})
        # Either nothing more is read, or so much had been sent ahead that the connection ends.
        with pytest.raises((TimeoutError, ConnectionError)):
            while True:
                peer.sendall(asked)
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
