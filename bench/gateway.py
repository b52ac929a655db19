"""CPU time per request and per relayed event, beside other gateways: in turn, medians, one table of ratios and one drawing.

    make bench [ARGS="--rounds 3 --litellm"]      writes bench/results/gateway.{json,md,svg}

Figure of merit is CPU time the gateway spends, from the kernel's accounting while wrk loads it: on shared machines requests per second
swing by half from run to run, CPU per request by a sixth. Read the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.peers import PYTHONS, Peer, machine, running, upstream
from tests.support.processes import ROOT

RESULTS = Path(__file__).parent / "results"
PACED_TOKENS, PACED_GAP_S, PACED_STREAMS = 100, 0.02, 128


@dataclass(frozen=True)
class Kind:
    """One load: what it is called, what is counted, and how wrk makes it."""

    name: str
    title: str
    unit: str
    seconds: int
    connections: int
    stream: bool = False
    sentences: int = 20
    paced: bool = False
    per_request: int = 1


KINDS = (
    Kind("json", "JSON request, 0.5 kB prompt", "µs of CPU per request", 3, 32),
    Kind("json_200k", "JSON request, 200 kB prompt", "µs of CPU per request", 3, 8, sentences=7600),
    Kind("sse", "Stream of 32 events written at once", "µs of CPU per stream", 3, 32, stream=True),
    # Events of a paced stream: its tokens, and the finish that comes with [DONE].
    Kind(
        "event", f"Paced stream, {PACED_STREAMS} open, an event each {PACED_GAP_S * 1e3:.0f} ms", "µs of CPU per event", 8, PACED_STREAMS,
        stream=True, paced=True, per_request=PACED_TOKENS + 2,
    ),
)  # fmt: skip


def load(kind: Kind, port: int, seconds: int) -> int:
    """Run wrk; how many requests were answered. Raises RuntimeError when any failed."""
    env = {**os.environ, "STREAM": "1" if kind.stream else "0", "SENTENCES": str(kind.sentences)}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    command = ["wrk", "-t1", f"-c{kind.connections}", f"-d{seconds}s", "--timeout", "30s", "-s", str(ROOT / "bench" / "chat.lua"), url]
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in out or re.search(r"Socket errors: connect [1-9]|read [1-9]", out):
        raise RuntimeError(out)
    found = re.search(r"(\d+) requests in", out)
    assert found is not None, out
    return int(found[1])


def one(kind: Kind, peer: Peer) -> float:
    """Microseconds of the gateway's CPU for one unit of the load."""
    if not kind.paced:
        load(kind, peer.port, 1)  # warm
    before = peer.cpu_s()
    count = load(kind, peer.port, kind.seconds)
    return (peer.cpu_s() - before) * 1e6 / (count * kind.per_request)


def measure(names: list[str], rounds: int) -> dict[str, Any]:
    """All rounds, gateways in turn."""
    taken: dict[str, dict[str, list[float]]] = {kind.name: {name: [] for name in names} for kind in KINDS}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ports = {False: stack.enter_context(upstream(32, 0.0)), True: stack.enter_context(upstream(PACED_TOKENS, PACED_GAP_S))}
        peers = {
            (name, paced): stack.enter_context(running(name, port, folder / f"{name}-{paced}"))
            for name in names
            for paced, port in ports.items()
        }
        idle = {name: peers[name, True].resident_mb() for name in names}
        for number in range(rounds):
            for kind in KINDS:
                for name in names:
                    found = one(kind, peers[name, kind.paced])
                    taken[kind.name][name].append(found)
                    print(f"round {number + 1}  {kind.name:10s} {name:14s} {found:8.1f} {kind.unit}", flush=True)
        resident = {name: peers[name, True].resident_mb() for name in names}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "command": "make bench",
        "rounds": rounds,
        "median": {kind: {name: round(statistics.median(values), 1) for name, values in by.items()} for kind, by in taken.items()},
        "spread": {
            kind: {name: [round(min(values), 1), round(max(values), 1)] for name, values in by.items()} for kind, by in taken.items()
        },
        "resident_mb": {name: [round(idle[name]), round(resident[name])] for name in names},
        "start_s": start_s(),
    }


