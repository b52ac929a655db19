"""What the gateway asks of asyncio, in functions small enough to be compiled by themselves: a test plays them in both forms."""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import Awaitable, Callable
from typing import Self


async def waits(log: list[str]) -> None:
    try:
        await asyncio.sleep(60)
    finally:
        log.append("cleaning up")
        await asyncio.sleep(0)
        log.append("clean")


async def takes_back() -> str:
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        assert task is not None
        asked = task.cancelling()
        task.uncancel()
        await asyncio.sleep(0)
        return f"cancelled {asked} time, goes on, {task.cancelling()} left"
    return "never cancelled"


async def bounded(bound_s: float, patience_s: float) -> str:
    try:
        async with asyncio.timeout(bound_s) as timer:
            await asyncio.sleep(patience_s)
    except TimeoutError:
        return f"too late: {timer.expired()}"
    return f"in time: {timer.expired()}"


async def shields(log: list[str]) -> str:
    inner = asyncio.ensure_future(asyncio.sleep(0.01, "the inner one"))
    try:
        return await asyncio.shield(inner)
    except asyncio.CancelledError:
        log.append("cancelled")
        return await inner


async def fails(depth: int) -> None:
    await asyncio.sleep(0)
    if depth:
        await fails(depth - 1)
    try:
        raise KeyError("first")
    except KeyError:
        raise ValueError("second")  # noqa: B904 - mypyc takes no notice of `from`: what is told is the context


class Numbers:
    """What async generators are rewritten to."""

    def __init__(self, count: int) -> None:
        self._left = count

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int:
        if not self._left:
            raise StopAsyncIteration
        self._left -= 1
        await asyncio.sleep(0)
        return self._left


class Held:
    def __init__(self, log: list[str]) -> None:
        self._log = log

    async def __aenter__(self) -> Self:
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.sleep(0)
        self._log.append(type(exc[1]).__name__)


async def holds(log: list[str]) -> None:
    async with Held(log):
        await asyncio.sleep(60)


class Chunks(asyncio.Protocol):
    """A protocol whose methods a transport finds by name, and which wakes who waits."""

    __slots__ = ("_got", "_waiter")

    def __init__(self) -> None:
        self._got = b""
        self._waiter: asyncio.Future[None] | None = None

    def data_received(self, data: bytes) -> None:
        self._got += data
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def read(self) -> bytes:
        while not self._got:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        got, self._got = self._got, b""
        return got


async def cancelled(work: Awaitable[object]) -> str:
    """What becomes of a task that is cancelled once it waits."""
    task = asyncio.ensure_future(work)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel("because")
    try:
        result = await task
    except asyncio.CancelledError as error:
        return f"cancelled {error.args}, {task.cancelled()}"
    return f"returned {result!r}"


async def play(say: Callable[[str], None]) -> None:
    """Everything, told line by line."""
    log: list[str] = []
    say(await cancelled(waits(log)))
    say(await cancelled(takes_back()))
    say(await cancelled(shields(log)))
    say(await cancelled(holds(log)))
    say(await cancelled(asyncio.wait_for(waits(log), 60)))
    with contextlib.suppress(TimeoutError):
        say(repr(await asyncio.wait_for(waits(log), 0.001)))
    say(repr(log))
    say(f"{await bounded(0.001, 60)}; {await bounded(60, 0.001)}")
    before = asyncio.ensure_future(waits(log))
    before.cancel()
    several = [before, asyncio.ensure_future(asyncio.sleep(0))]
    say(repr(await asyncio.gather(*several, return_exceptions=True)))
    try:
        await fails(1)
    except ValueError as error:
        found = traceback.extract_tb(error.__traceback__)
        say(f"{[(step.name, step.lineno) for step in found if step.filename.endswith('coroutines.py')]} {error.__context__!r}")
    say(repr([number async for number in Numbers(3)]))
    reader = Chunks()
    done: list[str] = []
    task = asyncio.ensure_future(reader.read())
    task.add_done_callback(lambda ended: done.append(repr(ended.result())))
    await asyncio.sleep(0)
    receive: Callable[[bytes], None] = reader.data_received
    asyncio.get_running_loop().call_soon(receive, b"bytes")
    say(f"{await task!r} {done}")
    say(await cancelled(reader.read()))
    say(f"{asyncio.iscoroutine(waiting := takes_back())}")
    waiting.close()
