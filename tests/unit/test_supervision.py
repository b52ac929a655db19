"""A background task that fails is said, counted and begun again; and there is none that nobody looks after."""

from __future__ import annotations

import ast
import asyncio
import logging

import pytest

from gateway import supervision
from gateway.supervision import once, supervise
from tests.support.processes import ROOT

# Where a task may be started by hand, and who looks at how it ends. Everything else goes through `supervise` or `once`.
EXCEPTIONS = {
    "backends/sglang_dsv3/continuation/choices.py:begin": "a group, which is waited for in the same function",
    "backends/sglang_dsv3/engine/supervise.py:_one_life": "asked for their results, and cancelled, in the same function",
    "backends/sglang_dsv3/engine/supervise.py:_serve": "its end, whatever the cause, ends the process",
    "backends/sglang_dsv3/engine/supervise.py:_told": "waits for two events, and is awaited in the same function",
    "backends/sglang_dsv3/pair.py:begin": "asked for its result in the same function, and cancelled when the pair is closed",
    "backends/sglang_dsv3/rehearsal/__main__.py:run": "the scripted server of tests",
    "backends/sglang_dsv3/transport/library.py:finish": "its connection is closed when it ends, however it does",
    "backends/sglang_dsv3/transport/library.py:send": "the request itself: whoever reads its head gets what it raised",
    "gateway/cli.py:_run": "says a greeting; whatever it raises is in the loop's handler",
    "gateway/conformance.py:work": "a test that backends run",
    "gateway/processes/http/connection.py:_answer": "Exchange.run, which turns whatever is raised into an answer",
    "gateway/processes/parent.py:_end": "awaited in the same function",
    "gateway/serving/relay.py:_begin_and_keep_alive": "awaited in the same function; without it the answer comes all the same",
    "gateway/serving/watch.py:__enter__": "for servers that are not ours",
    "gateway/telemetry/tracer.py:close": "the last that is done; it is waited for a second and a half",
    "gateway/store/keysync.py:fresh": "awaited by everybody who asks",
    "gateway/supervision.py:once": "this is it",
    "gateway/supervision.py:supervise": "this is it",
}
STARTERS = {"create_task", "ensure_future", "TaskGroup", "Thread", "run_in_executor", "run_coroutine_threadsafe"}


def started_by_hand(source: str, name: str) -> set[str]:
    """`file:function` of each place that starts a task or a thread by itself."""
    found = set[str]()

    def look(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
            if called in STARTERS:
                found.add(f"{name}:{function}")
        for child in ast.iter_child_nodes(node):
            look(child, function)

    look(ast.parse(source), "")
    return found


def test_nobody_starts_a_task_that_nobody_looks_after() -> None:
    found = set[str]()
    for folder in ("gateway", "middleware", "backends", "openapi"):
        for path in (ROOT / folder).rglob("*.py"):
            found |= started_by_hand(path.read_text(), str(path.relative_to(ROOT)))
    assert found - set(EXCEPTIONS) == set(), "supervise(...) or once(...) it, or say here why not"
    assert set(EXCEPTIONS) - found == set(), "no longer there"


def test_the_scan_sees_what_it_should() -> None:
    for call in ("asyncio.create_task(x())", "loop.create_task(x())", "threading.Thread(target=x).start()", "asyncio.ensure_future(x())"):
        assert started_by_hand(f"def begin():\n    {call}\n", "a.py") == {"a.py:begin"}


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


def test_what_is_done_once_is_said_and_counted_when_it_fails(caplog: pytest.LogCaptureFixture) -> None:
    counted = list[str]()

    async def work() -> None:
        raise ValueError("rubbish")

    async def run() -> None:
        once("the task", work(), counted.append)
        cancelled = once("another", work(), counted.append)
        cancelled.cancel()  # before it began
        await asyncio.sleep(0.01)

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
    assert counted == ["the task"]
    assert "the task 'the task' has failed (ValueError: rubbish)" in caplog.text


def test_what_fails_in_a_callback_is_said_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    counted = list[str]()

    def callback() -> None:
        raise ValueError("rubbish")

    async def run() -> None:
        supervision.listen(counted.append)
        asyncio.get_running_loop().call_soon(callback)
        await asyncio.sleep(0.01)

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
    assert counted == [supervision.UNFORESEEN]
    assert "ValueError: rubbish" in caplog.text
