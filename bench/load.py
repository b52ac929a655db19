"""The loads of the bench, made by wrk, and what one of them costs a gateway in CPU time."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

from bench.peers import Peer, Upstream
from tests.support.processes import ROOT

PACED_TOKENS, PACED_GAP_S, PACED_STREAMS = 100, 0.02, 128
# What a gateway puts off until a request has gone (metrics, the log) is its cost all the same.
AFTERWARDS_S = 0.1


@dataclass(frozen=True)
class Kind:
    """One load: what it is called, what is counted, and how wrk makes it."""

    name: str
    title: str
    unit: str
    seconds: float
    connections: int
    stream: bool = False
    sentences: int = 20
    paced: bool = False


KINDS = (
    Kind("json", "JSON request, 0.5 kB prompt", "µs of CPU per request", 3, 32),
    Kind("json_200k", "JSON request, 200 kB prompt", "µs of CPU per request", 3, 8, sentences=7600),
    Kind("sse", "Stream of 32 events written at once", "µs of CPU per stream", 3, 32, stream=True),
    Kind(
        "event", f"Paced stream, {PACED_STREAMS} open, an event each {PACED_GAP_S * 1e3:.0f} ms", "µs of CPU per event", 8, PACED_STREAMS,
        stream=True, paced=True,
    ),
)  # fmt: skip
JSON = KINDS[0]


@dataclass(frozen=True)
class Cost:
    """Of one unit of a load: CPU time of the gateway in µs, in user mode and in the kernel; and which share of the time, in percent, the
    upstream was busy (near 100 it, and not the gateway, set the pace)."""

    user_us: float
    system_us: float
    upstream_busy: float

    @property
    def us(self) -> float:
        return self.user_us + self.system_us


@contextlib.contextmanager
def wrk(kind: Kind, port: int, seconds: float) -> Iterator[None]:
    """The load, until it ends. Raises RuntimeError when a request failed."""
    env = {**os.environ, "STREAM": str(int(kind.stream)), "PACED": str(int(kind.paced)), "SENTENCES": str(kind.sentences)}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    command = ["wrk", "-t1", f"-c{kind.connections}", f"-d{max(1, round(seconds))}s", "--timeout", "30s"]
    command += ["-s", str(ROOT / "bench" / "chat.lua"), url]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield
        out, _ = process.communicate(timeout=seconds + 60)
    finally:
        process.kill()
        process.wait()
    if process.returncode or "Non-2xx" in out or re.search(r"Socket errors: connect [1-9]|read [1-9]", out):
        raise RuntimeError(f"{' '.join(command)}:\n{out}")


def cost(kind: Kind, peer: Peer, upstream: Upstream, seconds: float) -> Cost:
    """Put the load on a gateway and read what it took. Of paced streams while all are open, without their beginning and their end."""
    if not kind.paced:
        with wrk(kind, peer.port, 1):  # warm
            pass
        before = _Reading(peer, upstream)
        with wrk(kind, peer.port, seconds):
            pass
        time.sleep(AFTERWARDS_S)
        return before.until(_Reading(peer, upstream), "requests")
    with wrk(kind, peer.port, seconds):
        time.sleep(seconds / 8)
        before = _Reading(peer, upstream)
        time.sleep(seconds * 3 / 4)
        return before.until(_Reading(peer, upstream), "events")


class _Reading:
    def __init__(self, peer: Peer, upstream: Upstream) -> None:
        self.at = time.monotonic()
        self.user_s, self.system_s = peer.cpu_s()
        self.upstream_s = upstream.cpu_s()
        self.counted = upstream.counted()

    def until(self, then: _Reading, unit: str) -> Cost:
        count = then.counted[unit] - self.counted[unit]
        if count <= 0:
            raise RuntimeError("the load never reached the upstream")
        busy = (then.upstream_s - self.upstream_s) / (then.at - self.at) * 100
        return Cost((then.user_s - self.user_s) * 1e6 / count, (then.system_s - self.system_s) * 1e6 / count, busy)
