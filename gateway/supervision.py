"""Background tasks that must not end in silence: what lives as long as its process is started here, and what is done once beside others.

An exception in such a task would otherwise be kept, unseen, until the task object is thrown away, while everybody goes on believing that
the work is done. No I/O of its own. `tests/unit/test_supervision.py` knows every other place that starts a task, and why it may.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from gateway.lifeline import Backoff

log = logging.getLogger("penstock.tasks")

# Hears the name of a task each time it has failed, and counts it.
Failed = Callable[[str], None]
Work = Callable[[], Coroutine[Any, Any, Any]]
# The name under which what failed in no task of ours is counted: a callback, or a task that nobody asked how it had ended.
UNFORESEEN = "event loop"


def uncounted(name: str) -> None:
    """A `Failed` where there are no metrics."""


def supervise(
    name: str,
    work: Work,
    failed: Failed,
    sleep: Callable[[float], Coroutine[Any, Any, None]] = asyncio.sleep,
) -> asyncio.Task[None]:
    """Start `work` as a task of this name; whenever it raises, that is said, counted (`failed(name)`), and it is begun again after a
    back-off (seconds: 1, 2, 4 ... 30; a run of a minute begins anew). It ends when `work` returns, or is cancelled."""
    return asyncio.get_running_loop().create_task(_supervised(name, work, failed, sleep), name=name)


async def _supervised(
    name: str,
    work: Work,
    failed: Failed,
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


def once(name: str, work: Coroutine[Any, Any, Any], failed: Failed = uncounted) -> asyncio.Task[Any]:
    """Start what is done once: when it raises, that is said and counted, whether or not anybody awaits it."""
    task = asyncio.get_running_loop().create_task(work, name=name)

    def ended(_: object) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            failed(name)
            log.error("the task '%s' has failed (%s: %s)", name, type(error).__name__, error, exc_info=error)

    task.add_done_callback(ended)
    return task


def listen(failed: Failed) -> None:
    """What fails in a callback of the running loop, or in a task whose end nobody looks at, is said and counted like the rest."""

    def unforeseen(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        failed(UNFORESEEN)
        log.error("unforeseen, in the event loop: %s", context.get("message"), exc_info=context.get("exception"))

    asyncio.get_running_loop().set_exception_handler(unforeseen)
