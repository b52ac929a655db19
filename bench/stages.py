"""The price list of a request by stage: where its instructions go, and its system calls.

    python -m bench.stages [--python PATH] [--modules]        two minutes; prints tables, and writes bench/results/stages.{json,md}
    make bench-stages                                         the same for the compiled form, of a wheel built to be counted

Instructions are counted by valgrind's callgrind while the whole gateway, with everything on, plays exchanges in one event loop without
sockets (tests/support/memory_net.py): the same on a quiet machine and on a busy one, to half a percent. A stage has what its own modules
execute and what they call in C (bench/marks.c); what the standard library does is its caller's. The event loop is asyncio's, which is
dearer than the uvloop that serves. System calls are counted by strace at a worker under load; the time they take is `median_in_kernel` in
what `bench.gateway` writes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from bench.load import KINDS, wrk
from bench.peers import OURS, Scene, form, machine, running, upstream
from bench.played import BURST, EVENTS, HARNESS
from tests.support.otlp import collector
from tests.support.processes import ROOT, command, environment, until

RESULTS = ROOT / "bench" / "results"
COLUMNS = {"json": "JSON request", "stream": f"stream of {BURST} at once", "event": "paced event"}
# A stage by the beginning of its modules' names; the longest that fits. What is in none has its own name, so that nothing is hidden.
LOOP_MODULE, LOOP = "asyncio", "event loop"
STAGES = {
    LOOP_MODULE: LOOP,
    "uvicorn": "server: connection and cycle",
    "gateway.processes": "server: connection and cycle",
    "gateway.lifecycle": "server: connection and cycle",
    "litestar": "routing",
    "gateway.routes": "routing",
    "gateway.app": "routing",
    "middleware.request_id": "middleware: request id",
    "middleware.errors": "middleware: errors",
    "middleware.cors": "middleware: CORS",
    "middleware.auth": "middleware: auth",
    "gateway.access.keys": "middleware: auth",
    "middleware.rate_limit": "admission and settlement",
    "gateway.access.limits": "admission and settlement",
    "gateway.access.ledger": "ledger",
    "gateway.wire.body": "read and parse",
    "gateway.wire.requests": "read and parse",
    "gateway.wire.invalid": "read and parse",
    "gateway.wire.fields": "read and parse",
    "gateway.serving.calls": "read and parse",
    "gateway.exchange": "the path between them",
    "gateway.wire.asgi": "the path between them",
    "gateway.plugin": "the path between them",
    "gateway.serving.registry": "the path between them",
    "gateway.serving.dispatch": "attempts",
    "gateway.serving.pool": "pool and balance",
    "gateway.serving.affinity": "pool and balance",
    "gateway.serving.balance": "pool and balance",
    "gateway.serving.hostview": "pool and balance",
    "gateway.serving.watch": "watching the client",
    "gateway.serving.relay": "relay",
    "gateway.serving.kept": "relay",
    "backends.sglang_dsv3.transport": "transport to the host",
    "backends.sglang_dsv3.host": "transport to the host",
    "backends": "backend: translation and events",
    "gateway.wire.sse": "backend: translation and events",
    "gateway.telemetry.record": "record",
    "gateway.wire.trace": "record",
    "gateway.telemetry.observe": "record",
    "gateway.telemetry.ring": "record kept",
    "gateway.telemetry.metrics": "metrics",
    "gateway.telemetry.tracer": "traces (not sampled)",
    "gateway.telemetry.log": "log line",
    "gateway.telemetry.lines": "log line",
    "gateway.telemetry.stderr": "log line",
    "gateway.wire.visible": "log line",
}
# What is less than this is in the sum, and has no row.
LEAST = 150


def stage(module: str) -> str:
    """What a module's instructions are counted to."""
    fitting = max((name for name in STAGES if module == name or module.startswith(f"{name}.")), key=len, default="")
    return STAGES.get(fitting, module)


def library(folder: Path, python: Path) -> Path:
    """bench/marks.c, built for an environment's Python. Raises RuntimeError."""
    include = _ask(python, "import sysconfig; print(sysconfig.get_paths()['include'])")
    out = folder / "marks.so"
    compiler = sysconfig.get_config_var("CC") or "cc"
    argv = [*compiler.split(), "-O2", "-w", "-shared", "-fPIC", f"-I{include}", str(ROOT / "bench" / "marks.c"), "-o", str(out), "-ldl"]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"needs gcc, python3-dev and valgrind (scripts/apt.sh bench):\n{done.stderr[-2000:]}")
    return out


