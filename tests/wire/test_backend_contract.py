"""Both built-in backends hold the contract that is shipped for everybody else's."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.sglang_dsv3.config import Config, HostConfig
from gateway.conformance import BackendConformance, begun, chat, drain
from gateway.plugin import AttemptFailed, Backend, BackendEnv, Gpu, Stats
from tests.support.processes import Rehearsal
from tests.wire.test_transport import answering, once_then, serving

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n"
CHUNKS = b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
STREAM = HEAD % len(CHUNKS) + CHUNKS
WHOLE = HEAD % 2 + b"{}"


@contextlib.contextmanager
def agent(status: dict[str, Any]) -> Iterator[str]:
    """An agent that says this of its machine; its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(status).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


class TestScripted(BackendConformance):
    kind = "scripted"
    provoke = {"busy": "[[fail busy]]", "client": "[[fail client]]", "sick": "[[fail sick]]", "cut": "[[cut 1]] a b"}  # noqa: RUF012

    @pytest.fixture
    def section(self) -> dict[str, Any]:
        return {"targets": 2}


class TestSGLang(BackendConformance):
    kind = "sglang_dsv3"
    provoke = {"busy": "[[refuse 503]]", "client": "[[refuse 400]]", "sick": "[[refuse 500]]", "cut": "[[die 2]]"}  # noqa: RUF012

    @pytest.fixture
    def section(self, scripted_sglang: Rehearsal) -> dict[str, Any]:
        return {"hosts": [{"url": scripted_sglang.url}]}

    def test_open_succeeds_and_send_fails_honestly_with_every_host_down(self) -> None:
        async def work(backend: Backend, target: str) -> None:
            assert await backend.probe(target) is not True, "or in words why not"
            assert "does not answer" in (await backend.check())[0]
            with pytest.raises(AttemptFailed) as failed:
                await begun(backend, target, chat("hi"))
            assert (failed.value.cause, failed.value.error.status) == ("connect", 503)

        self.drive({"hosts": [{"url": "http://127.0.0.1:9"}]}, work)

    def test_an_engines_content_type_is_its_own_affair(self) -> None:
        async def work() -> None:
            answer = b"HTTP/1.1 200 OK\r\ncontent-type: text/html; x=10.1.2.3\r\ncontent-length: 2\r\n\r\n{}"
            async with serving(answering(answer)) as (_, port):
                backend = self.plugin.build("b", Config([HostConfig(url=f"http://127.0.0.1:{port}")]), BackendEnv(Path("/nonexistent")))
                reply = await begun(backend, f"127.0.0.1:{port}", chat("hi"))
                assert reply.content_type == b"application/json"
                reply.close()
                await backend.aclose()

        asyncio.run(work())

    def test_what_an_engine_says_of_itself_becomes_numbers(self, section: dict[str, Any], scripted_sglang: Rehearsal) -> None:
        loads = [
            {"num_running_reqs": 6, "num_waiting_reqs": 2, "max_running_requests": 8, "token_usage": 0.5, "cache_hit_rate": 0.25},
            {"num_running_reqs": 2, "num_waiting_reqs": 0, "max_running_requests": 8, "token_usage": 0.25, "gen_throughput": 100.0},
        ]

        async def work(backend: Backend, target: str) -> None:
            assert backend.targets()[0].stats is None, "nobody has asked yet"
            scripted_sglang.behave(loads=loads)
            try:
                assert await backend.probe(target) is True
            finally:
                scripted_sglang.behave(loads=None)
            found = backend.targets()[0]
            assert found.stats == Stats(
                running_requests=8,
                queued_requests=2,
                max_running_requests=16,
                kv_usage_ratio=0.375,
                cache_hit_ratio=0.125,
                generation_tokens_per_second=100.0,
                batching_efficiency_ratio=0.5,
            )
            assert found.capacity == 16
            assert "engine" not in found.details, "details are for people alone"

        self.drive(section, work)

    def test_what_the_agent_says_of_the_machine_becomes_numbers(self, section: dict[str, Any]) -> None:
        gpu = {
            "index": 3,
            "name": "H200",
            "utilisation": 0.5,
            "memory_used": 60,
            "memory_total": 120,
            "power": 400.0,
            "throttled": ["heat"],
        }
        machine = {"memory_used": 1, "memory_total": 4, "swap_used": 5, "disk_free": 6, "gpus": [gpu]}
        status = {"state": "ready", "detail": "", "machine": machine}

        async def work(backend: Backend, target: str) -> None:
            assert await backend.probe(target) is True
            found = backend.targets()[0]
            stats = found.stats
            assert stats is not None
            assert (stats.ready, stats.memory_used_ratio, stats.swap_used_bytes, stats.disk_free_bytes) == (True, 0.25, 5, 6)
            assert stats.gpus == (Gpu(3, utilisation_ratio=0.5, memory_used_ratio=0.5, power_watts=400.0, throttled=True),)
            assert stats.running_requests == 0, "and of the engine beside it"
            assert found.details["machine"] == machine

        with agent(status) as url:
            self.drive({"hosts": [{**section["hosts"][0], "agent": url}]}, work)

    @pytest.mark.parametrize("stream", [False, True])
    def test_an_attempt_on_a_connection_that_was_closed_is_made_again_on_the_same_host(self, stream: bool) -> None:
        """Nothing can have been generated: it is no failed attempt, and nobody else is asked."""

        async def work() -> None:
            handle, requests = once_then(b"", None, answer=STREAM if stream else WHOLE)
            async with serving(handle) as (_, port):
                backend = self.plugin.build("b", Config([HostConfig(url=f"http://127.0.0.1:{port}")]), BackendEnv(Path("/nonexistent")))
                await backend.open()
                for _ in range(2):
                    reply = await begun(backend, f"127.0.0.1:{port}", chat("hi", stream=stream))
                    assert (await drain(reply) if stream else reply.body) != b""
                    reply.close()
                assert requests == [0, 0, 1]
                await backend.aclose()

        asyncio.run(work())

    @pytest.mark.parametrize("stream", [False, True])
    def test_what_was_closed_twice_is_a_failed_attempt(self, stream: bool) -> None:
        async def work() -> None:
            handle, requests = once_then(b"", b"", answer=STREAM if stream else WHOLE)
            async with serving(handle) as (_, port):
                backend = self.plugin.build("b", Config([HostConfig(url=f"http://127.0.0.1:{port}")]), BackendEnv(Path("/nonexistent")))
                await backend.open()
                reply = await begun(backend, f"127.0.0.1:{port}", chat("hi", stream=stream))
                assert (await drain(reply) if stream else reply.body) != b""
                with pytest.raises(AttemptFailed) as failed:
                    await begun(backend, f"127.0.0.1:{port}", chat("hi", stream=stream))
                assert failed.value.cause == "broken"
                assert requests == [0, 0, 1]
                await backend.aclose()

        asyncio.run(work())
