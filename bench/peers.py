"""Penstock and the gateways it is measured beside, each started in front of the same upstream on a port of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from gateway.access.keys import hashed
from tests.support.processes import ROOT, environment, until

VENVS = ROOT / ".venv-bench"
OURS = "penstock"
BARE = "penstock-bare"
KEY = "sk-bench"  # chat.lua's
WEIGHTS = (5, 3, 2)
NGINX = """
worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 16384; }}
http {{
  access_log off; client_body_buffer_size 1m; client_max_body_size 32m; keepalive_requests 100000000;
  client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
  uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
  upstream engine {{ server 127.0.0.1:{upstream}; keepalive 512; keepalive_requests 100000000; }}
  server {{ listen 127.0.0.1:{port} backlog=8192;
    location / {{ proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }} }}
}}
"""


def free_port() -> int:
    """One that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


@dataclass(frozen=True)
class Upstream:
    """The bench's upstream: one process, a port for each host that a gateway balances over."""

    ports: tuple[int, ...]
    process: psutil.Process

    def counted(self) -> dict[str, int]:
        """How many `requests` and `events` it has answered so far."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[0]}/counted", timeout=30) as answer:
            found: dict[str, int] = json.load(answer)
        return found

    def cpu_s(self) -> float:
        """CPU time it has taken so far."""
        return sum(self.process.cpu_times()[:2])


@contextlib.contextmanager
def upstream(tokens: int, gap_s: float) -> Iterator[Upstream]:
    """A running one, whose paced streams are `tokens` long."""
    command = [sys.executable, "-m", "bench.upstream", str(len(WEIGHTS)), str(tokens), str(gap_s)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield Upstream(tuple(map(int, process.stdout.readline().split())), psutil.Process(process.pid))
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def default_python() -> Path:
    """Of the environment that `make serve` runs, where there is one; else this one."""
    served = ROOT / ".venv" / "bin" / "python"
    return served if served.exists() else Path(sys.executable)


@dataclass(frozen=True)
class Scene:
    """What stands around the gateways: the upstream, a collector of traces, a Redis, and which environment's Penstock is measured."""

    upstream: Upstream
    python: Path
    otlp: str
    redis: str | None = None


def everything_on(hosts: Sequence[str], otlp: str, folder: Path, limits: bool = True) -> dict[str, Any]:
    """Penstock's configuration with all that an operator would have on, over three hosts."""
    # Limits that are never reached cost what limits cost.
    key = {"name": "bench", "hash": hashed(KEY), **({"rpm": 1e9, "tpm": 1e12, "max_in_flight": 100_000} if limits else {})}
    weighted = [{"url": url, "weight": weight} for url, weight in zip(hosts, WEIGHTS, strict=True)]
    return {
        "models": {"deepseek-v3": {"backend": "dsv3", "balance": "weighted_round_robin"}},
        "backends": {"dsv3": {"kind": "sglang_dsv3", "hosts": weighted}},
        "keys": [key],
        "limits": {"ledger_file": str(folder / "usage.json")},
        "tracing": {"otlp_endpoint": otlp, "sample_ratio": 0.01},
        "log": {"requests": True, "level": "info", "format": "json"},
    }


def _full(scene: Scene, folder: Path, limits: bool = True) -> dict[str, Any]:
    return everything_on([f"http://127.0.0.1:{port}" for port in scene.upstream.ports], scene.otlp, folder, limits)


def _bare(scene: Scene, folder: Path) -> dict[str, Any]:
    """No keys, no limits, no tracing, no line per request, one host: what the peers do."""
    return {
        "models": {"deepseek-v3": {"backend": "dsv3"}},
        "backends": {"dsv3": {"kind": "sglang_dsv3", "hosts": [{"url": f"http://127.0.0.1:{scene.upstream.ports[0]}"}]}},
        "limits": {"ledger_file": str(folder / "usage.json")},
        "log": {"requests": False, "level": "warning"},
    }


def configuration(name: str, scene: Scene, folder: Path) -> dict[str, Any]:
    """Penstock's, by the name of a column or of a variant."""
    shared = {"url": scene.redis, "store_timeout_ms": 10_000}  # a slow moment must not turn into limits kept in memory
    return {
        OURS: lambda: _full(scene, folder),
        BARE: lambda: _bare(scene, folder),
        "redis": lambda: {**_full(scene, folder), "redis": shared},
        "redis, 2 workers": lambda: {**_full(scene, folder), "redis": shared, "listen": {"workers": 2}},
        "no limits": lambda: _full(scene, folder, limits=False),
        "no limits, 2 workers": lambda: {**_full(scene, folder, limits=False), "listen": {"workers": 2}},
    }[name]()


