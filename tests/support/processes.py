"""Real processes for tests: the gateway as an operator starts it, the scripted SGLang server, and who is left when they end."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil
import yaml

from tests.support import raw

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "data" / "sse"
T = TypeVar("T")


def until(what: str, probe: Callable[[], T], timeout_s: float = 20.0, every_s: float = 0.02) -> T:
    """Wait until `probe()` is true and return it; a bound, never a duration that a test relies on."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = probe()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what} (last: {found!r})")
        time.sleep(every_s)


def environment(**more: str) -> dict[str, str]:
    """A clean one: none of the developer's own PENSTOCK settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PENSTOCK", "OPENAI"))}
    # Any free port for the admin API, and nobody in front who would have to take notice of a stop.
    ours = {"PENSTOCK_HOME": str(ROOT), "PENSTOCK__LISTEN__ADMIN": "127.0.0.1:0", "PENSTOCK__TIMEOUTS__GRACE_S": "0"}
    return {**kept, **ours, "PYTHONUNBUFFERED": "1", **more}


class Gateway:
    """`penstock serve` as a process, on a free port."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, home: Path = ROOT) -> None:
        self.process = process
        self.log = log
        self._home = home
        line = until("the gateway listens", lambda: self._line("listening on ") or self._ended(), 30)
        self.base_url = line.split("listening on ", 1)[1].strip()
        self.root = self.base_url.removesuffix("/v1")

    def _ended(self) -> str:
        if self.process.poll() is not None:
            raise AssertionError(f"penstock ended with {self.process.returncode}:\n{self.output()}")
        return ""

    def _line(self, part: str) -> str:
        return next((line for line in self.output().splitlines() if part in line), "")

    def output(self) -> str:
        return self.log.read_text()

    @property
    def port(self) -> int:
        return int(self.root.rsplit(":", 1)[1])

    @property
    def admin_url(self) -> str:
        """Where the admin API is."""
        return until("the admin API listens", lambda: self._line("metrics and /admin on ")).rsplit(" ", 1)[1]

    @property
    def admin_port(self) -> int:
        return int(self.admin_url.rsplit(":", 1)[1])

    def admin_key(self) -> str:
        """The one that a gateway without a configured one has made; "" where there is none."""
        file = self._home / "state" / "admin.key"
        return file.read_text().strip() if file.exists() else ""

    def admin(
        self, path: str, method: str = "GET", headers: Mapping[str, str] | None = None, content: dict[str, Any] | None = None
    ) -> raw.Answer:
        """Ask the admin API, with the key that the gateway has made where no other is given."""
        sent = {"authorization": f"Bearer {self.admin_key()}", **({"content-type": "application/json"} if method != "GET" else {})}
        return raw.call(self.admin_port, method, path, b"" if content is None else content, {**sent, **(headers or {})})

    def wait_all_hosts(self, timeout_s: float = 20.0) -> None:
        """Until every host is well, and what it serves is known."""

        def well() -> bool:
            hosts = self.admin("/admin/hosts").json()["hosts"]
            return bool(hosts) and all(host["state"] == "ok" and host["capacity"] for host in hosts)

        until("every host is well", well, timeout_s, 0.1)

    def requests(self) -> list[dict[str, Any]]:
        """The JSON log lines of requests so far."""
        lines = [json.loads(line) for line in self.output().splitlines() if line.startswith("{")]
        return [line for line in lines if line["logger"] == "penstock.request"]

    def parent(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    def workers(self) -> list[psutil.Process]:
        return [child for child in self.parent().children() if "gateway.processes.worker" in command(child)]

    def supervisors(self) -> list[psutil.Process]:
        return [child for child in self.parent().children() if "backends.sglang_dsv3.engine.supervise" in command(child)]

    def family(self) -> list[psutil.Process]:
        """Parent and everybody below."""
        return [self.parent(), *self.parent().children(recursive=True)]

    def wait_ready(self, timeout_s: float = 180.0) -> None:
        until("the engine is ready", lambda: status(f"{self.root}/readyz") == 200 or self._ended(), timeout_s, 0.1)

    def stop(self) -> int:
        """SIGTERM and the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def gateway(
    folder: Path, config: Mapping[str, Any] | None = None, arguments: tuple[str, ...] = (), python: str = "", **env: str
) -> Iterator[Gateway]:
    """A running gateway; at the end it is stopped and nothing of it is left."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "gateway.log"
    command = [python or sys.executable, "-m", "gateway", "serve", "--port", "0", *arguments]
    if config is not None:
        (folder / "penstock.yaml").write_text(yaml.safe_dump(dict(config)))
        command += ["-c", str(folder / "penstock.yaml")]
    if "PENSTOCK_HOME" not in env:  # a ledger of its own, and not the checkout's
        env["PENSTOCK__LIMITS__LEDGER_FILE"] = str(folder / "usage.json")
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment(**env), cwd=folder)
    family: list[psutil.Process] = []
    try:
        running = Gateway(process, log, Path(env.get("PENSTOCK_HOME", ROOT)))
        yield running
        if process.poll() is None:
            family = running.family()
        assert running.stop() == 0, running.output()[-3000:]
        _, left = psutil.wait_procs(family, timeout=10)
        assert not left, f"left behind: {left}"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


class Rehearsal:
    """The scripted SGLang server as a process."""

    def __init__(self, port: int, process: subprocess.Popen[bytes]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.process = process

    def seen(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(fetch(f"{self.url}/rehearsal"))
        return found

    def behave(self, **settings: Any) -> None:
        """How it behaves from now on, whatever the prompts say."""
        request = urllib.request.Request(f"{self.url}/rehearsal", json.dumps(settings).encode(), method="POST")
        urllib.request.urlopen(request, timeout=10).close()

    def backend(self) -> dict[str, Any]:
        """A configuration with this one host."""
        return {
            "models": {"deepseek-v3": {"backend": "dsv3", "aliases": ["org/deepseek"]}},
            "backends": {"dsv3": {"kind": "sglang_dsv3", "hosts": [{"url": self.url}]}},
        }


@contextlib.contextmanager
def rehearsal(port: int = 0, *more: str) -> Iterator[Rehearsal]:
    command = [sys.executable, "-m", "backends.sglang_dsv3.rehearsal", "--golden", str(GOLDEN), "--lifeline", "--port", str(port), *more]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment())
    assert process.stdout is not None
    assert process.stdin is not None
    ready, _, _ = select.select([process.stdout], [], [], 20)
    assert ready, "the scripted server does not start"
    try:
        yield Rehearsal(int(process.stdout.readline().split()[1]), process)
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(10)


def held_back(engine: Rehearsal, before: int) -> int:
    """Wait until the engine, with events left to send, has sent none over four looks half a second apart; returns how many it sent."""
    seen: list[int] = []

    def standing_still() -> bool:
        seen.append(int(engine.seen()["events_sent"]))
        return len(seen) > 3 and seen[-1] == seen[-2] == seen[-3] == seen[-4] > before

    until("the engine is held back", standing_still, 30, every_s=0.5)
    return seen[-1]


def command(process: psutil.Process) -> list[str]:
    """Its command line; nothing when it has just ended."""
    try:
        found: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return found


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as response:
        content: bytes = response.read()
        return content


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


def ended(process: psutil.Process) -> bool:
    """Whether it runs no more; a zombie that nobody reaped has ended, and it may vanish between one question and the next."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def gone(processes: list[psutil.Process], timeout_s: float = 15.0) -> None:
    """Assert that every one of them ends."""
    until("every process has ended", lambda: all(map(ended, processes)), timeout_s)
