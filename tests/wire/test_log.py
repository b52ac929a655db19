"""The log of a real gateway: what a client saw go wrong is an error with its cause, what nobody noticed is for information, and a host that
goes down is one warning, whatever the number of workers."""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gateway.access.keys import hashed
from tests.support import raw, redis
from tests.support.processes import Gateway, Rehearsal, gateway, rehearsal, until
from tests.support.redis import Server

CHAT = "/v1/chat/completions"
KEY = {"authorization": "Bearer research"}


def configuration(*hosts: str, **more: Any) -> dict[str, Any]:
    return {
        "models": {"deepseek-v3": {"backend": "d"}},
        "backends": {"d": {"kind": "sglang_dsv3", "hosts": [{"url": url} for url in hosts], "health": {"slow_start_s": 0, "probe_s": 0.2}}},
        "keys": [{"name": "research", "hash": hashed("research")}],
        **more,
    }


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Server]:
    with redis.server(tmp_path / "redis") as running:
        yield running


def lines(running: Gateway, **fields: Any) -> list[dict[str, Any]]:
    """The JSON lines that have these fields."""
    found = [json.loads(line) for line in running.output().splitlines() if line.startswith("{")]
    return [line for line in found if fields.items() <= line.items()]


def ask(running: Gateway, prompt: str = "hi", **more: Any) -> raw.Answer:
    return raw.call(running.port, "POST", CHAT, raw.chat(prompt, **more), KEY)


def test_a_host_that_dies_under_streams_is_one_warning_with_cause_and_consequence(store: Server, tmp_path: Path) -> None:
    with rehearsal() as well, rehearsal() as dying:
        config = configuration(well.url, dying.url, redis={"url": store.url}, listen={"workers": 2})
        with gateway(tmp_path / "run", config) as running, ThreadPoolExecutor(40) as clients:
            running.wait_all_hosts()
            name = dying.url.removeprefix("http://")
            streams = [clients.submit(ask, running, "[[tokens 60]] [[pace 0.05]]", stream=True) for _ in range(40)]
            until("each host streams", lambda: min(host.seen()["events_sent"] for host in (well, dying)) > 8)
            until("all are open", lambda: well.seen()["open"] + dying.seen()["open"] == 40)
            there = dying.seen()["open"]
            dying.process.kill()
            assert all(b"data: [DONE]" in stream.result().body for stream in streams)
            said = until("it is said", lambda: lines(running, logger="penstock.hosts"), 30)
            (warning,) = said
            assert warning["level"] == "warning"
            assert (
                warning["message"] == f"host {name} is down: Connection refused; {there} stream{'s' * (there > 1)} moved, 1 of 2 hosts left"
            )
            assert (warning["host"], warning["cause"]) == (name, "Connection refused")
            # Nobody has noticed: no line is a warning or worse, and each that is about a request has its fields.
            assert [line for line in lines(running) if line["level"] != "info" and line["logger"] != "penstock.store"] == [warning]
            moved = lines(running, logger="penstock.relay")
            assert len(moved) == there
            for line in moved:
                assert line.keys() >= {"request_id", "host", "cause", "key", "model"}
                assert line["message"].count(name) == 1, "where it has gone and where from, each once"
                assert line["host"] == well.url.removeprefix("http://")
            until("all are logged", lambda: sum(line.get("continuations", 0) for line in running.requests()) == there)
            with rehearsal(int(name.rpartition(":")[2])):
                number = itertools.count()

                def news() -> list[dict[str, Any]]:
                    # A worker that lost many streams at once has ejected the host: it is back when a request there has gone well, which
                    # is one that nothing binds to another host's cache.
                    assert ask(running, f"hi {next(number)}").status == 200
                    return [line for line in lines(running, logger="penstock.hosts") if line["level"] == "info"]

                back = until("it is back", news, 30)[0]
                assert (back["level"], back["host"]) == ("info", name)
                assert back["message"].startswith(f"host {name} is back after ")
                assert back["message"].endswith("; 2 of 2 hosts take requests")


def test_what_a_client_saw_go_wrong_is_an_error_with_its_cause(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        refusing = f"127.0.0.1:{nobody.getsockname()[1]}"
    config = configuration(scripted_sglang.url)
    config["models"]["nobody"] = {"backend": "n"}
    config["backends"]["n"] = {"kind": "sglang_dsv3", "hosts": [{"url": f"http://{refusing}"}]}
    with gateway(tmp_path, config) as running:
        until("the host answers", lambda: ask(running).status == 200)
        until("it is logged", running.requests)
        for prompt, more, level, outcome, cause in (
            ("hi", {}, "info", "ok", None),
            ("[[refuse 500]]", {}, "error", "engine_error", "the engine answered 500"),
            ("[[cut 3]]", {"stream": True}, "error", "cut", "cut: "),
            ("[[refuse 400]]", {}, "info", "refused", None),
            ("hi", {"model": "nobody"}, "error", "unavailable", f"{refusing}: Connection refused"),
        ):
            before = len(running.requests())
            ask(running, prompt, **more)
            line = until("it is logged", lambda before=before: running.requests()[before:])[0]  # type: ignore[misc]
            assert (line["level"], line["outcome"], line["key"]) == (level, outcome, "research")
            assert line.get("cause", "").find(cause or "") >= 0, line
            assert ("cause" in line) == (cause is not None)
        assert raw.call(running.port, "GET", "/livez").status == 200
        assert raw.call(running.port, "GET", "/v1/models", headers=KEY).status == 200
        until("what came after the probes is logged", lambda: [line for line in running.requests() if "/v1/models" in line["message"]])
        assert not [line for line in running.requests() if "/livez" in line["message"] or "/readyz" in line["message"]]


def test_whoever_looks_for_faults_sees_probes_and_whoever_wants_no_requests_still_sees_what_failed(
    scripted_sglang: Rehearsal, tmp_path: Path
) -> None:
    with gateway(tmp_path / "1", configuration(scripted_sglang.url, log={"level": "debug"})) as running:
        running.wait_ready()
        assert until("probes are logged", lambda: [line for line in running.requests() if "GET /readyz 200" in line["message"]])
    with gateway(tmp_path / "2", configuration(scripted_sglang.url, log={"requests": False})) as running:
        running.wait_ready()
        ask(running)
        ask(running, "[[refuse 500]]")
        (line,) = until("it is logged", running.requests)
        assert (line["level"], line["outcome"], line["key"], line["model"]) == ("error", "engine_error", "research", "deepseek-v3")
        assert "the engine answered 500" in line["cause"]


def test_a_readable_line_has_the_same(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with gateway(tmp_path, configuration(scripted_sglang.url, log={"format": "text"})) as running:
        running.wait_ready()
        host = scripted_sglang.url.removeprefix("http://")

        def line(part: str) -> str:
            return until(part, lambda: next((line for line in running.output().splitlines() if f"POST {CHAT} {part}" in line), ""))

        ask(running, stream=True)
        found = line("200")
        assert found.split()[1] == "I"
        assert f" key=research model=deepseek-v3 host={host} first=" in found
        ask(running, "[[refuse 500]]")
        failed = line("502")
        assert failed.split()[1] == "E"
        assert " cause=the engine answered 500" in failed
        attempt = next(line for line in running.output().splitlines() if " I attempt 1 of req_" in line)
        assert attempt.endswith(" key=research model=deepseek-v3")
