"""An open-loop client: requests leave at a fixed rate whatever became of those before, and time runs from when each was due.

    python -m bench.client PORT RATE SECONDS CONNECTIONS       prints what it saw as JSON, times in µs

A closed loop asks more slowly when the answers get slower, and so leaves out of its percentiles just the requests that would have had to
wait. Here a request that is due while its connection (they take turns) is still busy waits for it, and that wait counts.

The clock is the kernel's timerfd: the event loop's own timers count in milliseconds, which is more than what is measured. What the client
adds itself (how late it sent, its CPU time) is in what it prints; the same client asks the upstream directly, so most of it cancels.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import sys
import time
from collections import deque
from typing import Any, cast

import httptools
import uvloop

from bench.peers import KEY

WARM_S = 0.5
LIMIT_S = 60.0
_BODY = json.dumps(
    {"model": "deepseek-v3", "messages": [{"role": "user", "content": "Explain quantum computing. " * 20}], "max_tokens": 64},
    separators=(",", ":"),
).encode()
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nauthorization: Bearer %s\r\n"
    b"content-length: %d\r\n\r\n%s" % (KEY.encode(), len(_BODY), _BODY)
)


class _Spec(ctypes.Structure):
    """struct itimerspec."""

    _fields_ = tuple((name, ctypes.c_long) for name in ("interval_s", "interval_ns", "first_s", "first_ns"))


def ticker(first: float, interval: float) -> int:
    """A descriptor that becomes readable at `first` on the monotonic clock and every `interval` seconds after. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    found: int = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    spec = _Spec(int(interval), int(interval % 1 * 1e9), int(first), int(first % 1 * 1e9))
    absolute = 1
    if found < 0 or libc.timerfd_settime(found, absolute, ctypes.byref(spec), None) < 0:
        raise OSError(ctypes.get_errno(), "timerfd")
    return found


class Connection(asyncio.Protocol):
    """One keep-alive connection, and the requests that are due on it."""

    def __init__(self) -> None:
        self._due: deque[float] = deque()
        self._parser = httptools.HttpResponseParser(self)
        self.took: list[float] = []
        self.failed = ""

    @property
    def busy(self) -> bool:
        return bool(self._due) and not self.failed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.failed = self.failed or f"the connection was closed ({exc})"

    def close(self) -> None:
        self._transport.close()

    def ask(self, due: float) -> None:
        """Send a request, or note that it waits."""
        self._due.append(due)
        if len(self._due) == 1:
            self._transport.write(REQUEST)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        """An answer is whole."""
        self.took.append(time.monotonic() - self._due.popleft())
        if self._parser.get_status_code() != 200:
            self.failed = f"status {self._parser.get_status_code()}"
        if self._due:
            self._transport.write(REQUEST)


def percentile(values: list[float], share: float) -> float:
    """Of sorted values, in µs when they are in seconds."""
    return values[min(len(values) - 1, int(len(values) * share))] * 1e6


async def run(port: int, rate: float, seconds: float, connections: int) -> dict[str, Any]:
    """What was seen, in µs. Raises RuntimeError when a request failed or was never answered."""
    loop = asyncio.get_running_loop()
    made = [(await loop.create_connection(Connection, "127.0.0.1", port))[1] for _ in range(connections)]
    try:
        return await _at_rate(made, rate, seconds)
    finally:
        for connection in made:
            connection.close()
        await asyncio.sleep(0)


async def _at_rate(made: list[Connection], rate: float, seconds: float) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    warm, count = int(rate * WARM_S), int(rate * (WARM_S + seconds))
    first, late, asked, cpu_s = time.monotonic() + 0.1, [0.0] * count, 0, 0.0
    ended = loop.create_future()
    tick = ticker(first, 1 / rate)

    def due() -> None:
        nonlocal asked, cpu_s
        for _ in range(int.from_bytes(os.read(tick, 8), sys.byteorder)):
            if asked == count:
                break
            if asked == warm:
                for connection in made:
                    connection.took.clear()
                cpu_s = time.process_time()
            when = first + asked / rate
            late[asked] = time.monotonic() - when
            made[asked % len(made)].ask(when)
            asked += 1
        if asked == count and not ended.done():
            ended.set_result(None)

    loop.add_reader(tick, due)
    try:
        await ended
    finally:
        loop.remove_reader(tick)
        os.close(tick)
    deadline = time.monotonic() + LIMIT_S
    while any(connection.busy for connection in made):
        if time.monotonic() > deadline:
            raise RuntimeError(f"no answer within {LIMIT_S:g} s")
        await asyncio.sleep(0.01)
    cpu_s = time.process_time() - cpu_s
    if failed := next((connection.failed for connection in made if connection.failed), ""):
        raise RuntimeError(failed)
    took, late = sorted(seen for connection in made for seen in connection.took), sorted(late[warm:])
    return {
        "requests": len(took),
        "p50": round(percentile(took, 0.5), 1),
        "p99": round(percentile(took, 0.99), 1),
        "late_p50": round(percentile(late, 0.5), 1),
        "late_p99": round(percentile(late, 0.99), 1),
        "client_cpu": round(cpu_s / len(took) * 1e6, 1),
    }


def main() -> None:
    port, rate, seconds, connections = sys.argv[1:5]
    print(json.dumps(uvloop.run(run(int(port), float(rate), float(seconds), int(connections)))))


if __name__ == "__main__":
    main()
