"""How many CPU instructions of the gateway's worker a request takes, as pure Python and compiled: counted by valgrind, the kernel left out,
so that the numbers hold on any machine, however busy.

    .venv-compiled/bin/python -P -m bench.instructions      some minutes; needs valgrind; writes bench/results/instructions.json
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil

from bench.peers import PYTHONS, argv, free_port, machine, upstream
from tests.support.processes import environment, status, until

RESULT = Path(__file__).parent / "results" / "instructions.json"
EVENTS, COUNTED, IDLE_S = 32, 200, 10.0


class Counted:
    """A gateway whose worker's instructions are counted."""

    def __init__(self, folder: Path, port: int, worker: psutil.Process) -> None:
        self._folder, self._worker = folder, worker
        self._client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def _taken(self) -> int:
        """Since the last time that it was asked."""
        before = set(self._folder.iterdir())
        subprocess.run(["callgrind_control", "-d", str(self._worker.pid)], check=True, capture_output=True)
        pattern = f"out.{self._worker.pid}.*"
        (dump,) = until("the counts are there", lambda: [path for path in self._folder.glob(pattern) if path not in before])
        (total,) = until("they are whole", lambda: re.findall(r"^totals: (\d+)", dump.read_text(), re.MULTILINE))
        return int(total)

    def of(self, stream: bool) -> int:
        """Of one request, the average of many."""
        body = {"model": "deepseek-v3", "messages": [{"role": "user", "content": "Explain quantum computing. " * 20}], "max_tokens": 64}
        content = json.dumps({**body, "stream": True} if stream else body)
        idle = self._during(lambda: time.sleep(IDLE_S))
        for _ in range(2):  # the first time is for the caches
            whole = self._during(lambda: self._ask(content))
        return int((whole[0] - idle[0] / idle[1] * whole[1]) / COUNTED)

    def _during(self, work: Callable[[], object]) -> tuple[int, float]:
        """Instructions, and the seconds in which the worker also did what it does each second (reports, probes)."""
        self._taken()
        began = time.monotonic()
        work()
        return self._taken(), time.monotonic() - began

    def _ask(self, content: str) -> None:
        for _ in range(COUNTED):
            self._client.request("POST", "/v1/chat/completions", content, {"content-type": "application/json"})
            assert self._client.getresponse().read()


@contextlib.contextmanager
def counted(name: str, folder: Path, host: int) -> Iterator[Counted]:
    """The gateway `name` below valgrind."""
    port = free_port()
    valgrind = ["valgrind", "--tool=callgrind", "--trace-children=yes", f"--callgrind-out-file={folder}/out.%p"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*valgrind, *argv(name, host, port, folder)], stdout=log, stderr=log, env=environment(), cwd=folder)
    try:
        until("it is ready", lambda: status(f"http://127.0.0.1:{port}/readyz") == 200 or process.poll() is not None, 300, 0.5)
        (worker,) = psutil.Process(process.pid).children()
        yield Counted(folder, port, worker)
    finally:
        process.terminate()
        process.wait(60)


def main() -> None:
    """Count, print, write."""
    rows: dict[str, dict[str, int]] = {}
    for name in PYTHONS:
        with tempfile.TemporaryDirectory() as folder, upstream(EVENTS, 0.0) as host, counted(name, Path(folder), host) as worker:
            rows[name] = {"json": worker.of(False), f"stream_of_{EVENTS}": worker.of(True)}
        print(f"{name:16s}", "  ".join(f"{kind} {value / 1e3:.0f} k" for kind, value in rows[name].items()), flush=True)
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    found = {"date": date, "machine": machine(), "command": "python -m bench.instructions", "instructions": rows}
    RESULT.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