def argv(name: str, scene: Scene, port: int, folder: Path) -> list[str]:
    """The command line that starts a gateway; peers bare: no keys, no limits, no tracing, no line per request."""
    engine = f"http://127.0.0.1:{scene.upstream.ports[0]}"
    if name == "nginx":
        (folder / "nginx.conf").write_text(NGINX.format(folder=folder, upstream=scene.upstream.ports[0], port=port))
        return ["nginx", "-c", str(folder / "nginx.conf")]
    common = ["--worker-urls", engine, "--policy", "round_robin", "--host", "127.0.0.1", "--port", str(port), "--log-level", "warn"]
    common += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    if name == "smg":
        return [str(VENVS / "smg" / "bin" / "smg"), "launch", *common]
    if name == "sglang-router":
        return [str(VENVS / "sglang-router" / "bin" / "python"), "-m", "sglang_router.launch_router", *common]
    if name == "litellm":
        model = {"model": "openai/deepseek-v3", "api_base": f"{engine}/v1", "api_key": "none"}
        bare = {"dangerously_permit_weak_or_unset_master_key": True}  # on loopback, as everybody here
        config = {"model_list": [{"model_name": "deepseek-v3", "litellm_params": model}], "general_settings": bare}
        (folder / "litellm.yaml").write_text(json.dumps(config))
        command = str(VENVS / "litellm" / "bin" / "litellm")
        return [command, "--config", str(folder / "litellm.yaml"), "--host", "127.0.0.1", "--port", str(port)]
    (folder / "penstock.yaml").write_text(yaml.safe_dump(configuration(name, scene, folder)))
    return [*penstock(scene.python), "serve", "-c", str(folder / "penstock.yaml"), "--port", str(port)]


def penstock(python: Path) -> list[str]:
    """The command, in an environment; -P, because what is installed there is measured and not what the current folder holds."""
    return [str(python), "-P", "-m", "gateway"]


class Peer:
    """A running gateway."""

    def __init__(self, name: str, port: int, process: psutil.Process, log: Path) -> None:
        self.name = name
        self.port = port
        self.pid = process.pid
        self._process = process
        self._log = log

    def _family(self) -> list[psutil.Process]:
        return [self._process, *self._process.children(recursive=True)]

    def cpu_s(self) -> tuple[float, float]:
        """CPU time it has taken so far, in user mode and in the kernel, children included, as the kernel accounts it (10 ms steps)."""
        times = [process.cpu_times() for process in self._family()]
        return sum(each.user for each in times), sum(each.system for each in times)

    def resident_mb(self) -> float:
        """Resident memory, children included; what they share (libraries) counts once for each."""
        return sum(process.memory_info().rss for process in self._family()) / (1 << 20)

    def shared_mb(self) -> float:
        """The same, with what they share counted once."""
        return sum(process.memory_full_info().pss for process in self._family()) / (1 << 20)

    def forget_log(self) -> None:
        """Empty its log, which a million requests make large."""
        os.truncate(self._log, 0)


@contextlib.contextmanager
def running(name: str, scene: Scene, folder: Path) -> Iterator[Peer]:
    """The gateway `name` in front of the upstream."""
    folder.mkdir(parents=True)
    port, log = free_port(), folder / "log"
    with log.open("ab") as out:
        environ = {**environment(), "LITELLM_TELEMETRY": "False", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONSAFEPATH": "1"}
        process = subprocess.Popen(argv(name, scene, port, folder), stdout=out, stderr=out, env=environ, cwd=folder)
    try:
        until(f"{name} answers", lambda: _answers(port, process, log), 90, 0.2)
        yield Peer(name, port, psutil.Process(process.pid), log)
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait()


def _answers(port: int, process: subprocess.Popen[bytes], log: Path) -> bool:
    if process.poll() is not None:
        raise RuntimeError(f"ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    body = b'{"model":"deepseek-v3","messages":[{"role":"user","content":"hi"}]}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    head += b"authorization: Bearer %s\r\ncontent-length: %d\r\n\r\n" % (KEY.encode(), len(body))
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as peer:
            peer.sendall(head + body)
            return peer.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def cpu_name() -> str:
    """As the kernel tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def machine() -> str:
    """Where this runs, in a line."""
    uname = os.uname()
    return f"{os.cpu_count()} shared cores, {cpu_name()}, {uname.sysname} {uname.machine}, Python {sys.version.split()[0]}"


def form(python: Path) -> dict[str, str]:
    """Which Penstock an environment holds: its version, and whether its modules run as they are written or compiled."""
    ask = "import gateway, gateway.wire.body as body, sys; print(gateway.__version__, sys.version.split()[0], body.__file__)"
    out = subprocess.run([str(python), "-P", "-c", ask], capture_output=True, text=True, check=True, cwd="/").stdout
    version, interpreter, file = out.split(maxsplit=2)
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, cwd=ROOT).stdout
    kind = "pure Python" if file.strip().endswith(".py") else "compiled"
    return {"version": version, "commit": commit.strip() or "unknown", "form": kind, "python": interpreter}


def versions(names: list[str]) -> dict[str, str]:
    """Of the peers, of wrk and of Redis."""
    found = {name: _first(["--version"] if name == "redis-server" else ["-v"], name) for name in ("nginx", "wrk", "redis-server")}
    for name in names:
        if (python := VENVS / name / "bin" / "python").exists():
            ask = f"import importlib.metadata as m; print(m.version({name!r}))"
            found[name] = subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    return found


def _first(arguments: list[str], command: str) -> str:
    """The version in what a command says of itself."""
    done = subprocess.run([command, *arguments], capture_output=True, text=True)
    found = re.search(r"(\d+\.\d+(?:\.\d+)?)", done.stdout + done.stderr)
    return found[1] if found else "unknown"
