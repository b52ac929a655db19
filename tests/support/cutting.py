"""A host that dies on command, with a real engine behind it: a TCP proxy that resets the connection after so many events."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
from collections.abc import Callable, Iterator
from socket import SO_LINGER, SOL_SOCKET
from typing import TypeVar
from urllib.parse import urlsplit

# Where an event ends in a chunked body: each is a chunk of its own.
_END = b"\n\n\r\n"
T = TypeVar("T")


def _up_to(data: bytes, events: int) -> bytes:
    """Its beginning, with at most so many events in it; all of it when it has no more."""
    if data.count(_END) <= events:
        return data
    at = 0
    for _ in range(events):
        at = data.index(_END, at) + len(_END)
    return data[:at]


class Cutting:
    """`after`: events of a stream that pass before the reset; None lets everything pass."""

    def __init__(self, engine: str) -> None:
        parts = urlsplit(engine)
        self._engine = (parts.hostname, parts.port)
        self.after: int | None = None
        self.cuts = 0
        self.url = ""
        self._open: set[asyncio.Task[None]] = set()

    def cut_after(self, events: int, ask: Callable[[], T]) -> T:
        """What is answered when it is cut there; asked again where a busy engine has put
        several tokens into an event, and there were fewer."""
        cuts = self.cuts
        for _ in range(10):
            self.after = events
            try:
                found = ask()
            finally:
                self.after = None
            if self.cuts > cuts:
                break
        assert self.cuts == cuts + 1
        return found

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(*self._engine)
        except OSError:
            writer.transport.abort()
            return
        up = asyncio.create_task(self._pass(reader, back))
        try:
            events, streams = 0, False
            while data := await there.read(65536):
                if data.startswith(b"HTTP/1.1 "):  # another answer on the same connection
                    events, streams = 0, False
                streams = streams or b"data: " in data  # what is read later may be the end of an event alone
                if self.after is not None and streams:
                    passed, events = _up_to(data, self.after - events), events + data.count(_END)
                    if passed != data:
                        self.cuts += 1
                        writer.write(passed)
                        await writer.drain()
                        await asyncio.sleep(0.05)  # what a reset overtakes would be lost on the other side
                        writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
                        writer.transport.abort()
                        break
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            up.cancel()
            await asyncio.gather(up, return_exceptions=True)
            back.transport.abort()
            writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()

    async def run(self, started: threading.Event, stop: threading.Event) -> None:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        while not stop.is_set():
            await asyncio.sleep(0.05)
        server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        await asyncio.sleep(0.05)  # transports close a turn of the loop later


@contextlib.contextmanager
def cutting(engine: str) -> Iterator[Cutting]:
    proxy, started, stop = Cutting(engine), threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(proxy.run(started, stop)))
    thread.start()
    try:
        assert started.wait(10)
        yield proxy
    finally:
        stop.set()
        thread.join(10)
