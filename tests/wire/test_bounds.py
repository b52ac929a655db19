"""Bounds of docs/security.md on what engines, Redis, workers, services and whoever answers a command send: over real sockets and pipes."""

from __future__ import annotations

import asyncio
import http.server
import logging
import struct
import sys
import threading
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from backends.sglang_dsv3 import host
from backends.sglang_dsv3.engine import checkpoint
from backends.sglang_dsv3.transport import Response
from gateway import config, lifeline
from gateway.access.keys import KeyList
from gateway.plugin import Service, ServiceState
from gateway.processes import children, protocol, services
from gateway.processes.callers import Callers
from gateway.processes.fleet import Counts, Fleet
from gateway.processes.services import Services
from gateway.processes.usage import Usage
from gateway.serving import relay
from gateway.store import memories
from gateway.store.shared import Shared
from gateway.telemetry import tracer
from gateway.telemetry.record import Record
from tests.support import raw, store
from tests.support.otlp import collector
from tests.support.processes import Gateway, gateway, rehearsal, until
from tests.support.redis import Server
from tests.wire.test_command import penstock

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with rehearsal() as one, rehearsal() as other:
        backend = {"kind": "sglang_dsv3", "hosts": [{"url": one.url}, {"url": other.url}]}
        configuration = {"models": {"deepseek-v3": {"backend": "d"}}, "backends": {"d": backend}}
        with gateway(tmp_path_factory.mktemp("bounds"), configuration) as running:
            running.wait_all_hosts()
            yield running