def start_s() -> float:
    """`penstock serve` without a local engine, from the command to `listening`; the median of five."""
    took: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "penstock.yaml"
        config.write_text("listen: {port: 0, admin: 'off'}\nmodels: {m: {backend: b}}\nbackends: {b: {kind: scripted}}\n")
        for _ in range(5):
            began = time.perf_counter()
            command = [str(PYTHONS["penstock"]), "-P", "-m", "gateway", "serve", "-c", str(config)]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
            )
            assert process.stdout is not None
            for line in process.stdout:
                if "listening on" in line:
                    took.append(time.perf_counter() - began)
                    break
            process.kill()
            process.stdout.close()
            process.wait()
    return round(statistics.median(took), 2)


def table(result: dict[str, Any]) -> str:
    """Markdown: the medians, and in brackets how many times Penstock's."""
    names = list(result["resident_mb"])
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for kind in KINDS:
        row = result["median"][kind.name]
        cells = [
            f"{row[name]:.0f} ({row[name] / row['penstock']:.2f}×)" if name != "penstock" else f"**{row[name]:.0f}**" for name in names
        ]
        lines.append(f"| {kind.title}: {kind.unit} | " + " | ".join(cells) + " |")
    memory = [f"{result['resident_mb'][name][1]}" for name in names]
    lines.append("| Resident memory after all of it, MB | " + " | ".join(memory) + " |")
    where = f"{result['date']}, {result['machine']}; `{result['command']}`"
    foot = f"{where}, medians of {result['rounds']} rounds in turn, one worker each, bare."
    start = f"`penstock serve` without a local engine listens {result['start_s']:.2f} s after it was started."
    return "\n".join([*lines, "", foot, start]) + "\n"


def draw(result: dict[str, Any]) -> str:
    """One panel a load, one bar a gateway."""
    names = list(result["resident_mb"])
    row, panel = 24, 34 + 24 * len(names)
    height = 40 + panel * len(KINDS) + 20
    parts = ['<text x="10" y="24" font-size="16" font-weight="bold">CPU a gateway spends (less is better)</text>']
    for index, kind in enumerate(KINDS):
        top = 44 + index * panel
        values = result["median"][kind.name]
        scale = 380 / max(values.values())
        parts.append(f'<text x="10" y="{top + 12}" font-weight="bold">{kind.title}</text>')
        for place, name in enumerate(names):
            y = top + 20 + place * row
            width = max(values[name] * scale, 1)
            color = "#2a7de1" if name == "penstock" else "#b8c4d0"
            parts.append(f'<text x="10" y="{y + 14}">{name}</text>')
            parts.append(f'<rect x="120" y="{y}" width="{width:.0f}" height="18" rx="2" fill="{color}"/>')
            parts.append(f'<text x="{126 + width:.0f}" y="{y + 14}">{values[name]:.0f} {kind.unit.split(" ")[0]}</text>')
    foot = f"{result['date']}, {result['machine']}; make bench, medians of {result['rounds']}"
    parts.append(f'<text x="10" y="{height - 10}" font-size="10" fill="#555">{foot}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {height}" font-family="sans-serif" font-size="13">'
    return f'{head}<rect width="640" height="{height}" fill="white"/>{"".join(parts)}</svg>\n'


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--litellm", action="store_true", help="LiteLLM too (its environment is made by `make bench-litellm`)")
    options = parser.parse_args()
    names = ["penstock", "penstock-pure", "nginx", "smg", "sglang-router", *(["litellm"] if options.litellm else [])]
    result = measure(names, options.rounds)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gateway.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "gateway.md").write_text(table(result))
    (RESULTS / "gateway.svg").write_text(draw(result))
    print(table(result))
    print(f"drawn in {RESULTS / 'gateway.svg'}")


if __name__ == "__main__":
    main()
