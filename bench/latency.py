"""Added latency at a fixed rate: through each gateway minus straight to the upstream, in turn, by the client of `bench.client`."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Any

from tests.support.processes import ROOT

RATE, CONNECTIONS, SECONDS = 200, (1, 32), 5.0
DIRECT = "direct"


def seen(port: int, connections: int, seconds: float) -> dict[str, float]:
    """What the client sees, in µs; it is a process of its own."""
    command = [sys.executable, "-m", "bench.client", str(port), str(RATE), str(seconds), str(connections)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(ports: dict[str, int], rounds: int, seconds: float) -> dict[str, Any]:
    """`ports` of gateways and of `direct`. Medians over the rounds of each round's difference."""
    taken: dict[str, dict[str, list[dict[str, float]]]] = {str(count): {name: [] for name in ports} for count in CONNECTIONS}
    for number in range(rounds):
        for count in CONNECTIONS:
            for name, port in ports.items():
                found = seen(port, count, seconds)
                taken[str(count)][name].append(found)
                print(f"round {number + 1}  c={count:<3d} {name:14s} p50 {found['p50']:8.0f} µs  p99 {found['p99']:8.0f} µs", flush=True)

    def median(count: str, name: str, what: str) -> float:
        return round(statistics.median(each[what] for each in taken[count][name]), 1)

    def added(count: str, name: str, what: str) -> float:
        pairs = zip(taken[count][name], taken[count][DIRECT], strict=True)
        return round(statistics.median(through[what] - straight[what] for through, straight in pairs), 1)

    return {
        "rate": RATE,
        "seconds": seconds,
        "rounds": rounds,
        "added_us": {
            count: {name: {what: added(count, name, what) for what in ("p50", "p99")} for name in ports if name != DIRECT}
            for count in taken
        },
        # Straight to the upstream: its latency, how late the client sent, and what the client itself takes.
        "direct_us": {
            count: {what: median(count, DIRECT, what) for what in ("p50", "p99", "late_p50", "late_p99", "client_cpu")} for count in taken
        },
    }
