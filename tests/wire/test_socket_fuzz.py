"""Whatever bytes a client sends: no answer but a named one, no descriptor, task or memory kept, nobody else disturbed. Seeded; over a real
socket to a real gateway before a scripted engine. FUZZ_INPUTS asks for more, FUZZ_CLIENTS for several clients at once, each seeded anew."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.chaos.test_sick_redis import metric
from tests.support import raw
from tests.support.processes import Gateway, Rehearsal, gateway, until

INPUTS = int(os.environ.get("FUZZ_INPUTS", "400"))
CLIENTS = int(os.environ.get("FUZZ_CLIENTS", "1"))
CHAT = b"/v1/chat/completions"
# Those of ours above 499: a transfer coding that is not understood, an engine that failed, no place, no time.
NAMED = {501, 502, 503, 504, 505}

paths = st.sampled_from([
    CHAT, b"/v1/models", b"/v1/completions", b"/v1/responses", b"/generate", b"/livez", b"/readyz", b"/metrics", b"/admin/keys",
    b"/v1//chat/completions", b"/v1/chat/completions?x=1", b"*", b"http://h/v1/models", b"/%00", b"/../etc",
])  # fmt: skip
methods = st.sampled_from([b"GET", b"POST", b"HEAD", b"PUT", b"OPTIONS", b"CONNECT", b"PRI", b"DELETE", b"post"])
header = st.sampled_from([
    b"content-length: 5", b"content-length: -1", b"content-length: 99999999999", b"transfer-encoding: chunked",
    b"transfer-encoding: gzip, chunked",
    b"expect: 100-continue", b"connection: close", b"connection: upgrade", b"upgrade: websocket", b"upgrade: h2c", b"host: y", b"host : z",
    b"authorization: Bearer a", b"content-encoding: gzip", b"content-encoding: br", b"content-type: text/plain", b"x-request-id: \xff",
    b" folded", b"x: " + b"a" * 5000, b"content-type: application/json", b"accept-encoding: zstd", b"origin: http://elsewhere",
])  # fmt: skip
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12
)
names = st.sampled_from(
    ["model", "messages", "stream", "n", "max_tokens", "prompt", "input", "tools", "stop", "temperature", "stream_options", "x"]
)


def words(content: object) -> bytes:
    return json.dumps(content).encode("utf-8", "surrogatepass")


chats = st.sampled_from(
    ["hi", "[[tokens 3]]", "[[refuse 503]]", "[[die 1]]", "[[cut 1]]", "[[garbage]]", "[[first-error 503]]", "[[false-done 1]]"]
)
bodies = st.one_of(
    st.binary(max_size=200),
    st.dictionaries(names, values, max_size=6).map(words),
    st.builds(lambda text, stream: words(raw.chat(text, stream=stream)), chats, st.booleans()),
    st.builds(lambda text, more: words({**raw.chat(text), **more}), chats, st.dictionaries(names, values, max_size=3)),
)


@st.composite
def inputs(draw: st.DrawFn) -> list[bytes]:
    """What one client sends, in pieces."""
    if draw(st.integers(0, 19)) == 0:
        return [draw(st.binary(max_size=300))]
    sent = b""
    for _ in range(draw(st.integers(1, 2))):
        body = draw(bodies)
        lines = [draw(methods) + b" " + draw(paths) + draw(st.sampled_from([b" HTTP/1.1", b" HTTP/1.1", b" HTTP/1.0", b" HTTP/2", b""]))]
        lines += draw(st.sampled_from([[b"host: x"], [b"host: x"], []])) + draw(st.lists(header, max_size=4))
        if draw(st.booleans()):
            lines.append(b"content-length: %d" % len(body))
            lines.append(b"content-type: application/json")
        sent += draw(st.sampled_from([b"\r\n", b"\r\n", b"\n"])).join(lines) + b"\r\n\r\n" + body
    if draw(st.booleans()):
        sent = sent[: draw(st.integers(0, len(sent)))]
    cut = draw(st.integers(0, len(sent)))
    return [piece for piece in (sent[:cut], sent[cut:]) if piece]


@pytest.fixture(scope="module")
def fuzzed(scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("fuzzed"), {**scripted_sglang.backend(), "timeouts": {"head_s": 2, "body_s": 2}}) as running:
        running.wait_ready()
        yield running


def said(port: int, pieces: list[bytes]) -> bytes:
    """What the gateway says to it within a moment; then the client is gone, whatever there was still to come."""
    got = b""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=30) as peer:
        for piece in pieces:
            peer.sendall(piece)
        peer.settimeout(0.02)
        while part := peer.recv(65536):
            got += part
    return got


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_no_input_leaves_anything_behind(fuzzed: Gateway) -> None:
    worker = fuzzed.workers()[0]
    number = itertools.count(1)
    before: list[tuple[int, int]] = []

    def client(which: int) -> None:
        @seed(13 + which)
        @settings(max_examples=INPUTS // CLIENTS, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(inputs())
        def one(pieces: list[bytes]) -> None:
            if next(number) == min(200, INPUTS // 2):  # by then everything has been used once
                before.append((worker.num_fds(), worker.memory_info().rss))
            for status in re.findall(rb"(?:^|\n)HTTP/1\.1 (\d{3}) ", said(fuzzed.port, pieces)):
                assert int(status) < 500 or int(status) in NAMED, pieces

        one()

    with ThreadPoolExecutor(CLIENTS) as clients:
        for done in [clients.submit(client, which) for which in range(CLIENTS)]:
            done.result()
    ((descriptors, resident),) = before
    until("nothing is open any more", lambda: metric(fuzzed, "penstock_open_requests") == 0, 60)
    until("no descriptor is kept", lambda: worker.num_fds() <= descriptors + 8, 90, 0.5)
    grown = worker.memory_info().rss - resident
    lag_s = metric(fuzzed, "penstock_loop_lag_seconds")
    print(f"{next(number) - 1} inputs, {grown / 1e6:.1f} MB more than after the first 200, loop lag {lag_s:.3f} s")
    assert grown < 64 << 20, "the ring of requests and the allocator's own, and no more"
    assert fuzzed.workers() == [worker], "nobody was replaced"
    for sign in ("Traceback", "unforeseen", "never awaited", "has failed (", "was left without an answer"):
        assert sign not in fuzzed.output(), sign
    assert raw.call(fuzzed.port, "POST", CHAT.decode(), raw.chat("hi")).status == 200
