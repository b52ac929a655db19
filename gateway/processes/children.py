"""One child process: started with a lifeline, kept alive, ended with its whole group."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from gateway import lifeline
from gateway.lifeline import Backoff


async def spawn(
    argv: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int], stdout: int | None = None
) -> asyncio.subprocess.Process:
    """Start a child in a session of its own, with a pipe as standard input that ends when we do."""
    me = os.getpid()
    return await asyncio.create_subprocess_exec(
        *argv,
        env=dict(environment),
        stdin=asyncio.subprocess.PIPE,
        stdout=stdout,
        pass_fds=tuple(descriptors),
        start_new_session=True,
        # A service must outlive us for the blink it takes to clean up behind itself, so it gets SIGTERM, not SIGKILL.
        preexec_fn=lambda: lifeline.die_with(me, signal.SIGTERM),
    )


async def end(process: asyncio.subprocess.Process, grace_s: float) -> None:
    """SIGTERM, `grace_s` seconds of patience, then SIGKILL for the whole session's process group."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), grace_s)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


async def keep(one_life: Callable[[], Awaitable[int]], ended: Callable[[str, float], None], stop: asyncio.Event) -> None:
    """Run a child again and again until `stop`, with back-off; whatever ends one life, or keeps it from beginning, is not the end of the
    loop. `ended` hears how a life ended that should not have, and in how many seconds the next one begins."""
    backoff = Backoff()
    while not stop.is_set():
        started = time.monotonic()
        try:
            how = how_it_ended(await one_life())
        except Exception as error:  # no process to be had, or one that talks nonsense
            how = f"{type(error).__name__}: {error}"
        if stop.is_set():
            return
        delay_s = backoff.next(time.monotonic() - started)
        ended(how, delay_s)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), delay_s)


def how_it_ended(code: int) -> str:
    """An exit code in words."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