def test_of_an_answer_so_much_is_kept_to_go_on_with_it(two_hosts: Gateway) -> None:
    letters = relay.MAX_KEPT_BYTES // 20
    for wide, goes_on in ((letters // 10, True), (letters, False)):
        body = raw.chat(f"[[tokens 48]] [[wide {wide}]] [[die 40]] [[times 1]]", stream=True)
        answer = raw.call(two_hosts.port, "POST", CHAT, body).body
        assert (b'"finish_reason":"stop"' in answer) == goes_on, "what was kept has been within the bound"
        assert (b'"error":' in answer) != goes_on, "and whoever cannot have the rest is told"
        assert answer.rstrip().endswith(b"data: [DONE]") == goes_on


def test_an_engines_json_has_a_size(two_hosts: Gateway) -> None:
    answer = raw.call(two_hosts.port, "POST", CHAT, raw.chat("[[tokens 66]] [[wide 1024000]]"))
    assert answer.status == 502, answer.body[:200]
    assert b"too large" in answer.body
    (line,) = until("it is logged", lambda: [line for line in two_hosts.requests() if line["status"] == 502])
    assert line["attempts"] == 2, "the other host was asked as well"
    assert raw.call(two_hosts.port, "POST", CHAT, raw.chat("hi")).status == 200


def test_what_an_engine_says_of_itself_is_read_so_far() -> None:
    class Endless:
        parts = 0

        async def read(self) -> bytes:
            self.parts += 1
            return b"x" * 5000

    said = Endless()
    assert len(asyncio.run(host.small(cast("Response", said)))) == host.MAX_SMALL_BYTES
    assert said.parts == -(-host.MAX_SMALL_BYTES // 5000)


def test_a_prompt_in_a_span_is_cut_off(tmp_path: Path) -> None:
    with collector() as sink, rehearsal() as engine:
        traces = {"otlp_endpoint": sink.endpoint, "capture_content": True}
        with gateway(tmp_path, {**engine.backend(), "tracing": traces}, OTEL_BSP_SCHEDULE_DELAY="100") as running:
            running.wait_ready()
            trace = raw.call(running.port, "POST", CHAT, raw.chat("x" * 200_000)).headers["x-trace-id"]
            _, (attempt,) = sink.tree(trace)
            assert len(attempt.attributes["gen_ai.input.messages"]) == tracer._MAX_CONTENT


def test_a_header_that_says_it_is_long_is_not_read(tmp_path: Path) -> None:
    shard = tmp_path / "model.safetensors"
    with shard.open("wb") as file:
        file.write(struct.pack("<Q", checkpoint.MAX_HEADER_BYTES + 1))
        file.truncate(checkpoint.MAX_HEADER_BYTES + 100)  # a hole: it takes no room
    tracemalloc.start()
    try:
        with pytest.raises(checkpoint.Unusable, match="no safetensors file"):
            checkpoint._shard(shard, set())
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_of_requests_so_many_are_remembered_in_the_store(server: Server) -> None:
    async def work(shared: Shared) -> None:
        for number in range(memories.KEPT + 300):
            one = Record({"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "headers": [], "client": ("h", 1)})
            one.model, one.call_id = "m", f"ours-{number}"
            shared.remember(one)
            if not number % 100:
                while shared.memories.pending():
                    await store.beat(shared)
        while shared.memories.pending():
            await store.beat(shared)

    store.with_store(server, work)
    sizes = {key: server.client().hlen(key) for key in server.client().scan_iter("*records*")}
    assert list(sizes.values()) == [memories.KEPT], sizes


# A child that says more in one line than anybody may, to the descriptor that its program is given.
TALKS = "import os, sys; fd = int({fd}); line = b'x' * {length}\nwhile line: line = line[os.write(fd, line):]\nimport time; time.sleep(60)"


@pytest.mark.pure
def test_a_worker_whose_line_never_ends_is_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    spawn = children.spawn
    born: list[asyncio.subprocess.Process] = []

    async def other(argv: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int]) -> asyncio.subprocess.Process:
        program = TALKS.format(fd=descriptors[-1], length=protocol.MAX_LINE + (1 << 20))
        born.append(await spawn([sys.executable, "-c", program], environment, descriptors[-1:]))
        return born[-1]

    async def work() -> None:
        settings, counts = config.load(environment={}).settings, Counts()
        listener = cast("Any", open("/dev/null"))  # noqa: SIM115 - nobody listens
        usage = Usage(tmp_path, settings.limits)
        fleet = Fleet(1, settings, tmp_path, listener, {}, counts, usage, Callers(usage), KeyList, lambda worker, question: None)
        fleet.start()
        try:
            await store.until("the next one has been started", lambda: len(born) > 1 and born[0].returncode is not None, 60)
        finally:
            await fleet.retire(protocol.Retire(False, 0.0, 0.0, 0.0))
            listener.close()

    monkeypatch.setattr(children, "spawn", other)
    monkeypatch.setattr(lifeline, "BACKOFF_FIRST_S", 0.0)
    with caplog.at_level(logging.ERROR, "penstock"):
        asyncio.run(work())


@pytest.mark.pure
def test_a_service_whose_line_never_ends_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ServiceState] = []
    program = TALKS.format(fd="os.environ['PENSTOCK_STATUS_FD']", length=2 * services.MAX_STATE_LINE + 2)

    async def work() -> None:
        running = Services(lambda name, state: seen.append(state))
        await running.change([Service("talks", [sys.executable, "-c", program], {}, 1.0)])
        try:
            await store.until("it has ended twice", lambda: len(seen) > 1, 60)
        finally:
            await running.aclose()

    monkeypatch.setattr(lifeline, "BACKOFF_FIRST_S", 0.0)
    asyncio.run(work())
    assert {state.state for state in seen} == {"restarting"}
    assert "chunk" in seen[0].detail or "limit" in seen[0].detail, seen[0]


def test_a_command_reads_so_much_of_an_answer(tmp_path: Path) -> None:
    sent = 0

    class Endless(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal sent
            self.send_response(200)
            self.end_headers()
            while True:
                self.wfile.write(b" " * (1 << 20))
                sent += 1

        def log_message(self, *about: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        server.daemon_threads = True
        server.handle_error = lambda *about: None  # type: ignore[method-assign]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ended = penstock("hosts", "--admin", f"http://127.0.0.1:{server.server_port}", folder=tmp_path)
        server.shutdown()
    assert ended.returncode == 1, ended
    assert "sends more than 64 MB: that is no gateway" in ended.stderr
    assert 64 <= sent < 100
