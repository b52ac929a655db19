"""A long look at one gateway: a million requests, then thousands of open streams, with its memory watched all the while.

    make bench-soak [ARGS="--requests 1000000 --streams 5000 --minutes 0"]      an hour and more; prints a line every ten seconds

Everything is on that `make bench` has on in its first column. Ends with exit code 1 when an answer was wrong, or when memory grew by more
than 16 MB after the first tenth of the requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.load import KINDS, wrk
from bench.peers import KEY, OURS, Peer, Scene, Upstream, default_python, running, upstream
from tests.support.otlp import collector

GROWTH_LIMIT_MB = 16.0
# Long enough that all streams are open together, however slowly they are opened.
STREAM_TOKENS, STREAM_GAP_S = 60, 1.0
OPEN_WITHIN_S = 45.0
BODY = b'{"model":"deepseek-v3","messages":[{"role":"user","content":"paced hi"}],"stream":true}'
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nauthorization: Bearer %s\r\n"
    b"content-length: %d\r\n\r\n%s" % (KEY.encode(), len(BODY), BODY)
)


def requests(peer: Peer, above: Upstream, count: int, minutes: float) -> bool:
    """Alternate JSON and streams until there were `count` and `minutes` have passed; whether memory held still."""
    done, first_mb, began = 0, 0.0, time.monotonic()
    json_kind, sse_kind = KINDS[0], KINDS[2]
    start = above.counted()["requests"]
    while done < count or time.monotonic() - began < minutes * 60:
        for kind in (json_kind, sse_kind):
            with wrk(kind, peer.port, 5):
                pass
        done = above.counted()["requests"] - start
        peer.forget_log()
        now_mb = peer.resident_mb()
        first_mb = first_mb or (now_mb if done > count / 10 else 0.0)
        print(f"{time.monotonic() - began:7.0f} s  {done:9,d} requests  {now_mb:6.1f} MB", flush=True)
    return now_mb - first_mb <= GROWTH_LIMIT_MB


@dataclass(frozen=True)
class Open:
    """Streams open at once: the gateway's memory before there were any and the most while all were open, in MB, as resident and (`shared`)
    with what its processes share counted once; and how many ended as they should."""

    streams: int
    before_mb: float
    before_shared_mb: float
    resident_mb: float
    shared_mb: float
    whole: int

    @property
    def each_kb(self) -> float:
        return (self.resident_mb - self.before_mb) * 1024 / self.streams


class _Stream:
    """One stream, read to its end."""

    def __init__(self) -> None:
        self.begun = False

    async def run(self, port: int) -> bool:
        """Whether it was whole."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(REQUEST)
            got = await reader.readuntil(b"\r\n\r\n")
            if not got.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"a stream was answered with {got[:200]!r}")
            self.begun, tail = True, b""
            while part := await reader.read(65536):
                tail = (tail + part)[-32:]
                if tail.endswith(b"0\r\n\r\n"):
                    break
            return tail.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        finally:
            writer.close()


async def streams(peer: Peer, count: int) -> Open:
    """`count` at once. Raises RuntimeError when they cannot all be open together."""
    before_mb, before_shared_mb = peer.resident_mb(), peer.shared_mb()
    made = [_Stream() for _ in range(count)]
    async with asyncio.TaskGroup() as group:
        tasks, deadline = [], time.monotonic() + OPEN_WITHIN_S
        for number, stream in enumerate(made):
            tasks.append(group.create_task(stream.run(peer.port)))
            if number % 100 == 99:
                await asyncio.sleep(0.1)
        while not all(stream.begun for stream in made):
            if time.monotonic() > deadline or any(task.done() for task in tasks):
                raise RuntimeError(f"only {sum(stream.begun for stream in made):,d} of {count:,d} streams were open together")
            await asyncio.sleep(0.1)
        resident_mb, shared_mb = peer.resident_mb(), peer.shared_mb()
        while not any(task.done() for task in tasks):
            await asyncio.sleep(1.0)
            resident_mb = max(resident_mb, peer.resident_mb())
    return Open(count, before_mb, before_shared_mb, resident_mb, shared_mb, sum(task.result() for task in tasks))


def allow_files(count: int) -> None:
    """Let this process and those that it starts have so many files open. Raises RuntimeError when the system does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise RuntimeError(f"{count} open files are needed, and the system allows {hard} (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))


def open_streams(python: Path, count: int, tokens: int = STREAM_TOKENS) -> Open:
    """Of a gateway with everything on, just started; a stream is a token a second, `tokens` of them."""
    allow_files(count * 2 + 1000)  # the gateway holds both ends of each
    with contextlib.ExitStack() as stack:
        folder, sink = Path(stack.enter_context(tempfile.TemporaryDirectory())), stack.enter_context(collector())
        above = stack.enter_context(upstream(tokens, STREAM_GAP_S))
        peer = stack.enter_context(running(OURS, Scene(above, python, sink.endpoint), folder / OURS))
        return asyncio.run(streams(peer, count))


def main() -> None:
    """Both, and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--minutes", type=float, default=0.0, help="go on at least so long")
    parser.add_argument("--streams", type=int, default=5000)
    parser.add_argument("--python", type=Path, default=default_python(), help="of the environment whose Penstock is measured")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder, sink = Path(stack.enter_context(tempfile.TemporaryDirectory())), stack.enter_context(collector())
        above = stack.enter_context(upstream(STREAM_TOKENS, STREAM_GAP_S))
        peer = stack.enter_context(running(OURS, Scene(above, options.python, sink.endpoint), folder / OURS))
        steady = requests(peer, above, options.requests, options.minutes)
    found = open_streams(options.python, options.streams)
    print(f"{found.streams:,d} streams open at once: {found.resident_mb:.0f} MB ({found.each_kb:.1f} kB each); {found.whole:,d} whole")
    good = steady and found.whole == found.streams
    print("ok" if good else "NOT ok")
    sys.exit(not good)


if __name__ == "__main__":
    main()
