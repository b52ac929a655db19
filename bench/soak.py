"""A long look at one gateway: a million requests, then thousands of open streams, with its memory watched all the while.

    make bench-soak [ARGS="--requests 1000000 --streams 5000 --minutes 0"]      an hour and more; prints a line every ten seconds

Ends with exit code 1 when an answer was wrong, or when memory grew by more than 16 MB after the first tenth of the requests.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import sys
import tempfile
import time
from pathlib import Path

from bench.gateway import KINDS, load
from bench.peers import Peer, running, upstream

GROWTH_LIMIT_MB = 16.0
BODY = b'{"model":"deepseek-v3","messages":[{"role":"user","content":"hi"}],"stream":true}'
REQUEST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
    len(BODY),
    BODY,
)


def requests(peer: Peer, count: int, minutes: float) -> bool:
    """Alternate JSON and streams until there were `count` and `minutes` have passed; whether memory held still."""
    done, first_mb, began = 0, 0.0, time.monotonic()
    json_kind, sse_kind = KINDS[0], KINDS[2]
    while done < count or time.monotonic() - began < minutes * 60:
        for kind in (json_kind, sse_kind):
            done += load(kind, peer.port, 5)
        now_mb = peer.resident_mb()
        first_mb = first_mb or (now_mb if done > count / 10 else 0.0)
        print(f"{time.monotonic() - began:7.0f} s  {done:9,d} requests  {now_mb:6.1f} MB", flush=True)
    return now_mb - first_mb <= GROWTH_LIMIT_MB


async def stream(port: int, begun: asyncio.Semaphore) -> bool:
    """One stream, read to its end; whether it was whole."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(REQUEST)
        got = await reader.readuntil(b"\r\n\r\n")
        begun.release()
        if not got.startswith(b"HTTP/1.1 200"):
            return False
        events, tail = 0, b""
        while part := await reader.read(65536):
            events += part.count(b"data: ")
            tail = (tail + part)[-32:]
            if tail.endswith(b"0\r\n\r\n"):
                break
        return tail.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    finally:
        writer.close()


async def streams(peer: Peer, count: int) -> bool:
    """`count` at once; whether all of them were whole."""
    before_mb, begun = peer.resident_mb(), asyncio.Semaphore(0)
    tasks = []
    for number in range(count):
        tasks.append(asyncio.create_task(stream(peer.port, begun)))
        if number % 100 == 99:
            await asyncio.sleep(0.1)
    for _ in range(count):
        await begun.acquire()
    open_mb = peer.resident_mb()
    whole = sum(await asyncio.gather(*tasks))
    each_kb = (open_mb - before_mb) * 1024 / count
    print(f"{count:,d} streams open at once: {open_mb:.0f} MB ({each_kb:.1f} kB each); {whole:,d} of them whole", flush=True)
    return whole == count


def main() -> None:
    """Both, and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--minutes", type=float, default=0.0, help="go on at least so long")
    parser.add_argument("--streams", type=int, default=5000)
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, options.streams * 4)), hard))
    with tempfile.TemporaryDirectory() as folder:
        with upstream(32, 0.0) as port, running("penstock", port, Path(folder) / "requests") as peer:
            steady = requests(peer, options.requests, options.minutes)
        # A minute each, so that all of them are open together.
        with upstream(60, 1.0) as port, running("penstock", port, Path(folder) / "streams") as peer:
            whole = asyncio.run(streams(peer, options.streams))
    print("ok" if steady and whole else "NOT ok")
    sys.exit(not (steady and whole))


if __name__ == "__main__":
    main()
