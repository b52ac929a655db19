"""What the gateway costs, beside other gateways: in turn, medians, one table of ratios, one drawing, and the targets with met or not met.

    make bench [ARGS="--only cpu,latency --rounds 3 --litellm"]      writes bench/results/gateway.{json,md,svg}
    make bench-quick                                                 one round of a second each, to see that it runs; writes to state/bench

Parts: `cpu` (CPU time per request and per relayed event), `latency` (added at 200 requests a second), `memory` (idle and with 5,000 open
streams), `variants` (Redis, two workers), `start`. Figure of merit is CPU time the gateway spends, from the kernel's accounting while wrk
loads it: on shared machines requests per second swing by half from run to run, CPU per request by a sixth. Read the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import latency, report, soak, variants
from bench.load import KINDS, PACED_GAP_S, PACED_TOKENS, cost
from bench.peers import BARE, OURS, Peer, Scene, default_python, form, machine, running, upstream, versions
from tests.support.otlp import collector
from tests.support.processes import ROOT

PARTS = ("cpu", "latency", "memory", "variants", "start")


@dataclass(frozen=True)
class Plan:
    """How much is measured. `seconds`: of every load, where it is not its own."""

    rounds: int
    names: list[str]
    seconds: float | None = None
    streams: int = 5000
    stream_tokens: int = soak.STREAM_TOKENS
    starts: int = 5


def cpu(peers: dict[str, Peer], scene: Scene, plan: Plan) -> dict[str, Any]:
    """All rounds, gateways in turn."""
    taken: dict[str, dict[str, list[float]]] = {kind.name: {name: [] for name in peers} for kind in KINDS}
    kernel: dict[str, dict[str, list[float]]] = {kind.name: {name: [] for name in peers} for kind in KINDS}
    busy: dict[str, dict[str, float]] = {kind.name: dict.fromkeys(peers, 0.0) for kind in KINDS}
    idle = {name: peer.resident_mb() for name, peer in peers.items()}
    for number in range(plan.rounds):
        for kind in KINDS:
            for name, peer in peers.items():
                found = cost(kind, peer, scene.upstream, plan.seconds or kind.seconds)
                taken[kind.name][name].append(found.us)
                kernel[kind.name][name].append(found.system_us)
                busy[kind.name][name] = max(busy[kind.name][name], round(found.upstream_busy))
                print(
                    f"round {number + 1}  {kind.name:10s} {name:14s} {found.us:8.1f} {kind.unit}"
                    f" ({found.user_us:.1f} + {found.system_us:.1f} in the kernel; upstream {found.upstream_busy:.0f} % busy)",
                    flush=True,
                )
    return {
        "rounds": plan.rounds,
        "median": _each(taken, statistics.median),
        "median_in_kernel": _each(kernel, statistics.median),
        "spread": {
            kind: {name: [round(min(values), 1), round(max(values), 1)] for name, values in by.items()} for kind, by in taken.items()
        },
        "upstream_busy_percent": busy,
        "resident_mb": {name: [round(idle[name]), round(peer.resident_mb())] for name, peer in peers.items()},
    }


def _each(taken: dict[str, dict[str, list[float]]], of: Callable[[list[float]], float]) -> dict[str, dict[str, float]]:
    return {kind: {name: round(of(values), 1) for name, values in by.items()} for kind, by in taken.items()}


def memory(python: Path, plan: Plan) -> dict[str, Any]:
    """Of Penstock with everything on, started anew for each round."""
    found: list[soak.Open] = []
    for number in range(plan.rounds):
        found.append(soak.open_streams(python, plan.streams, plan.stream_tokens))
        seen = found[-1]
        if seen.whole < seen.streams:
            raise RuntimeError(f"{seen.streams - seen.whole} of {seen.streams} streams were not whole")
        print(f"round {number + 1}  idle {seen.before_mb:.0f} MB, {seen.streams:,d} streams {seen.resident_mb:.0f} MB", flush=True)
    return {
        "rounds": plan.rounds,
        "streams": plan.streams,
        "idle_mb": round(statistics.median(seen.before_mb for seen in found), 1),
        "idle_shared_mb": round(statistics.median(seen.before_shared_mb for seen in found), 1),
        "open_mb": round(statistics.median(seen.resident_mb for seen in found), 1),
        "open_shared_mb": round(statistics.median(seen.shared_mb for seen in found), 1),
        "each_kb": round(statistics.median(seen.each_kb for seen in found), 1),
    }


def measure(parts: list[str], python: Path, plan: Plan) -> dict[str, Any]:
    """The parts, one after the other."""
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        scene = Scene(stack.enter_context(upstream(PACED_TOKENS, PACED_GAP_S)), python, stack.enter_context(collector()).endpoint)
        if {"cpu", "latency"} & set(parts):
            with contextlib.ExitStack() as gateways:
                peers = {name: gateways.enter_context(running(name, scene, folder / name)) for name in plan.names}
                if "cpu" in parts:
                    found["cpu"] = cpu(peers, scene, plan)
                if "latency" in parts:
                    ports = {latency.DIRECT: scene.upstream.ports[0]}
                    # Litellm takes more CPU time for each request than there is at this rate.
                    ports |= {name: peer.port for name, peer in peers.items() if name != "litellm"}
                    found["latency"] = latency.measure(ports, plan.rounds, plan.seconds or latency.SECONDS)
        if "variants" in parts:
            found["variants"] = variants.measure(scene, plan.rounds, plan.seconds or KINDS[0].seconds)
    if "memory" in parts:
        found["memory"] = memory(python, plan)
    if "start" in parts:
        found["start"] = variants.start_s(python, plan.starts)
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return {name: {"date": date, **part} for name, part in found.items()}


def merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """With the parts that only an earlier run measured, if it was of the same Penstock beside the same peers on this machine."""
    same = all(before.get(name) == now[name] for name in ("machine", "penstock", "versions"))
    parts = {**(before["parts"] if same else {}), **now["parts"]}
    return {**now, "parts": {name: parts[name] for name in PARTS if name in parts}}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of the parts: {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of a second each; nothing to be published")
    parser.add_argument("--litellm", action="store_true", help="LiteLLM too (its environment is made by `make bench-litellm`)")
    parser.add_argument("--python", type=Path, default=default_python(), help="of the environment whose Penstock is measured")
    parser.add_argument("--results", type=Path, help="the folder to write to")
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; accepted: {', '.join(PARTS)}")
    names = [OURS, BARE, "nginx", "smg", "sglang-router", *(["litellm"] if options.litellm else [])]
    plan = Plan(1, names, 1.0, 500, 10, 1) if options.quick else Plan(options.rounds, names)
    folder = options.results or (ROOT / "state" / "bench" if options.quick else report.RESULTS)
    python = options.python.absolute()  # not resolved: an environment's python is a link
    head: dict[str, Any] = {"machine": machine(), "command": "make bench", "penstock": form(python), "versions": versions(names)}
    print(f"Penstock of {python}: {head['penstock']['form']}", flush=True)
    earlier = folder / "gateway.json"
    before = json.loads(earlier.read_text()) if earlier.exists() else {}
    result = merged(before, {**head, "parts": measure(parts, python, plan)})
    report.write(result, folder)
    print(report.table(result))
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
