"""A background task that fails is said, counted and begun again."""

from __future__ import annotations

import asyncio
import logging

import pytest

from gateway.supervision import supervise


def test_what_fails_is_said_counted_and_begun_again_with_more_patience_each_time(caplog: pytest.LogCaptureFixture) -> None:
    runs, counted, slept = 0, list[str](), list[float]()

    async def work() -> None:
        nonlocal runs
        runs += 1
        if runs < 4:
            raise ValueError("rubbish")

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def run() -> None:
        await supervise("the task", work, counted.append, sleep)

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
    assert (runs, counted, slept) == (4, ["the task"] * 3, [1, 2, 4]), "it ends where its work has ended"
    assert next(record.getMessage() for record in caplog.records) == (
        "the task 'the task' has failed (ValueError: rubbish); it is begun again in 1 s"
    )
    assert all(record.exc_info for record in caplog.records), "with its traceback"


def test_what_is_cancelled_has_not_failed() -> None:
    counted = list[str]()

    async def work() -> None:
        await asyncio.Event().wait()

    async def run() -> None:
        task = supervise("the task", work, counted.append)
        await asyncio.sleep(0)
        assert task.get_name() == "the task"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert counted == []
