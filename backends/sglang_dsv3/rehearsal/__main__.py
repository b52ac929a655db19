"""The process: prints `listening PORT` once it does, ends on SIGTERM or, with `--lifeline`, when its standard input ends."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from backends.sglang_dsv3.rehearsal.server import application


async def run(host: str, port: int, golden: Path | None, lifeline: bool, speaks: bool) -> None:
    """Serve on loopback until told to stop."""
    runner = web.AppRunner(
        application(golden, speaks), access_log=None, keepalive_timeout=5.0, shutdown_timeout=0.1, handler_cancellation=True
    )
    await runner.setup()
    site = web.TCPSite(runner, host, port, backlog=1024)
    await site.start()
    print(f"listening {runner.addresses[0][1]}", flush=True)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    if lifeline:
        threading.Thread(target=_until_stdin_ends, args=(lambda: loop.call_soon_threadsafe(stop.set),), daemon=True).start()
    await stop.wait()
    await runner.cleanup()


def _until_stdin_ends(then: Callable[[], object]) -> None:
    while os.read(0, 4096):
        pass
    then()


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--golden", type=Path)
    parser.add_argument("--lifeline", action="store_true")
    parser.add_argument("--speaks", action="store_true", help="as an engine with DeepSeek-V3.1's parsers: thoughts and calls")
    options = parser.parse_args()
    asyncio.run(run(options.host, options.port, options.golden, options.lifeline, options.speaks))


if __name__ == "__main__":
    main()
