"""SGLang's own words in a section: what its parser would refuse is refused first, by `penstock check` too where the gateway runs SGLang."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backends.sglang_dsv3.engine import arguments
from tests.support.processes import environment
from tests.unit.test_engine_section import RECORDED, installed


def wrong(*given: str) -> list[str]:
    return [f"{e.path}: {e.problem}" for e in arguments.problems(given, RECORDED.flags, RECORDED.takes, RECORDED.version)]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--dp-sise", "2"], "extra_args.0: SGLang 0.5.23 has no --dp-sise; did you mean '--dp-size'?"),
        (["--enable-metrics", "--zzz"], "extra_args.1: SGLang 0.5.23 has no --zzz"),
        (["--dp-size", "two"], "extra_args.0: --dp-size takes a whole number, not 'two'"),
        (["--dp-size=2.5"], "extra_args.0: --dp-size takes a whole number, not '2.5'"),
        (["--schedule-conservativeness", "high"], "extra_args.0: --schedule-conservativeness takes a number, not 'high'"),
        (["--dp-size"], "extra_args.0: --dp-size takes 1 value, and is given none"),
        (["--dp-size", "2", "3"], "extra_args.0: --dp-size takes 1 value, and is given 2"),
        (["--enable-metrics", "yes"], "extra_args.0: --enable-metrics takes no values, and is given 1"),
        (
            ["--load-balance-method", "roundrobin"],
            "one of: auto, round_robin, follow_bootstrap_room, total_requests, total_tokens; did you",
        ),
        (["--sampling-backend", "pytroch"], "did you mean 'pytorch'?"),
        (["2", "--enable-metrics"], "extra_args.0: '2' belongs to no flag"),
    ],
)
def test_what_sglang_would_refuse_is_one_line(given: list[str], words: str) -> None:
    (line,) = wrong(*given)
    assert words in line


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["--dp-size", "2", "--load-balance-method", "round_robin"],
        ["--dp-size=2", "--enable-metrics"],
        ["--schedule-conservativeness", "-0.5"],
        ["--kv-events-config", '{"publisher": "zmq", "endpoint": "tcp://*:5557"}'],
        ["--cuda-graph-bs-decode", "1", "2", "4"],
        ["--schedule-conserv", "0.5"],
    ],
)
def test_what_sglang_takes_is_taken(given: list[str]) -> None:
    assert wrong(*given) == []


def check(folder: Path, engine: dict[str, Any], home: Path, command: str = "check") -> subprocess.CompletedProcess[str]:
    backend = {"kind": "sglang_dsv3", "hosts": [{"launch": "local"}], "engine": engine}
    (folder / "penstock.yaml").write_text(json.dumps({"models": {"m": {"backend": "d"}}, "backends": {"d": backend}}))
    argv = [sys.executable, "-m", "gateway", command, "-c", "penstock.yaml"]
    return subprocess.run(argv, capture_output=True, text=True, cwd=folder, timeout=60, env=environment(PENSTOCK_HOME=str(home)))


@pytest.mark.parametrize("command", ["check", "serve"])
def test_an_engine_of_the_gateways_own_is_checked_before_it_starts(tmp_path: Path, command: str) -> None:
    home = installed(tmp_path / "home")
    done = check(tmp_path, {"tool_call_parser": "deepseek3", "extra_args": ["--dp-sise", "2"]}, home, command)
    assert done.returncode == 2, done.stdout
    first, second = done.stderr.splitlines()
    assert "backends.d.engine.tool_call_parser: 'deepseek3' is not known to SGLang 0.5.23" in first
    assert "did you mean 'deepseekv3'?" in first
    assert "backends.d.engine.extra_args.0: SGLang 0.5.23 has no --dp-sise; did you mean '--dp-size'?" in second


def test_what_is_right_is_served_and_without_sglang_the_form_alone_is_checked(tmp_path: Path) -> None:
    right = {"tool_call_parser": "deepseekv3", "extra_args": ["--dp-size", "2"]}
    done = check(tmp_path, right, installed(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    done = check(tmp_path, {"tool_call_parser": "deepseek3"}, tmp_path / "nothing")
    assert done.returncode == 0, done.stderr
