"""`penstock engine` as it runs on a GPU host, with the real SGLang on the CPU: started, killed, drained, changed under load."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from backends.sglang_dsv3.engine import environment_folder
from tests.support import raw, redis
from tests.support.processes import ROOT, Gateway, environment, fetch, gateway, gone, status, until

CHAT = "/v1/chat/completions"
START_S = 180


class Agent:
    """`penstock engine -c FILE` on ports of its own."""

    def __init__(self, folder: Path, **section: Any) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.port, self.agent_port = redis.free_port(), redis.free_port()
        self.section = {"port": self.port, "agent": f"127.0.0.1:{self.agent_port}", **section}
        self.write()
        self.log = folder / "agent.log"
        home = folder / "home"
        home.mkdir()
        for name in (".venv-engine", "checkpoints"):
            (home / name).symlink_to(ROOT / name)
        with self.log.open("wb") as out:
            command = [sys.executable, "-m", "gateway", "engine", "-c", str(self.path)]
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment(PENSTOCK_HOME=str(home)), cwd=folder
            )

    @property
    def path(self) -> Path:
        return self.folder / "penstock.yaml"

    def write(self, **change: Any) -> None:
        self.section.update(change)
        backend = {"kind": "sglang_dsv3", "hosts": [{"url": "http://127.0.0.1:1"}], "engine": self.section}
        self.path.write_text(yaml.safe_dump({"models": {"m": {"backend": "dsv3"}}, "backends": {"dsv3": backend}}))

    def host(self) -> dict[str, Any]:
        return {"url": f"http://127.0.0.1:{self.port}", "agent": f"http://127.0.0.1:{self.agent_port}"}

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(fetch(f"http://127.0.0.1:{self.agent_port}/status"))
        return found

    def ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return status(f"http://127.0.0.1:{self.agent_port}/ready") == 200

    def family(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def schedulers(self) -> list[psutil.Process]:
        return [
            process for process in self.family() if "scheduler" in process.name() or any("scheduler" in word for word in process.cmdline())
        ]

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def agent(folder: Path, **section: Any) -> Iterator[Agent]:
    running = Agent(folder, **section)
    family: list[psutil.Process] = []
    try:
        yield running
        if running.process.poll() is None:
            family = running.family()
        running.stop()
        gone(family)
    finally:
        if running.process.poll() is None:
            running.process.kill()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints in two places."""
    folder = tmp_path_factory.mktemp("weights")
    builder = ROOT / "backends" / "sglang_dsv3" / "engine" / "tiny" / "build.py"
    for name in ("one", "two"):
        subprocess.run([environment_folder(ROOT) / "bin" / "python", builder, folder / name], check=True, capture_output=True, timeout=120)
    return folder / "one", folder / "two"


@pytest.fixture(scope="module")
def pair(weights: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Agent, Agent, Gateway]]:
    """Two hosts with agents and a gateway before them."""
    folder = tmp_path_factory.mktemp("pair")
    section = {"model_path": str(weights[0]), "served_model_name": "deepseek-v3", "weight_version": "v1"}
    with agent(folder / "1", **section) as one, agent(folder / "2", **section) as two:
        config = {
            "models": {"deepseek-v3": {"backend": "dsv3"}},
            "backends": {"dsv3": {"kind": "sglang_dsv3", "hosts": [one.host(), two.host()], "canary": {"v2": 0.25}}},
        }
        with gateway(folder / "gateway", config) as running:
            until("one of them loads", lambda: "loading" in running.admin("/admin/hosts").body.decode(), 60, 0.1)
            until("both are ready", lambda: one.ready() and two.ready(), START_S, 0.2)
            running.wait_all_hosts(30)
            yield one, two, running


class Load:
    """Clients that stream one answer after another until told to stop; what went wrong with any of them is kept."""

    def __init__(self, port: int, clients: int = 6, tokens: int = 60) -> None:
        self.answers = 0
        self.wrong: list[str] = []
        self._port, self._tokens = port, tokens
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _client(self, number: int) -> None:
        while not self._stop.is_set():
            prompt = f"Client {number} asks for the {self.answers}th time."
            try:
                answer = raw.call(self._port, "POST", CHAT, raw.chat(prompt, stream=True, max_tokens=self._tokens, ignore_eos=True))
            except OSError as error:
                self.wrong.append(repr(error))
                continue
            whole = answer.status == 200 and answer.body.endswith(b"data: [DONE]\n\n") and b'data: {"error"' not in answer.body
            self.answers += 1
            if not whole:
                self.wrong.append(f"{answer.status}: {answer.body[-300:]!r}")


