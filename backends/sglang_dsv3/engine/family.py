"""A process and everybody below it: adopt the orphans, and leave none. Linux only."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal

_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def adopt() -> None:
    """From now on a descendant whose parent dies becomes this process's child, not init's."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def by_parent(zombies: bool) -> dict[int, list[int]]:
    """Parent to children of every process on the machine, by /proc: the living, or the zombies."""
    found: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                with open(f"/proc/{entry}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
                if (fields[0] == b"Z") == zombies:
                    found.setdefault(int(fields[1]), []).append(int(entry))
    return found


def descendants() -> list[int]:
    """Every living process below this one. As their subreaper we keep those whose own parent died."""
    children = by_parent(zombies=False)
    found: list[int] = []
    below = children.get(os.getpid(), [])
    while below:
        found += below
        below = [child for parent in below for child in children.get(parent, [])]
    return found


def kill() -> bool:
    """SIGKILL for every living descendant; whether there were any."""
    alive = descendants()
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(alive)


async def end(own_child: int) -> None:
    """Kill until nobody is left, then reap those who fell to us; asyncio reaps `own_child` by itself."""
    while kill():
        await asyncio.sleep(0.02)
    _reap(but=own_child)


def _reap(but: int) -> None:
    for pid in by_parent(zombies=True).get(os.getpid(), []):
        if pid != but:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
