"""The operator's commands, against gateways that run: what they show, what they change, and with which exit code they end."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.access.keys import hashed
from tests.support import raw
from tests.support.processes import Gateway, Rehearsal, environment, gateway, rehearsal, until
from tests.wire.test_command import penstock

CHAT = "/v1/chat/completions"


@pytest.fixture
def pair(scripted_sglang: Rehearsal, tmp_path: Path) -> Iterator[tuple[Gateway, Rehearsal]]:
    """A gateway before two hosts, and the second of them."""
    with rehearsal() as other:
        config = scripted_sglang.backend()
        config["backends"]["dsv3"]["hosts"].append({"url": other.url, "weight": 3})
        with gateway(tmp_path / "run", config) as running:
            running.wait_all_hosts()
            yield running, other


def command(running: Gateway, *arguments: str) -> subprocess.CompletedProcess[str]:
    return penstock(*arguments, "--admin", running.admin_url, folder=running.log.parent)


def columns(done: subprocess.CompletedProcess[str]) -> dict[str, list[str]]:
    """Rows by their first column."""
    assert done.returncode == 0, done.stderr
    return {line.split()[0]: line.split() for line in done.stdout.splitlines() if line}


def test_hosts_are_listed_drained_and_put_back(pair: tuple[Gateway, Rehearsal]) -> None:
    running, other = pair
    name = other.url.removeprefix("http://")
    rows = columns(command(running, "hosts"))
    assert rows["host"][:6] == ["host", "backend", "state", "weight", "tier", "in"]
    assert rows[name][1:5] == ["dsv3", "ok", "3", "0"]
    assert len(json.loads(command(running, "hosts", "--json").stdout)["hosts"]) == 2
    with raw.connect(running.port) as peer:
        # Long enough to be in flight on the one host that is left, until it is let go.
        done = command(running, "hosts", "drain", name)
        assert (done.returncode, done.stdout) == (0, f"penstock: {name} is drained, 0 requests in flight\n")
        peer.sendall(raw.request("POST", CHAT, json.dumps(raw.chat("[[tokens 9000]] [[pace 0.05]]", stream=True)).encode()))
        assert peer.recv(1024)
        assert columns(command(running, "hosts"))[name][2] == "drained"
        assert command(running, "hosts", "undrain", name).stdout == f"penstock: {name} is ok\n"
        busy = next(row["id"] for row in running.admin("/admin/hosts").json()["hosts"] if row["in_flight"])
        assert command(running, "hosts", "drain", busy).stdout == f"penstock: {busy} is draining, 1 requests in flight\n"
    waited = command(running, "hosts", "drain", busy, "--wait")
    assert waited.stdout == f"penstock: {busy} is drained, 0 requests in flight\n"
    unknown = command(running, "hosts", "drain", "nope:1")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "There is no host 'nope:1'. Known:" in unknown.stderr


def test_a_reload_is_done_or_says_why_not(pair: tuple[Gateway, Rehearsal]) -> None:
    running, _ = pair
    done = command(running, "reload")
    assert (done.returncode, done.stdout) == (0, "penstock: generation 2 serves\n")
    file = running.log.parent / "penstock.yaml"
    content: dict[str, Any] = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**content, "lisen": {}}))
    refused = command(running, "reload")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "refused, generation 2 goes on: lisen: unknown key; did you mean 'listen'?" in refused.stderr


def test_status_says_in_a_few_lines_whether_it_can_serve(pair: tuple[Gateway, Rehearsal]) -> None:
    running, other = pair
    name = other.url.removeprefix("http://")
    done = command(running, "status")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["ready", "workers", "hosts"]
    assert "1 serving, generation 1; 0 open" in done.stdout
    assert "2 of 2 take requests" in done.stdout
    for host in (name, next(row["id"] for row in running.admin("/admin/hosts").json()["hosts"] if row["id"] != name)):
        command(running, "hosts", "drain", host)
    until("nothing can be served", lambda: running.admin("/readyz").status == 503)
    done = command(running, "status")
    assert done.returncode == 1
    assert "0 of 2 take requests" in done.stdout
    assert f"{name} is drained: " in done.stdout
    found = json.loads(command(running, "status", "--json").stdout)
    assert (found["ready"], len(found["workers"]), len(found["hosts"])) == (False, 1, 2)


def test_top_once_shows_hosts_and_who_uses_them(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    keys = [{"name": name, "hash": hashed(name), "rpm": 600} for name in ("busy", "idle")]
    with gateway(tmp_path, {**scripted_sglang.backend(), "keys": keys}) as running:
        running.wait_all_hosts()
        stop = threading.Event()

        def load() -> None:
            while not stop.is_set():
                raw.call(running.port, "POST", CHAT, raw.chat("hi"), {"authorization": "Bearer busy"})

        client = threading.Thread(target=load)
        client.start()
        try:
            shown = columns(command(running, "top", "--once", "--every", "1"))
        finally:
            stop.set()
            client.join()
        host = shown[scripted_sglang.url.removeprefix("http://")]
        assert host[1] == "ok"
        assert host[3] == "100,000"
        rate, speed, of_rpm, of_tpm, requests, tokens = shown["busy"][1:7]
        assert float(rate) > 0
        assert int(speed.replace(",", "")) > 0
        assert of_rpm.endswith("%")
        assert of_tpm == "-"
        assert int(requests.replace(",", "")) > 0
        assert int(tokens.replace(",", "")) >= int(requests.replace(",", "")), "of prompt and completion"
        assert shown["idle"][1:5] == ["0", "0", "0%", "-"]
        assert list(shown).index("busy") < list(shown).index("idle"), "the busiest first"


def test_top_leaves_the_terminal_as_it_was(wired: Gateway, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    arguments = [sys.executable, "-m", "gateway", "top", "--every", "0.2", "--admin", wired.admin_url]
    process = subprocess.Popen(arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(), cwd=tmp_path)
    os.close(theirs)
    written = b""
    try:
        while written.count(b"\x1b[H") < 3:  # three looks
            ready, _, _ = select.select([ours], [], [], 60)
            assert ready, written
            written += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # EIO: whoever wrote is gone
            while part := os.read(ours, 65536):
                written += part
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert written.startswith(b"\x1b[?1049h\x1b[?25l")
    assert written.rstrip().endswith(b"\x1b[?25h\x1b[?1049l")
    assert b"ready" in written


def test_the_address_that_is_said_is_one_that_can_be_used(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    """Also where every address is listened on."""
    with gateway(tmp_path, scripted_sglang.backend(), PENSTOCK__LISTEN__ADMIN="0.0.0.0:0") as running:
        running.wait_ready()
        assert "0.0.0.0" not in running.output()
        assert command(running, "status", "--admin-key-file", str(Path(running.log.parent) / "none")).returncode == 1
        assert penstock("status", "--admin", f"http://127.0.0.1:{running.admin_port}", folder=tmp_path).returncode == 0