def test_a_host_tells_what_it_is_and_how_it_is(pair: tuple[Agent, Agent, Gateway], weights: tuple[Path, Path]) -> None:
    one, _, running = pair
    said = one.status()
    assert (said["state"], said["weight_version"], said["served_model_name"]) == ("ready", "v1", "deepseek-v3")
    assert said["machine"]["memory_total"] > 1 << 30
    assert said["machine"]["note"].startswith("no NVML")
    assert b'penstock_engine_state{state="ready"} 1' in fetch(f"http://127.0.0.1:{one.agent_port}/metrics")
    assert b"penstock engine" in fetch(f"http://127.0.0.1:{one.agent_port}/")
    both = until("the plan stands beside what the engine says", lambda: (now := one.status())["engine"] and now["plan"] and now, 30, 0.2)
    assert both["engine"]["kv_tokens"] == both["plan"]["kv_tokens"]
    assert both["engine"]["kv_gib"] == pytest.approx(both["plan"]["kv_gib"], rel=0.01)

    def shown() -> dict[str, Any]:
        found: dict[str, Any] = next(row for row in running.admin("/admin/hosts").json()["hosts"] if row["id"].endswith(str(one.port)))
        return found

    until("the gateway has asked", lambda: shown()["details"].get("weight_version") == "v1" and "machine" in shown()["details"], 20, 0.2)
    assert shown()["details"]["model_path"] == str(weights[0])
    answer = raw.call(running.port, "POST", CHAT, raw.chat("hi", max_tokens=4))
    assert answer.json()["usage"]["completion_tokens"] == 4


def test_a_scheduler_that_is_killed_is_started_again_and_nobody_notices(pair: tuple[Agent, Agent, Gateway]) -> None:
    one, _, running = pair
    before = one.status()["restarts"]
    with Load(running.port) as load:
        until("there is load", lambda: load.answers > 5, 60)
        for process in one.schedulers():
            process.kill()
        until("the agent has noticed", lambda: one.status()["restarts"] == before + 1, 30, 0.1)
        until("it is back", one.ready, START_S, 0.2)
        running.wait_all_hosts(60)  # requests are what proves it well again
    assert load.wrong == []
    assert "restarting" in one.log.read_text()


def test_weights_are_changed_host_by_host_without_a_failed_request(pair: tuple[Agent, Agent, Gateway], weights: tuple[Path, Path]) -> None:
    one, two, running = pair
    with Load(running.port) as load:
        until("there is load", lambda: load.answers > 5, 60)
        for host in (one, two):
            host.write(model_path=str(weights[1]), weight_version="v2")
            host.process.send_signal(signal.SIGHUP)
            until("it drains", lambda host=host: not host.ready(), 30, 0.1)  # type: ignore[misc]
            until("it serves the new weights", lambda host=host: host.ready() and host.status()["weight_version"] == "v2", START_S, 0.2)  # type: ignore[misc]
            if host is one:

                def weights_now() -> dict[str, float]:
                    rows = running.admin("/admin/hosts").json()["hosts"]
                    return {str(row["details"].get("weight_version")): row["weight"] for row in rows}

                until("new weights get a quarter of the requests", lambda: weights_now() == {"v1": 1.0, "v2": 0.25}, 30, 0.2)
        answers = load.answers
        until("both serve on", lambda: load.answers > answers + 5, 60)
    assert load.wrong == []
    assert load.answers > 20


def test_a_wrong_change_changes_nothing(pair: tuple[Agent, Agent, Gateway], tmp_path: Path) -> None:
    one, _, _ = pair
    right = dict(one.section)
    for change in ({"model_path": str(tmp_path)}, {"memory_fraction": 3}):
        one.write(**change)
        one.process.send_signal(signal.SIGHUP)
        until("it is refused", lambda: "nothing has changed" in one.log.read_text(), 10)
        assert one.ready()
        one.section = dict(right)
    one.write()


