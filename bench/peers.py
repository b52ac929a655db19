"""Penstock and the gateways it is measured beside, each started in front of one upstream on a port of its own."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import yaml

from tests.support.processes import ROOT, environment, until

VENVS = ROOT / ".venv-bench"
# Penstock in its two forms, and what runs them.
PYTHONS = {"penstock": ROOT / ".venv-compiled" / "bin" / "python", "penstock-pure": ROOT / ".venv-dev" / "bin" / "python"}
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


@contextlib.contextmanager
def upstream(tokens: int, gap_s: float) -> Iterator[int]:
    """The bench's upstream; yields its port."""
    process = subprocess.Popen([sys.executable, "-m", "bench.upstream", str(tokens), str(gap_s)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def argv(name: str, upstream_port: int, port: int, folder: Path) -> list[str]:
    """The command line that starts a gateway, bare: no keys, no limits, no tracing, no line per request."""
    engine = f"http://127.0.0.1:{upstream_port}"
    if name in PYTHONS:
        config = {
            "listen": {"port": port, "admin": "off"},
            "models": {"deepseek-v3": {"backend": "dsv3"}},
            "backends": {"dsv3": {"kind": "sglang_dsv3", "hosts": [{"url": engine}]}},
            "log": {"requests": False, "level": "warning"},
        }
        (folder / "penstock.yaml").write_text(yaml.safe_dump(config))
        return [str(PYTHONS[name]), "-P", "-m", "gateway", "serve", "-c", str(folder / "penstock.yaml")]
    if name == "nginx":
        (folder / "nginx.conf").write_text(NGINX.format(folder=folder, upstream=upstream_port, port=port))
        return ["nginx", "-c", str(folder / "nginx.conf")]
    common = ["--worker-urls", engine, "--policy", "round_robin", "--host", "127.0.0.1", "--port", str(port), "--log-level", "warn"]
    common += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    if name == "smg":
        return [str(VENVS / "smg" / "bin" / "smg"), "launch", *common]
    if name == "sglang-router":
        return [str(VENVS / "sglang-router" / "bin" / "python"), "-m", "sglang_router.launch_router", *common]
    assert name == "litellm"
    model = {"model": "openai/deepseek-v3", "api_base": f"{engine}/v1", "api_key": "none"}
    bare = {"dangerously_permit_weak_or_unset_master_key": True}  # on loopback, as everybody here
    config = {"model_list": [{"model_name": "deepseek-v3", "litellm_params": model}], "general_settings": bare}
    (folder / "litellm.yaml").write_text(json.dumps(config))
    return [
        str(VENVS / "litellm" / "bin" / "litellm"),
        "--config",
        str(folder / "litellm.yaml"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]


class Peer:
    """A running gateway."""

    def __init__(self, name: str, port: int, process: psutil.Process) -> None:
        self.name = name
        self.port = port
        self._process = process

    def _family(self) -> list[psutil.Process]:
        return [self._process, *self._process.children(recursive=True)]

    def cpu_s(self) -> float:
        """CPU time it has taken so far, children included, as the kernel accounts it (10 ms steps)."""
        return sum(sum(process.cpu_times()[:2]) for process in self._family())

    def resident_mb(self) -> float:
        """Resident memory, children included."""
        return sum(process.memory_info().rss for process in self._family()) / (1 << 20)


@contextlib.contextmanager
def running(name: str, upstream_port: int, folder: Path) -> Iterator[Peer]:
    """The gateway `name` in front of an upstream."""
    folder.mkdir(parents=True)
    port = free_port()
    with (folder / "log").open("wb") as log:
        environ = {**environment(), "LITELLM_TELEMETRY": "False", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        process = subprocess.Popen(argv(name, upstream_port, port, folder), stdout=log, stderr=log, env=environ, cwd=ROOT)
    try:
        until(f"{name} answers", lambda: _answers(port, process), 90, 0.2)
        yield Peer(name, port, psutil.Process(process.pid))
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


def _answers(port: int, process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is not None:
        raise RuntimeError(f"ended with {process.returncode}")
    body = b'{"model":"deepseek-v3","messages":[{"role":"user","content":"hi"}]}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    head += b"authorization: Bearer sk-bench\r\ncontent-length: %d\r\n\r\n" % len(body)
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
