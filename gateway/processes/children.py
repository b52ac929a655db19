"""One child process: started with a lifeline, ended with its whole group."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence

from gateway import lifeline


async def spawn(argv: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int]) -> asyncio.subprocess.Process:
    """Start a child in a session of its own, with a pipe as standard input that ends when we do."""
    me = os.getpid()
    return await asyncio.create_subprocess_exec(
        *argv,
        env=dict(environment),
        stdin=asyncio.subprocess.PIPE,
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
