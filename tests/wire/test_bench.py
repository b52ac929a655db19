"""The bench measures what it says: everything is on that it says is on, and a wait is counted from when a request was due."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import cast

import psutil
import pytest

from bench import client
from bench.peers import BARE, KEY, OURS, Scene, default_python, form, running, upstream
from bench.upstream import ANSWER, BURST
from tests.support import raw
from tests.support.otlp import collector
from tests.support.processes import command, until

CHAT = "/v1/chat/completions"
# So many that no host of three gets none of them by chance.
REQUESTS = 100
SAMPLED = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_penstock_with_everything_on_has_everything_on(folder: Path) -> None:
    with collector() as sink, upstream(2, 0.01) as above:
        scene = Scene(above, default_python(), sink.endpoint)
        with running(OURS, scene, folder / "ours") as peer:
            asked = {"authorization": f"Bearer {KEY}", "traceparent": SAMPLED}
            assert raw.call(peer.port, "POST", CHAT, raw.chat("hi"), {"authorization": "Bearer sk-other"}).status == 401
            for number in range(REQUESTS):  # each a conversation of its own, that is kept to its own host
                answer = raw.call(peer.port, "POST", CHAT, raw.chat(f"hi {number}"), asked)
                assert answer.status == 200
                assert {"x-ratelimit-limit-requests", "x-ratelimit-limit-tokens"} <= set(answer.headers)
            log = folder / "ours" / "log"

            def lines() -> list[dict[str, object]]:
                return [
                    json.loads(line) for line in log.read_text().splitlines() if '"penstock.request"' in line and '"key":"bench"' in line
                ]

            until("every request has its line", lambda: len(lines()) >= REQUESTS)
            assert set(Counter(line["host"] for line in lines())) == {f"127.0.0.1:{port}" for port in above.ports}
            until("spans arrive", lambda: len(sink.spans) >= 2 * REQUESTS, 20)
            workers = [child for child in psutil.Process(peer.pid).children() if "gateway.processes.worker" in command(child)]
            assert len(workers) == 1
        with running(BARE, scene, folder / "bare") as peer:
            answer = raw.call(peer.port, "POST", CHAT, raw.chat("hi"))
            assert answer.status == 200
            assert not [name for name in answer.headers if name.startswith("x-ratelimit")]
            assert '"penstock.request"' not in (folder / "bare" / "log").read_text()


def test_which_form_is_measured_is_said() -> None:
    assert form(default_python())["form"] in ("pure Python", "compiled")


def test_the_upstream_counts_what_it_answered() -> None:
    with upstream(3, 0.01) as above:
        for port in above.ports:
            raw.call(port, "POST", CHAT, raw.chat("hi"))
        raw.call(above.ports[0], "GET", "/v1/models")
        raw.call(above.ports[0], "POST", "/abort_request", {"rid": "x"})
        assert above.counted() == {"requests": 3, "events": 0}
        raw.call(above.ports[0], "POST", CHAT, raw.chat("hi", stream=True))
        assert above.counted() == {"requests": 4, "events": BURST + 1}
        raw.call(above.ports[0], "POST", CHAT, raw.chat("paced hi", stream=True))
        assert above.counted() == {"requests": 5, "events": BURST + 1 + 4}


class Server(asyncio.Protocol):
    """Answers each request after the seconds that `after` gives for its number."""

    def __init__(self, answer: bytes, after: Callable[[int], float], gone: asyncio.Queue[None]) -> None:
        self._answer, self._after, self._gone = answer, after, gone
        self._number = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._number += 1
        asyncio.get_running_loop().call_later(self._after(self._number), self._transport.write, self._answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone.put_nowait(None)


def seen(answer: bytes, after: Callable[[int], float], rate: float, seconds: float, connections: int) -> dict[str, float]:
    """By the client, of such a server."""

    async def measured() -> dict[str, float]:
        gone: asyncio.Queue[None] = asyncio.Queue()
        server = await asyncio.get_running_loop().create_server(lambda: Server(answer, after, gone), "127.0.0.1", 0)
        async with server:
            try:
                return await client.run(server.sockets[0].getsockname()[1], rate, seconds, connections)
            finally:
                for _ in range(connections):
                    await gone.get()

    return asyncio.run(asyncio.wait_for(measured(), 60))


def test_a_request_that_had_to_wait_for_the_one_before_says_so() -> None:
    """Coordinated omission: a server that stands still once, for as long as is measured, must show in the median, although it answers one
    request slowly; a client that waits before it asks again would see one slow answer among quick ones."""
    stands_s, rate = 1.0, 100
    first = int(rate * client.WARM_S) + 1
    found = seen(ANSWER, lambda number: stands_s if number == first else 0.0, rate, stands_s, 1)
    assert found["requests"] >= rate * stands_s
    assert found["p50"] >= stands_s / 4 * 1e6
    assert found["p99"] >= stands_s * 0.9 * 1e6


def test_an_answer_that_is_no_success_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="429"):
        seen(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n", lambda number: 0.0, 100, 0.1, 2)
