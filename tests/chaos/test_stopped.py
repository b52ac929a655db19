"""Processes that stand still without being gone (SIGSTOP), clocks that jump by an hour, and a disk that is full: serving goes on, and
when it is over everything is as before."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from gateway.access.keys import hashed
from tests.chaos.test_sick_redis import ask, is_back, metric, serving, used
from tests.support import raw, redis
from tests.support.processes import Gateway, Rehearsal, gateway, rehearsal, until

CHAT = "/v1/chat/completions"


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    process = psutil.Process(pid)
    process.send_signal(signal.SIGSTOP)
    try:
        until("it stands still", lambda: process.status() == psutil.STATUS_STOPPED)
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def test_a_redis_that_stands_still_is_no_redis_until_it_goes_on(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with redis.server(tmp_path / "redis") as store, serving(scripted_sglang, store.url, tmp_path) as running:
        assert ask(running).status == 200
        assert store.process is not None
        with stopped(store.process.pid):
            assert [ask(running).status for _ in range(5)] == [200] * 5, "no request fails for it"
            until("it is noticed", lambda: metric(running, "penstock_store_up") == 0)
            assert [ask(running).status for _ in range(5)] == [200] * 5
        is_back(running)
        until("what was counted meanwhile is written", lambda: used(running, "one") == 12)


def test_a_host_that_stands_still_is_left_for_another_and_is_back_when_it_goes_on(tmp_path: Path) -> None:
    with rehearsal() as one, rehearsal() as other:
        config = {
            "models": {"deepseek-v3": {"backend": "dsv3"}},
            "backends": {"dsv3": {"kind": "sglang_dsv3", "hosts": [{"url": one.url}, {"url": other.url}], "health": {"probe_s": 0.5}}},
            "timeouts": {"first_token_s": 1.0},
        }
        with gateway(tmp_path, config) as running:
            running.wait_all_hosts()
            with stopped(one.process.pid):
                for _ in range(8):  # of a JSON answer nobody can tell a slow engine from one that stands still (docs/failover.md)
                    answer = raw.call(running.port, "POST", CHAT, raw.chat("hi", stream=True))
                    assert answer.body.endswith(b"data: [DONE]\n\n")
                until("it is seen to be down", lambda: "ok" not in states(running, one))
                assert raw.call(running.port, "POST", CHAT, raw.chat("hi")).status == 200
            until("it is back", lambda: states(running, one) == ["ok"], 60, 0.2)
            assert [raw.call(running.port, "POST", CHAT, raw.chat("hi")).status for _ in range(8)] == [200] * 8


def states(running: Gateway, host: Rehearsal) -> list[str]:
    return [row["state"] for row in running.admin("/admin/hosts").json()["hosts"] if host.url.endswith(row["id"])]


def test_while_the_parent_stands_still_its_workers_serve_and_afterwards_it_knows_all(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with gateway(tmp_path, scripted_sglang.backend(), PENSTOCK_HOME=str(tmp_path)) as running:
        running.wait_ready()
        workers = running.workers()
        served = metric(running, "penstock_requests_total")
        with stopped(running.process.pid):
            for _ in range(20):
                assert raw.call(running.port, "POST", CHAT, raw.chat("hi")).status == 200
            answer = raw.call(running.port, "POST", CHAT, raw.chat("[[tokens 50]]", stream=True))
            assert answer.body.endswith(b"data: [DONE]\n\n")
        until("it has caught up", lambda: metric(running, "penstock_requests_total") >= served + 21)
        assert running.workers() == workers, "nobody was replaced"
        reloaded = running.admin("/admin/reload", "POST")
        assert reloaded.status == 200, reloaded.body


# Clocks


LIBRARY = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
HOUR = 3600


class Clock:
    """What the processes take for the time of day, in a file that libfaketime reads at every question; durations are true."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock"
        self.set(0)
        self.environment = {
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def set(self, by_s: int) -> None:
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{by_s:+d}")
        fresh.replace(self._file)


@pytest.mark.parametrize("by_s", [HOUR, -HOUR], ids=["forward", "back"])
def test_a_clock_that_jumps_by_an_hour_changes_what_has_a_date_and_nothing_else(
    by_s: int, scripted_sglang: Rehearsal, tmp_path: Path
) -> None:
    """Limits, leases, timeouts and probes go by a clock that nobody sets; keys expire by the date."""
    soon = (datetime.now(UTC) + timedelta(minutes=30)).strftime("%Y-%m-%dT%H:%M:%SZ")
    past = (datetime.now(UTC) - timedelta(minutes=30)).strftime("%Y-%m-%dT%H:%M:%SZ")
    keys = [
        {"name": "one", "hash": hashed("one"), "rpm": 60, "max_in_flight": 2},
        {"name": "soon", "hash": hashed("soon"), "expires": soon},
        {"name": "past", "hash": hashed("past"), "expires": past},
    ]
    clock = Clock(tmp_path)
    config = {**scripted_sglang.backend(), "keys": keys, "limits": {"burst_s": 5}}
    with gateway(tmp_path, config, (), "", PENSTOCK_HOME=str(tmp_path), **clock.environment) as running:
        running.wait_ready()
        family = running.workers()
        assert (ask(running, "soon").status, ask(running, "past").status) == (200, 401)
        statuses = [ask(running).status for _ in range(12)]
        assert 429 in statuses
        assert 200 in statuses
        with raw.connect(running.port) as peer:  # an answer that is under way meanwhile
            body = json.dumps(raw.chat("[[tokens 20]] [[pace 0.1]]", stream=True)).encode()
            peer.sendall(raw.request("POST", CHAT, body, {"authorization": "Bearer soon"}))
            assert peer.recv(1024).startswith(b"HTTP/1.1 200 ")
            clock.set(by_s)
            after = (401, 401) if by_s > 0 else (200, 200)
            until("the new time is seen", lambda: (ask(running, "soon").status, ask(running, "past").status) == after)
            rest = raw.rest(peer)
            assert b"[DONE]" in rest
        began = time.monotonic()
        admitted = sum(ask(running).status == 200 for _ in range(20))
        assert admitted <= 8 + (time.monotonic() - began), "no limit is renewed by it, and nobody waits an hour"
        until("what drained since is there", lambda: ask(running).status == 200, 20)
        lines = [line for line in running.requests() if line.get("key") == "one"]
        times = [datetime.fromisoformat(line["time"]) for line in (lines[0], lines[-1])]
        assert abs((times[1] - times[0]).total_seconds() - by_s) < 120, "the log says the time of day"
        assert all(0 <= line["ms"] < 60_000 for line in running.requests()), "durations are true"
        assert used(running, "one") > 0
        clock.set(0)
        until("and back", lambda: (ask(running, "soon").status, ask(running, "past").status) == (200, 401))
        until("limits hold as ever", lambda: ask(running).status == 200, 20)
        assert running.workers() == family
        assert "Traceback" not in running.output()


def test_a_clock_of_the_store_that_is_set_back_keeps_no_limit_full(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    clock = Clock(tmp_path)
    set_by = " ".join(f"{name}={value}" for name, value in clock.environment.items())
    binary = tmp_path / "redis-server"
    # Debian's does not start so: its jemalloc asks for the time before libfaketime is ready.
    binary.write_text(f'#!/bin/sh\nexec env {set_by} {redis.oldest()} "$@"\n')
    binary.chmod(0o755)
    keys = [{"name": "one", "hash": hashed("one"), "rpm": 60, "max_in_flight": 2}]
    with redis.server(tmp_path / "redis", str(binary)) as store:
        config = {
            **scripted_sglang.backend(),
            "keys": keys,
            "limits": {"burst_s": 5},
            "redis": {"url": store.url, "store_timeout_ms": 1000},
        }
        with gateway(tmp_path / "run", config) as running:
            running.wait_ready()

            def seen() -> object:
                return store.client().hget("penstock:{default}:clock", "last")

            for by_s in (-HOUR, HOUR, -2 * HOUR):  # what is ahead stays so; what was set forward by mistake is set right again
                assert 429 in [ask(running).status for _ in range(12)], "its bucket is full"
                clock.set(by_s)
                until("it has another time", lambda by_s=by_s: abs(store.client().time()[0] - time.time() - by_s) < 60)  # type: ignore[misc]
                before = seen()
                until("a heartbeat has seen it", lambda before=before: seen() != before)  # type: ignore[misc]
                until("and what drains meanwhile can be taken", lambda: ask(running).status == 200, 20, 0.2)
            began = time.monotonic()
            admitted = sum(ask(running).status == 200 for _ in range(20))
            assert admitted <= 8 + (time.monotonic() - began), "no limit is renewed by it"
            assert running.output().count("the store's clock was set back by 3") == 1, "an hour"
            assert metric(running, "penstock_store_up") == 1


# A full disk


def test_a_log_that_cannot_be_written_ends_nobody(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    full = tmp_path / "python"
    full.write_text(f'#!/bin/sh\nexec {sys.executable} "$@" 2>/dev/full\n')
    full.chmod(0o755)
    with gateway(tmp_path, scripted_sglang.backend(), python=str(full)) as running:
        running.wait_ready()
        workers = running.workers()
        assert [raw.call(running.port, "POST", CHAT, raw.chat("hi")).status for _ in range(50)] == [200] * 50
        assert raw.call(running.port, "POST", CHAT, b"nonsense").status == 400
        assert running.workers() == workers


def test_state_that_cannot_be_written_ends_nobody_and_is_written_when_it_can(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    """A file system of 64 kB of its own, filled up."""
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", str(state)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs to be allowed to mount")
    try:
        with gateway(tmp_path, scripted_sglang.backend(), PENSTOCK_HOME=str(tmp_path)) as running:
            running.wait_ready()
            until("the admin key is there", running.admin_key)
            filler = state / "filler"
            with contextlib.suppress(OSError), filler.open("wb") as out:
                while True:
                    out.write(b"x" * 4096)
                    out.flush()
            assert raw.call(running.port, "POST", CHAT, raw.chat("hi")).status == 200
            until("it is said", lambda: "the ledger cannot be written" in running.output(), 30)
            assert running.admin("/admin/reload", "POST").status == 200, "what cannot be audited in a file is in the log"
            assert raw.call(running.port, "POST", CHAT, raw.chat("hi")).status == 200
            filler.unlink()
            until("it is written", lambda: "the ledger can be written again" in running.output(), 30)
            assert running.output().count("the ledger cannot be written") == 1
            assert json.loads((state / "usage.json").read_text())
    finally:
        subprocess.run(["umount", str(state)], check=False)
