"""The command line: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import environment


def penstock(*arguments: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway", *arguments], capture_output=True, text=True, cwd=folder, env=environment(**env), timeout=30
    )


def test_check_prints_every_value_with_its_origin_and_no_secret(tmp_path: Path) -> None:
    digest = "a" * 64
    (tmp_path / "p.yaml").write_text(f"keys: [{{name: x, hash: 'sha256:{digest}'}}]\nlisten: {{host: 0.0.0.0}}\n")
    done = penstock("check", "--all", "-c", "p.yaml", folder=tmp_path, PENSTOCK__LOG__LEVEL="debug")
    assert done.returncode == 0, done.stderr
    assert digest not in done.stdout
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert lines["listen.host"].endswith("file p.yaml:2")
    assert lines["log.level"].endswith("environment PENSTOCK__LOG__LEVEL")
    assert lines["listen.port"].endswith("default")
    assert "********" in lines["keys.0.hash"]
    assert "backends.dsv3.engine.dtype" in lines
    changed = penstock("check", "-c", "p.yaml", folder=tmp_path, PENSTOCK__LOG__LEVEL="debug").stdout.splitlines()
    assert {"listen.host", "log.level", "keys.0.hash"} <= {line.split()[0] for line in changed}
    assert not [line for line in changed if line.endswith("default")]
    assert [line for line in changed if line.endswith("more are left at their defaults (--all shows them)")]
    as_json = json.loads(penstock("check", "--json", folder=tmp_path).stdout)
    assert {"key": "listen.port", "value": 8000, "origin": "default"} in as_json["values"]


def test_check_says_which_host_does_not_answer(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("backends: {dsv3: {kind: sglang_dsv3, hosts: [{url: 'http://127.0.0.1:9'}]}}\n")
    done = penstock("check", "-c", "p.yaml", folder=tmp_path)
    assert done.returncode == 0
    assert "note: backends.dsv3: 127.0.0.1:9 does not answer" in done.stdout


@pytest.mark.parametrize("command", ["check", "serve"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lisen: {}", "lisen: unknown key; did you mean 'listen'?"),
        ("listen: {host: 0.0.0.0}", "listen.host: without keys the gateway serves on loopback only"),
        (
            "backends: {dsv3: {kind: sglang_dsv3, hosts: [{url: x}]}}",
            "p.yaml:1: backends.dsv3.hosts.0.url: 'x' is no URL; accepted: http://HOST:PORT",
        ),
    ],
)
def test_a_bad_configuration_does_not_start(tmp_path: Path, command: str, text: str, words: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    done = penstock(command, "-c", "p.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["check", "serve"])
def test_a_key_file_that_does_not_exist_is_refused_before_anything_starts(tmp_path: Path, command: str) -> None:
    (tmp_path / "p.yaml").write_text(
        "backends: {dsv3: {kind: sglang_dsv3, hosts: [{url: 'http://127.0.0.1:9'}], api_key_file: none.txt}}\n"
    )
    done = penstock(command, "-c", "p.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert "none.txt" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = penstock("serve", "--port", port, folder=tmp_path)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr


def test_a_missing_engine_is_said_in_the_answer_and_costs_no_crash(tmp_path: Path) -> None:
    """A home without the engine's environment: the gateway runs, and says what to do."""
    from tests.support import raw
    from tests.support.processes import gateway, until

    with gateway(tmp_path / "run", PENSTOCK_HOME=str(tmp_path)) as running:
        until("it is said", lambda: "run `penstock engine install`" in running.output())
        body = {"model": "deepseek-v3-tiny", "messages": [{"role": "user", "content": "Hello"}]}
        answer = raw.call(running.port, "POST", "/v1/chat/completions", json.dumps(body).encode())
        assert answer.status == 503
        assert "penstock engine install" in answer.error()["message"]


def test_a_strangers_package_of_the_same_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "middleware").mkdir()
    (tmp_path / "middleware" / "__init__.py").write_text("")
    done = penstock("check", folder=tmp_path)  # `-m` puts the current folder first
    assert done.returncode == 2
    assert "the package 'middleware' is" in done.stderr
