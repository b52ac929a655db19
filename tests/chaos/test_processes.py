"""Workers that are killed, rolled and stopped while clients are being answered: who notices, and what exactly."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import yaml

from tests.support import raw
from tests.support.processes import ROOT, Gateway, Rehearsal, command, ended, environment, gateway, gone, status, until

CHAT = "/v1/chat/completions"


def stream(port: int, prompt: str) -> socket.socket:
    peer = raw.connect(port)
    peer.sendall(raw.request("POST", CHAT, json.dumps(raw.chat(prompt, stream=True)).encode()))
    return peer


def test_a_worker_killed_under_fifty_streams_takes_its_own_and_no_others(tmp_path: Path, scripted_sglang: Rehearsal) -> None:
    with gateway(tmp_path, {**scripted_sglang.backend(), "listen": {"workers": 2}}) as running:
        running.wait_ready()
        peers = [stream(running.port, f"[[tokens 40]] [[pace 0.1]] {number}") for number in range(50)]
        heads = [peer.recv(1024) for peer in peers]
        assert all(head.startswith(b"HTTP/1.1 200") for head in heads)
        workers = running.admin("/admin/workers").json()["workers"]
        assert sum(worker["open"] for worker in workers) == 50
        victim = max(workers, key=lambda worker: worker["open"])
        os.kill(victim["pid"], signal.SIGKILL)
        bodies = [head + raw.rest(peer) for head, peer in zip(heads, peers, strict=True)]
        for peer in peers:
            peer.close()
        whole = [body for body in bodies if body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")]
        assert len(whole) == 50 - victim["open"]
        assert all(body.count(b'"content":"token ') == 40 for body in whole)
        assert sum(b"[DONE]" in body for body in bodies) == len(whole), "nobody else was told that it is whole"
        found = until("there are two workers again", lambda: [
            worker for worker in running.admin("/admin/workers").json()["workers"] if worker["state"] == "serving"
        ][1:] and running.admin("/admin/workers").json()["workers"])  # fmt: skip
        assert victim["pid"] not in {worker["pid"] for worker in found}
        metrics = running.admin("/metrics").body.decode()
        assert "penstock_worker_ends_total 1\n" in metrics
        assert raw.call(running.port, "POST", CHAT, raw.chat("hi")).status == 200


def test_a_worker_that_stands_still_keeps_no_operator_waiting(tmp_path: Path, scripted_sglang: Rehearsal) -> None:
    with gateway(tmp_path, {**scripted_sglang.backend(), "listen": {"workers": 2}}) as running:
        running.wait_ready()
        still, other = running.workers()
        still.suspend()
        try:
            # The kernel goes on handing connections to the one that stands still: what is asked for here is asked of the other.
            with contextlib.ExitStack() as stack:
                peers = [stack.enter_context(stream(running.port, f"[[tokens 5]] {number}")) for number in range(8)]
                answered = until("the other has answered", lambda: [peer for peer in peers if select.select([peer], [], [], 0)[0]])
                raw.rest(answered[0])
            name = until("it is logged", lambda: [line for line in running.requests() if line.get("id")])[0]["id"]
            rows = {row["pid"]: row for row in running.admin("/admin/workers").json()["workers"]}
            assert rows.keys() == {still.pid, other.pid}, "the one that stands still is shown as it was"
            assert "penstock_workers" in running.admin("/metrics").body.decode()
            assert running.admin(f"/admin/requests/{name}").status == 200
            assert running.admin("/admin/requests/chatcmpl-nobody").status == 404
        finally:
            still.resume()
        until("it answers again", lambda: running.admin("/readyz").status == 200)


class Load(threading.Thread):
    """Requests without a pause over one kept connection of an SDK that never retries: whatever goes wrong is an exception here."""

    def __init__(self, base_url: str, number: int) -> None:
        super().__init__()
        self._client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=30)
        self._number = number
        self.halt = threading.Event()
        self.done = 0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            while not self.halt.is_set():
                body: Any = raw.chat(f"[[tokens 5]] [[pace 0.01]] {self._number}")
                if self._number % 2:
                    chunks = list(self._client.chat.completions.create(**body, stream=True))
                    assert chunks[-1].choices[0].finish_reason == "stop"
                else:
                    assert self._client.chat.completions.create(**body).choices[0].finish_reason == "stop"
                self.done += 1
        except Exception as error:
            self.error = error
        finally:
            self._client.close()


@pytest.fixture
def load() -> Iterator[Callable[[str], list[Load]]]:
    threads: list[Load] = []

    def start(base_url: str) -> list[Load]:
        threads.extend(Load(base_url, number) for number in range(6))
        for thread in threads:
            thread.start()
        return threads

    yield start
    for thread in threads:
        thread.halt.set()
        thread.join(30)


def pids(running: Gateway, state: str = "serving") -> set[int]:
    return {worker["pid"] for worker in running.admin("/admin/workers").json()["workers"] if worker["state"] == state}


def test_reloads_under_load_drop_nothing(tmp_path: Path, scripted_sglang: Rehearsal, load: Callable[[str], list[Load]]) -> None:
    config = {**scripted_sglang.backend(), "listen": {"workers": 2}}
    with gateway(tmp_path, config) as running:
        running.wait_ready()
        threads = load(running.base_url)
        long = stream(running.port, "[[tokens 60]] [[pace 0.1]]")
        assert long.recv(1024)
        for generation in (2, 3, 4):
            before, done = pids(running), sum(thread.done for thread in threads)
            config["models"][f"new-{generation}"] = {"backend": "dsv3"}
            (tmp_path / "penstock.yaml").write_text(yaml.safe_dump(config))
            if generation == 3:
                running.process.send_signal(signal.SIGHUP)
                until("the third serves", lambda: "generation 3 serves" in running.output())
            else:
                answer = running.admin("/admin/reload", "POST")
                assert (answer.status, answer.json()) == (200, {"ok": True, "generation": generation, "problem": ""})
            assert len(pids(running)) == 2
            assert not pids(running) & before
            assert raw.call(running.port, "GET", f"/v1/models/new-{generation}").status == 200
            until("the load goes on", lambda done=done: sum(thread.done for thread in threads) > done + 20)  # type: ignore[misc]
        assert raw.rest(long).count(b'"content":"token ') >= 58, "a stream of the first generation is answered to its end"
        long.close()
        for thread in threads:
            thread.halt.set()
            thread.join(30)
        assert [thread.error for thread in threads] == [None] * 6
        until("the old ones are gone", lambda: not pids(running, "retiring"))
        metrics = running.admin("/metrics").body.decode()
        assert 'penstock_reloads_total{result="ok"} 3\n' in metrics
        assert "penstock_worker_ends_total" not in metrics.replace("# HELP penstock_worker_ends", "").replace(
            "# TYPE penstock_worker_ends", ""
        )
        answered = sum(thread.done for thread in threads)

        def counted() -> int:
            lines = running.admin("/metrics").body.decode().splitlines()
            return sum(int(line.rsplit(" ", 1)[1]) for line in lines if line.startswith('penstock_requests_total{route="/v1/chat'))

        until("what workers that are gone and those that serve have counted is counted", lambda: counted() == answered + 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lisen": {}}, "lisen: unknown key; did you mean 'listen'?"),
        ({"models": {"m": {"backend": "nope"}}}, "models.m.backend: no backend is called 'nope'"),
        ({"listen": {"host": "localhost"}}, "listen.host: cannot change from 127.0.0.1 to localhost while the gateway runs"),
    ],
)
def test_a_reload_that_is_wrong_changes_nothing_and_says_why(
    tmp_path: Path, scripted_sglang: Rehearsal, change: dict[str, Any], words: str
) -> None:
    with gateway(tmp_path, scripted_sglang.backend()) as running:
        running.wait_ready()
        before = pids(running)
        (tmp_path / "penstock.yaml").write_text(yaml.safe_dump({**scripted_sglang.backend(), **change}))
        answer = running.admin("/admin/reload", "POST")
        assert answer.status == 400
        assert answer.json()["generation"] == 1
        assert words in answer.json()["problem"]
        assert pids(running) == before
        assert raw.call(running.port, "POST", CHAT, raw.chat("hi")).status == 200
        assert 'penstock_reloads_total{result="refused"} 1' in running.admin("/metrics").body.decode()


def test_a_stop_under_load_is_announced_served_through_and_told(tmp_path: Path, scripted_sglang: Rehearsal) -> None:
    config = {**scripted_sglang.backend(), "timeouts": {"grace_s": 2, "drain_s": 2}}
    with gateway(tmp_path, config, PENSTOCK__TIMEOUTS__GRACE_S="2") as running:
        running.wait_ready()
        short = [stream(running.port, f"[[tokens 25]] [[pace 0.1]] {number}") for number in range(5)]
        long = [stream(running.port, f"[[tokens 900]] [[pace 0.1]] {number}") for number in range(3)]
        assert all(peer.recv(1024) for peer in (*short, *long))
        running.process.send_signal(signal.SIGTERM)
        until("readyz says so", lambda: status(f"{running.root}/readyz") == 503, 1.0)
        during = raw.call(running.port, "POST", CHAT, raw.chat("hi"), {"connection": "keep-alive"})
        assert (during.status, during.headers["connection"]) == (200, "close"), "served, and asked to go elsewhere"
        until("nobody listens any more", lambda: status(f"{running.root}/livez") == 0, 5.0)
        assert all(raw.rest(peer).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") for peer in short)
        for peer in long:
            ended = raw.rest(peer)
            assert b"shutting down" in ended
            assert b"[DONE]" not in ended
            assert ended.endswith(b"0\r\n\r\n"), "told, not cut"
        for peer in (*short, *long):
            peer.close()
        assert running.process.wait(10) == 0
        told = [json.loads(line) for line in running.output().splitlines() if "open answers are ended" in line]
        assert len(told) == 1
        assert told[0]["message"].startswith("3 open answers are ended; the oldest has run for ")


def test_a_second_signal_is_impatient(tmp_path: Path, scripted_sglang: Rehearsal) -> None:
    with (
        gateway(tmp_path, {**scripted_sglang.backend(), "timeouts": {"drain_s": 600}}) as running,
        stream(running.port, "[[tokens 9000]] [[pace 0.1]]") as peer,
    ):
        assert peer.recv(1024)
        running.process.send_signal(signal.SIGINT)
        until("nobody listens any more", lambda: status(f"{running.root}/livez") == 0)
        assert running.process.poll() is None
        running.process.send_signal(signal.SIGINT)
        assert b"shutting down" in raw.rest(peer)
        assert running.process.wait(10) == 0


def test_as_process_1_it_buries_orphans_and_hears_signals(tmp_path: Path, scripted_sglang: Rehearsal) -> None:
    (tmp_path / "penstock.yaml").write_text(yaml.safe_dump(scripted_sglang.backend()))
    log = tmp_path / "gateway.log"
    serve = [sys.executable, "-m", "gateway", "serve", "--port", "0", "-c", str(tmp_path / "penstock.yaml")]
    with log.open("wb") as out:
        alone = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *serve]
        process = subprocess.Popen(alone, stdout=out, stderr=subprocess.STDOUT, env=environment(), cwd=ROOT)
    running = Gateway(process, log)
    try:
        running.wait_ready()
        first = psutil.Process(process.pid).children()[0]
        family = [first, *first.children(recursive=True)]
        assert len(family) >= 3, "process 1, parent, worker"
        assert raw.call(running.port, "POST", CHAT, raw.chat("hi")).status == 200
        # An orphan: its parent ends at once, and the kernel hands it to process 1 of its namespace.
        orphan = ["nsenter", "--target", str(first.pid), "--pid", "--mount", "sh", "-c", "sleep 600 & exit 0"]
        subprocess.run(orphan, check=True, timeout=30)
        adopted = until("process 1 has it", lambda: [child for child in first.children() if "sleep" in command(child)])
        adopted[0].kill()
        until("it is buried", lambda: not psutil.pid_exists(adopted[0].pid))
        assert not any(ended(child) for child in first.children(recursive=True))
        first.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        gone(family)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_the_manager_is_told(tmp_path: Path, scripted_sglang: Rehearsal) -> None:
    """Type=notify of systemd: READY when every worker accepts, RELOADING and READY around a reload, STOPPING at the end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        with gateway(tmp_path / "run", scripted_sglang.backend(), NOTIFY_SOCKET=str(tmp_path / "notify")) as running:
            assert manager.recv(100) == b"READY=1"
            running.process.send_signal(signal.SIGHUP)
            assert manager.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
            assert manager.recv(100) == b"READY=1"
            running.process.send_signal(signal.SIGTERM)
            assert manager.recv(100) == b"STOPPING=1"


def test_the_deployment_examples_leave_time_for_the_end() -> None:
    unit = (ROOT / "deploy" / "systemd" / "penstock.service").read_text()
    assert "TimeoutStopSec=60" in unit  # > grace_s 5 + drain_s 30
    pod = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "penstock.yaml").read_text())["spec"]["template"]["spec"]
    container = pod["containers"][0]
    pre_stop_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain_s = int(container["env"][0]["value"])
    assert pod["terminationGracePeriodSeconds"] > pre_stop_s + 5 + drain_s