def test_told_to_stop_it_lets_its_streams_finish(pair: tuple[Agent, Agent, Gateway]) -> None:
    """The last of the pair: afterwards the other serves alone, and is killed with -9."""
    one, two, running = pair
    family = one.family()
    with Load(running.port, tokens=200) as load:
        until("both have work", lambda: all(row["in_flight"] for row in running.admin("/admin/hosts").json()["hosts"]), 60, 0.1)
        assert one.stop() == 0
        answers = load.answers
        until("the other serves on", lambda: load.answers > answers + 3, 60)
    assert load.wrong == []
    gone(family)
    family = two.family()
    os.kill(two.process.pid, signal.SIGKILL)
    two.process.wait()
    gone(family)


def test_four_ranks_under_one_agent(tmp_path: Path) -> None:
    """The layout of four GPUs, on four CPU ranks: served, a rank killed with -9, served again, stopped, nobody left."""
    with agent(tmp_path / "four", tp_size=4) as four:
        until("it is ready", four.ready, START_S * 2, 0.3)
        assert len(four.schedulers()) >= 4
        body = {**raw.chat("hi", max_tokens=4), "model": "deepseek-v3-tiny"}
        assert raw.call(four.port, "POST", CHAT, body).json()["usage"]["completion_tokens"] == 4
        four.schedulers()[-1].kill()
        until("the agent has noticed", lambda: four.status()["restarts"] == 1, 60, 0.1)
        until("it is back", four.ready, START_S * 2, 0.3)
        assert raw.call(four.port, "POST", CHAT, body).status == 200


def test_two_nodes_hold_it_together_and_the_first_knows_how_the_second_is(tmp_path: Path) -> None:
    """The layout of two hosts, each with half of the ranks; only the first serves."""
    with contextlib.ExitStack() as stack:
        shared = {"tp_size": 4, "nnodes": 2, "dist_init_addr": f"127.0.0.1:{redis.free_port()}"}
        second = stack.enter_context(agent(tmp_path / "1", node_rank=1, **shared))
        first = stack.enter_context(agent(tmp_path / "0", followers=[f"http://127.0.0.1:{second.agent_port}"], **shared))
        until("both are ready", lambda: first.ready() and second.ready(), START_S * 2, 0.3)
        body = {**raw.chat("hi", max_tokens=4), "model": "deepseek-v3-tiny"}
        assert raw.call(first.port, "POST", CHAT, body).json()["usage"]["completion_tokens"] == 4
        assert list(first.status()["followers"].values()) == ["ready"]
        assert status(f"http://127.0.0.1:{second.port}/ready") != 200, "the second serves nothing"
        family = second.family()
        second.process.kill()
        second.process.wait()
        gone(family)
        until("the first takes no requests any more", lambda: not first.ready(), 30, 0.1)
        assert "does not answer" in next(iter(first.status()["followers"].values()))


@pytest.mark.parametrize(
    ("section", "kind", "state"),
    [
        ({"extra_args": ["--max-prefill-tokens", "many"]}, "arguments", "failed"),
        ({"extra_args": ["--nccl-port", "{taken}"]}, "port taken", "restarting"),
    ],
)
def test_an_end_is_told_with_what_to_change(tmp_path: Path, section: dict[str, Any], kind: str, state: str) -> None:
    """Proven with the real engine: what SGLang says of an argument that only itself can tell is wrong, and when a port is taken."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        arguments = [word.format(taken=taken.getsockname()[1]) for word in section["extra_args"]]
        with agent(tmp_path / "broken", extra_args=arguments) as broken:
            until("it listens, once SGLang was asked what it knows", lambda: status(f"http://127.0.0.1:{broken.agent_port}/ready"), 120)
            until("it has ended", lambda: broken.status()["state"] in ("failed", "restarting"), 120, 0.2)
            said = broken.status()
            assert said["state"] == state
            assert said["last_end"].startswith(kind), said
            assert said["advice"]
            answer = raw.call(broken.agent_port, "GET", "/ready")
            assert (answer.status, answer.json()["state"]) == (503, state)