def _ask(python: Path, what: str) -> str:
    return subprocess.run([str(python), "-P", "-c", what], capture_output=True, text=True, check=True, cwd="/").stdout.strip()


def places(python: Path) -> tuple[list[str], dict[str, str], bool]:
    """Of an environment: the folders whose modules are told apart, its compiled modules by the name that mypyc's symbols give them, and
    whether those were built to be counted."""
    ask = (
        "import gateway, litestar, json; from pathlib import Path; home = Path(gateway.__file__).parent.parent;"
        "made = [str(path.relative_to(home)) for top in ('gateway', 'middleware', 'backends') for path in (home / top).rglob('*.so')];"
        "groups = [str(path) for path in home.glob('*__mypyc*.so')];"
        "print(json.dumps([str(home), str(Path(litestar.__file__).parent.parent), made, groups]))"
    )
    home, packages, made, groups = json.loads(_ask(python, ask))
    modules = [path.split(".")[0].replace("/", ".") for path in made]
    suffixes: dict[str, str] = {}
    for module in modules:  # mypyc names a module by as much of its end as tells it apart; every length is known here
        parts = module.split(".")
        for length in range(len(parts)):
            suffixes.setdefault("___".join(parts[length:]), module)
    counted = any(b"__cyg_profile_func_enter" in Path(path).read_bytes() for path in groups)
    return sorted({f"{home}/", f"{packages}/"}, key=len, reverse=True), suffixes, counted


