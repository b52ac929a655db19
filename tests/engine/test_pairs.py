"""Prefill and decode apart with the real SGLang on the CPU: its Mooncake backend hands the KV cache over, by TCP and from main memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from backends.sglang_dsv3.config import Engine
from backends.sglang_dsv3.engine import launch
from tests.support import raw
from tests.support.processes import ROOT, Gateway, environment, fetch, gateway, until

TRANSFER = ROOT / ".venv-transfer"
TINY = ROOT / "checkpoints" / "deepseek-v3-tiny"
START_S = 300.0


class Half:
    """One engine as a process."""

    def __init__(self, role: str, folder: Path) -> None:
        self.role = role
        self.port, self.bootstrap_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        more = ["--disaggregation-mode", role, "--disaggregation-transfer-backend", "mooncake"]
        more += ["--disaggregation-bootstrap-port", str(self.bootstrap_port)] if role == "prefill" else []
        config = Engine(max_running_requests=8, max_total_tokens=16384, extra_args=more)
        argv = launch.command(config, ROOT, TINY, "deepseek-v3-tiny", self.port)
        env = launch.environment(config, environment())
        env |= {"PYTHONPATH": f"{ROOT / 'tests' / 'support' / 'transfer'}:{TRANSFER}", "MOONCAKE_PROTOCOL": "tcp"}
        self.log = folder / f"{role}-{self.port}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=folder, start_new_session=True)

    def host(self) -> dict[str, Any]:
        return {"url": self.url, "role": self.role, **({"bootstrap_port": self.bootstrap_port} if self.role == "prefill" else {})}

    def ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        with contextlib.suppress(OSError):
            return bool(fetch(f"{self.url}/health_generate") is not None)
        return False

    def busy(self) -> int:
        (load,) = json.loads(fetch(f"{self.url}/v1/loads"))["loads"]
        return int(load["num_running_reqs"]) + int(load["num_waiting_reqs"])

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Half]]:
    folder = tmp_path_factory.mktemp("halves")
    with contextlib.ExitStack() as stack:
        running = []
        for role in ("prefill", "prefill", "decode"):
            running.append(Half(role, folder))
            stack.callback(running[-1].end)
        for half in running:
            until(f"{half.role} is ready", half.ready, START_S, 0.5)
        yield running


@pytest.fixture(scope="module")
def paired(halves: list[Half], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    section = {"kind": "sglang_dsv3", "hosts": [half.host() for half in halves], "health": {"slow_start_s": 0, "probe_s": 0.2}}
    config = {"models": {"deepseek-v3": {"backend": "dsv3"}}, "backends": {"dsv3": section}}
    with gateway(tmp_path_factory.mktemp("paired"), config) as running:
        running.wait_all_hosts(60)
        yield running


@pytest.fixture
def client(paired: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=paired.base_url, api_key="none", max_retries=0, timeout=120) as found:
        yield found


def explained(to: Gateway, request_id: str) -> dict[str, Any]:
    def kept() -> dict[str, Any]:
        found = to.admin(f"/admin/requests/{request_id}")
        return found.json() if found.status == 200 else {}

    return until("it is observed", kept)


def test_the_answer_is_that_of_an_engine_that_answers_alone(client: openai.OpenAI, served: Gateway) -> None:
    asked: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Explain quantum computing."}], "max_tokens": 24, "temperature": 0,
    }  # fmt: skip
    with openai.OpenAI(base_url=served.base_url, api_key="none", max_retries=0, timeout=120) as alone:
        expected = alone.chat.completions.create(model="deepseek-v3-tiny", **asked)
    whole = client.chat.completions.create(model="deepseek-v3", **asked)
    assert whole.choices[0].message.content == expected.choices[0].message.content
    assert whole.choices[0].finish_reason == expected.choices[0].finish_reason
    chunks = list(client.chat.completions.create(model="deepseek-v3", stream=True, stream_options={"include_usage": True}, **asked))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.choices[0].message.content
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_several_prompts_at_once(client: openai.OpenAI) -> None:
    prompts = ["one two three", "four five six", "seven eight"]
    alone = [
        client.completions.create(model="deepseek-v3", prompt=prompt, max_tokens=6, temperature=0).choices[0].text for prompt in prompts
    ]
    together = client.completions.create(model="deepseek-v3", prompt=prompts, max_tokens=6, temperature=0)
    assert [choice.text for choice in together.choices] == alone


def test_a_conversation_finds_its_prefix_where_it_was_prefilled(paired: Gateway) -> None:
    messages = [{"role": "system", "content": "You know everything about waterworks. " * 20}, {"role": "user", "content": "Who are you?"}]
    cached, places = [], set()
    for turn in range(3):
        body = {"model": "deepseek-v3", "messages": messages, "max_tokens": 4, "temperature": 0}
        answer = raw.call(paired.port, "POST", "/v1/chat/completions", body)
        assert answer.status == 200, answer.body
        cached.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
        found = explained(paired, answer.headers["x-request-id"])["attempts"][-1]
        places.add(found["prefill"]["host"])
        messages += [{"role": "assistant", "content": "Somebody."}, {"role": "user", "content": f"Question {turn}"}]
    assert len(places) == 1
    assert min(cached[1:]) > 100, cached


def test_a_client_that_leaves_ends_both_halves(paired: Gateway, halves: list[Half]) -> None:
    body = {
        "model": "deepseek-v3",
        "messages": [{"role": "user", "content": "Long"}],
        "max_tokens": 3000,
        "stream": True,
        "ignore_eos": True,
    }
    with raw.connect(paired.port) as connection:
        connection.sendall(raw.request("POST", "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}))
        until("it is decoded", lambda: halves[2].busy() > 0)
        assert connection.recv(64)
    until("nobody works on it", lambda: not any(half.busy() for half in halves), 30, 0.2)


def test_a_prefill_host_that_is_killed_costs_no_answer(paired: Gateway, halves: list[Half], client: openai.OpenAI) -> None:
    halves[0].end()
    for number in range(6):
        messages: Any = [{"role": "user", "content": f"After {number}"}]
        answer = client.chat.completions.create(model="deepseek-v3", messages=messages, max_tokens=4, temperature=0)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 4
    rows = {row["id"]: row for row in paired.admin("/admin/hosts").json()["hosts"]}
    assert rows[f"127.0.0.1:{halves[0].port}"]["state"] in ("down", "ejected")
    assert rows[f"127.0.0.1:{halves[1].port}"]["role"] == "prefill"
