"""One child process: started with a lifeline, restarted with back-off, ended with its whole group."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)

BACKOFF_FIRST_S = 1.0
BACKOFF_MAX_S = 30.0
# A child that lived this long was healthy: the next failure starts from the beginning of the back-off again.
BACKOFF_RESET_S = 60.0


class Backoff:
    """Delays of 1, 2, 4 ... 30 s between restarts; a run of a minute resets them."""

    def __init__(self) -> None:
        self._delay_s = 0.0

    def next(self, lived_s: float) -> float:
        """Seconds to wait after a run of `lived_s`."""
        if lived_s >= BACKOFF_RESET_S:
            self._delay_s = 0.0
        self._delay_s = min(max(self._delay_s * 2, BACKOFF_FIRST_S), BACKOFF_MAX_S)
        return self._delay_s


def die_with(parent: int, death_signal: int = signal.SIGKILL) -> None:
    """Ask the kernel to end this process when `parent` dies; for the moment between fork and exec.

    The lifeline (standard input that ends) is for an orderly end; this is for whoever cannot read it any more. Linux only.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)


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
        preexec_fn=lambda: die_with(me, signal.SIGTERM),
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


def now() -> float:
    """Monotonic seconds."""
    return time.monotonic()
