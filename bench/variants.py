"""What one setting changes in the CPU a request takes: limits in Redis in place of memory, two workers in place of one. And the start."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from bench.load import JSON, cost
from bench.peers import OURS, Scene, penstock, running
from tests.support import redis
from tests.support.processes import environment

NAMES = (OURS, "redis", "redis, 2 workers", "no limits", "no limits, 2 workers")
# A variant, what it is held against, and what that shows. Two workers share limits through Redis alone, so the like for like has none.
RATIOS = (
    ("redis", OURS, "limits in Redis / in memory"),
    ("no limits, 2 workers", "no limits", "2 workers / 1, without limits"),
    ("redis, 2 workers", "redis", "2 workers / 1, limits in Redis"),
)


def measure(scene: Scene, rounds: int, seconds: float) -> dict[str, Any]:
    """CPU of a JSON request, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in NAMES}
    redis_us: list[float] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(redis.server(folder / "server"))
        assert server.process is not None
        process = psutil.Process(server.process.pid)
        scene = replace(scene, redis=server.url)
        peers = {name: stack.enter_context(running(name, scene, folder / name.replace(", ", "-").replace(" ", "-"))) for name in NAMES}
        for number in range(rounds):
            for name, peer in peers.items():
                before, began = sum(process.cpu_times()[:2]), scene.upstream.counted()["requests"]
                found = cost(JSON, peer, scene.upstream, seconds)
                taken[name].append(found.us)
                if name == "redis":  # its second of warming up included
                    answered = scene.upstream.counted()["requests"] - began
                    redis_us.append((sum(process.cpu_times()[:2]) - before) * 1e6 / answered)
                print(f"round {number + 1}  {name:20s} {found.us:8.1f} {JSON.unit}", flush=True)
    return {
        "rounds": rounds,
        "median": {name: round(statistics.median(values), 1) for name, values in taken.items()},
        "spread": {name: [round(min(values), 1), round(max(values), 1)] for name, values in taken.items()},
        # Ratios of the same round, then their median.
        "ratio": {
            what: round(statistics.median(a / b for a, b in zip(taken[name], taken[base], strict=True)), 3) for name, base, what in RATIOS
        },
        "redis_server_us": round(statistics.median(redis_us), 1),
    }


def start_s(python: Path, times: int = 5) -> dict[str, Any]:
    """`penstock serve` without a local engine, from the command to `listening`; the median of so many."""
    took: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "penstock.yaml"
        tree = {
            "listen": {"port": 0, "admin": "off"}, "models": {"m": {"backend": "b"}}, "backends": {"b": {"kind": "scripted"}},
            "limits": {"ledger_file": f"{folder}/usage.json"},
        }  # fmt: skip
        config.write_text(yaml.safe_dump(tree))
        for _ in range(times):
            began = time.perf_counter()
            process = subprocess.Popen(
                [*penstock(python), "serve", "-c", str(config)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment(PYTHONSAFEPATH="1"),
                cwd=folder,
            )
            assert process.stdout is not None
            for line in process.stdout:
                if "listening on" in line:
                    took.append(time.perf_counter() - began)
                    break
            process.kill()
            process.stdout.close()
            process.wait()
    if len(took) < times:
        raise RuntimeError("the gateway did not start")
    return {"median_s": round(statistics.median(took), 2), "spread_s": [round(min(took), 2), round(max(took), 2)], "times": times}
