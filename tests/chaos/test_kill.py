"""kill -9 of everybody in turn: nobody is left behind, what died comes back, and requests in between get an honest answer.

One gateway with the real engine goes through all stages, in order; each stage begins with a ready engine and ends with a served request.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support import raw
from tests.support.engine import sglang
from tests.support.processes import ROOT, Gateway, command, ended, environment, gateway, gone, status, until

pytestmark = pytest.mark.engine

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "deepseek-v3-tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("kill")
    log = folder / "gateway.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(ROOT / ".venv-dev" / "bin" / "python"), "-m", "gateway", "serve", "--port", "0"],
            stdout=out, stderr=subprocess.STDOUT, env=environment(), cwd=folder,
        )  # fmt: skip
    try:
        yield Gateway(process, log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def ask(running: Gateway) -> raw.Answer:
    return raw.call(running.port, "POST", CHAT, BODY)


def open_stream(running: Gateway) -> Any:
    peer = raw.connect(running.port)
    body = {**BODY, "stream": True, "max_tokens": 3500, "ignore_eos": True}
    peer.sendall(raw.request("POST", CHAT, json.dumps(body).encode()))
    until("the stream has begun", lambda: peer.recv(4096), 30)
    return peer


def assert_unavailable(running: Gateway, words: str) -> None:
    answer = ask(running)
    assert (answer.status, answer.error()["code"]) == (503, "engine_unavailable")
    assert words in answer.error()["message"]
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert status(f"{running.root}/readyz") == 503
    assert status(f"{running.root}/livez") == 200


def test_1_the_listener_is_up_at_once_and_the_sdk_rides_out_the_loading(running: Gateway) -> None:
    assert_unavailable(running, "The engine is loading")
    # No loop of ours: the SDK's own retries, spaced by the retry-after it is told. Its usual two are enough unless the machine is far
    # slower than at the last start, which is what the estimate rests on.
    with openai.OpenAI(base_url=running.base_url, api_key="none", max_retries=5) as client:
        answer = client.chat.completions.create(**BODY)
    assert answer.choices[0].message.content is not None
    running.wait_ready()


def test_2_the_engine_is_killed(running: Gateway) -> None:
    running.wait_ready()
    engine = sglang(running)
    family = [engine, *engine.children(recursive=True)]
    assert len(family) >= 3  # itself, scheduler, detokenizer
    with open_stream(running) as peer:
        engine.kill()
        rest = b""
        while part := peer.recv(65536):
            rest += part
    assert b'data: {"error":{' in rest
    assert b"[DONE]" not in rest
    until("the gateway knows", lambda: status(f"{running.root}/readyz") == 503)
    # Its probe may have failed before its supervisor has said why.
    until("and why", lambda: "cannot be reached" not in ask(running).body.decode())
    assert_unavailable(running, "loading again")
    gone(family)
    running.wait_ready()
    assert ask(running).status == 200
    assert sglang(running).pid != engine.pid


def test_3_the_scheduler_is_killed(running: Gateway) -> None:
    running.wait_ready()
    engine = sglang(running)
    scheduler = next(child for child in engine.children() if "scheduler" in "".join(command(child)))
    scheduler.kill()
    until("SGLang ends or is ended", lambda: ended(engine), 30)
    running.wait_ready()
    assert ask(running).status == 200


def test_4_a_worker_is_killed(running: Gateway) -> None:
    running.wait_ready()
    worker, engine = running.workers()[0], sglang(running)
    with open_stream(running) as peer:
        worker.kill()
        while peer.recv(65536):
            pass
    until("there is another worker", lambda: [found for found in running.workers() if found.pid != worker.pid])
    until("it serves", lambda: status(f"{running.root}/readyz") == 200)
    assert ask(running).status == 200
    assert sglang(running).pid == engine.pid, "the engine was not touched"


def test_5_the_supervisor_is_killed(running: Gateway) -> None:
    running.wait_ready()
    supervisor, engine = running.supervisors()[0], sglang(running)
    family = [supervisor, *supervisor.children(recursive=True)]
    supervisor.kill()
    gone(family)
    until("the gateway knows", lambda: status(f"{running.root}/readyz") == 503)
    assert_unavailable(running, "The engine is loading")
    running.wait_ready()
    assert ask(running).status == 200
    assert sglang(running).pid != engine.pid


def test_6_the_parent_is_killed(running: Gateway) -> None:
    running.wait_ready()
    family = running.family()
    assert len(family) >= 6  # parent, worker, supervisor, SGLang, scheduler, detokenizer
    running.process.kill()
    running.process.wait()
    gone(family)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_loading_is_quick_and_leaves_nobody(tmp_path: Path, number: signal.Signals) -> None:
    with gateway(tmp_path) as running:
        sglang(running)
        family = running.family()
        running.process.send_signal(number)
        assert running.process.wait(30) == 0
        gone(family)


def stopped_in_mid_stream(folder: Path, words: str, **settings: Any) -> bytes:
    """What a client gets whose gateway is told to stop after the first event; the gateway must end well."""
    config = {"models": {"echo": {"backend": "s"}}, "backends": {"s": {"kind": "scripted"}}, **settings}
    with gateway(folder, config) as running, raw.connect(running.port) as peer:
        body = {"model": "echo", "messages": [{"role": "user", "content": words}], "stream": True}
        peer.sendall(raw.request("POST", CHAT, json.dumps(body).encode()))
        got = peer.recv(4096)
        running.process.send_signal(signal.SIGTERM)
        while part := peer.recv(65536):
            got += part
        assert running.process.wait(10) == 0
    return got


def test_a_stop_lets_open_answers_finish(tmp_path: Path) -> None:
    assert b"data: [DONE]" in stopped_in_mid_stream(tmp_path, "[[slow 0.3]] " + "word " * 6)


def test_a_stop_ends_what_takes_too_long_with_an_error_event(tmp_path: Path) -> None:
    got = stopped_in_mid_stream(tmp_path, "[[slow 0.5]] " + "word " * 100, timeouts={"drain_s": 1})
    assert b"shutting down" in got
    assert b"[DONE]" not in got
