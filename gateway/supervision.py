"""Background tasks that must not end in silence: whatever lives as long as its process is started here. No I/O of its own.

An exception in such a task would otherwise be kept, unseen, until the task object is thrown away, while everybody goes on believing that
the work is done.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from gateway.lifeline import Backoff

log = logging.getLogger("penstock.tasks")


def supervise(
    name: str,
    work: Callable[[], Coroutine[Any, Any, None]],
    failed: Callable[[str], None],
    sleep: Callable[[float], Coroutine[Any, Any, None]] = asyncio.sleep,
) -> asyncio.Task[None]:
    """Start `work` as a task of this name; whenever it raises, that is said, counted (`failed(name)`), and it is begun again after a
    back-off (seconds: 1, 2, 4 ... 30; a run of a minute begins anew). It ends when `work` returns, or is cancelled."""
    return asyncio.get_running_loop().create_task(_supervised(name, work, failed, sleep), name=name)


async def _supervised(
    name: str,
    work: Callable[[], Coroutine[Any, Any, None]],
    failed: Callable[[str], None],
    sleep: Callable[[float], Coroutine[Any, Any, None]],
) -> None:
    loop, backoff = asyncio.get_running_loop(), Backoff()
    while True:
        began = loop.time()
        try:
            await work()
        except Exception as error:
            delay_s = backoff.next(loop.time() - began)
            failed(name)
            log.exception("the task '%s' has failed (%s: %s); it is begun again in %g s", name, type(error).__name__, error, delay_s)
            await sleep(delay_s)
        else:
            return