def instructions(python: Path) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """By kind and module, for one request or event; and all of each kind, without the price of telling apart. Raises RuntimeError."""
    roots, compiled, counted = places(python)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        built = library(folder, python)
        spec = {"library": str(built), "roots": roots, "compiled": compiled if counted else {}, "folder": name}
        start = f"import sys; sys.path.append({str(ROOT)!r}); from bench import played; played.main()"
        argv = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--collect-atstart=no", f"--callgrind-out-file={folder}/out"]
        env = environment(PYTHONHASHSEED="0", PYTHONDONTWRITEBYTECODE="1", **({"LD_PRELOAD": str(built)} if counted else {}))
        done = subprocess.run(
            [*argv, str(python), "-P", "-c", start, json.dumps(spec)], cwd=folder, env=env, capture_output=True, text=True, timeout=1800
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        batches: dict[str, int] = json.loads(done.stdout.splitlines()[-1])["batch"]
        taken: dict[str, dict[str, float]] = defaultdict(dict)
        for path in folder.glob("out.*"):
            text = path.read_text()
            found = re.search(r"^desc: Trigger: Client Request: (\w+):(\S*)$", text, re.MULTILINE)
            totals = re.search(r"^(?:totals|summary): (\d+)$", text, re.MULTILINE)
            if found and totals and found[1] in batches:
                taken[found[1]][found[2]] = int(totals[1]) / batches[found[1]]
    span = EVENTS["many"] - EVENTS["few"]
    taken["event"] = {module: (count - taken["few"].get(module, 0.0)) / span for module, count in taken["many"].items()}
    told = {kind: {module: count for module, count in taken[kind].items() if module not in ("", HARNESS)} for kind in COLUMNS}
    every = {kind: taken[kind][""] - taken[kind][HARNESS] for kind in COLUMNS}
    for kind, count in every.items():
        if not 0.9 < sum(told[kind].values()) / count < 1.5:
            raise RuntimeError(f"{kind}: the stages come to {sum(told[kind].values()):,.0f} instructions, and all of it is {count:,.0f}")
    return told, every


def by_stage(by_module: dict[str, float]) -> dict[str, float]:
    """The sum of its modules for each stage."""
    found: dict[str, float] = defaultdict(float)
    for module, count in by_module.items():
        found[stage(module)] += count
    return found


def system_calls(python: Path) -> dict[str, dict[str, float]]:
    """Of one request (of one stream, of one event), by kind and name, at a worker under load, as strace counts them."""
    found: dict[str, dict[str, float]] = {}
    with contextlib.ExitStack() as stack:
        folder, sink = Path(stack.enter_context(tempfile.TemporaryDirectory())), stack.enter_context(collector())
        above = stack.enter_context(upstream(100, 0.02))
        peer = stack.enter_context(running(OURS, Scene(above, python, sink.endpoint), folder / OURS))
        (worker,) = [child for child in psutil.Process(peer.pid).children() if "gateway.processes.worker" in command(child)]
        for kind in (each for each in KINDS if each.name != "json_200k"):
            out = folder / kind.name
            with wrk(kind, peer.port, 4):
                tracer = subprocess.Popen(["strace", "-qq", "-f", "-c", "-o", str(out), "-p", str(worker.pid)], stderr=subprocess.PIPE)
                try:
                    until("strace is attached", lambda: _traced(worker.pid), 5)
                    before = above.counted()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        tracer.wait(1.5)
                    counted = {name: count - before[name] for name, count in above.counted().items()}
                finally:
                    tracer.send_signal(signal.SIGINT)
                    said = tracer.communicate(timeout=10)[1].decode()
            if not out.exists():
                raise RuntimeError(f"strace: {said}")
            rows = re.findall(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", out.read_text(), re.MULTILINE)
            unit = counted["events" if kind.paced else "requests"]
            found[kind.name] = {name: round(int(count) / unit, 2) for count, name in rows if name != "total" and int(count) / unit >= 0.01}
    return found


def _traced(pid: int) -> bool:
    return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()


def table(result: dict[str, Any], modules: bool) -> str:
    """Thousands of instructions, the dearest first; the event loop apart."""
    per: dict[str, dict[str, float]] = {kind: by if modules else by_stage(by) for kind, by in result["instructions"].items()}
    loop = {kind: by.pop(LOOP_MODULE if modules else LOOP, 0.0) for kind, by in per.items()}
    sums = {kind: sum(by.values()) for kind, by in per.items()}
    names = sorted({name for by in per.values() for name in by}, key=lambda name: -per["json"].get(name, 0.0))

    def row(name: str, of: dict[str, float], share: bool = True) -> str:
        cells = [f"{of[kind] / 1e3:,.1f}" + (f" ({of[kind] / sums[kind]:.0%})" if share else "") for kind in COLUMNS]
        return f"| {name} | " + " | ".join(cell if of[kind] >= LEAST else "" for kind, cell in zip(COLUMNS, cells, strict=True)) + " |"

    lines = [f"| thousands of instructions | {' | '.join(COLUMNS.values())} |", "|---|---|---|---|"]
    shown = [name for name in names if any(by.get(name, 0.0) >= LEAST for by in per.values())]
    lines += [row(name, {kind: per[kind].get(name, 0.0) for kind in COLUMNS}) for name in shown]
    lines += [row("**all of these**", sums, False), row("asyncio's event loop, in place of uvloop", loop, False)]
    lines.append(row("both, counted without telling stages apart", result["all"], False))
    if calls := result.get("system_calls"):
        known = sorted({name for by in calls.values() for name in by}, key=lambda name: -calls["json"].get(name, 0.0))
        lines += ["", "| system calls | a JSON request | a stream of 32 at once | a paced event |", "|---|---|---|---|"]
        lines += [f"| {name} | " + " | ".join(f"{by[name]:.2f}" if name in by else "" for by in calls.values()) + " |" for name in known]
    ours = result["penstock"]
    lines += [
        "",
        f"{result['date']}, {result['machine']}; `{result['command']}`. Penstock {ours['version']} ({ours['commit']}), {ours['form']}.",
    ]
    if result["told_apart"] is False:
        lines.append("Its compiled modules are counted to whoever calls them: `make bench-stages` measures a wheel that tells them apart.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="of the environment whose Penstock is counted")
    parser.add_argument("--modules", action="store_true", help="a row for each module")
    parser.add_argument("--no-system-calls", action="store_true", help="leave strace out")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder to write to")
    options = parser.parse_args()
    python = options.python.absolute()
    by_module, totals = instructions(python)
    which = form(python)
    told_apart = which["form"] == "pure Python" or places(python)[2]
    result = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "machine": machine(), "penstock": which, "told_apart": told_apart,
        "command": "make bench-stages" if told_apart and which["form"] == "compiled" else "python -m bench.stages",
        "instructions": {kind: {module: round(count) for module, count in sorted(by.items())} for kind, by in by_module.items()},
        "all": {kind: round(count) for kind, count in totals.items()},
    }  # fmt: skip
    if not options.no_system_calls:
        result["system_calls"] = system_calls(python)
    print(table(result, options.modules))
    name = f"stages-{'pure' if which['form'] == 'pure Python' else 'compiled'}"
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.results / f"{name}.md").write_text(table(result, modules=False))


if __name__ == "__main__":
    main()
