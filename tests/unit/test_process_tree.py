"""What the operator asks of the workers: answered as soon as they have, and by whoever is left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from gateway import config
from gateway.access.keys import KeyList
from gateway.admin.contract import Reloaded
from gateway.processes import protocol, view
from gateway.processes.fleet import Fleet, Worker
from gateway.processes.tree import Plan, Tree
from gateway.processes.view import View


class FakeProcess:
    pid = 7


class Scripted(Worker):
    """A worker whose other end is a function."""

    def __init__(self, reply: Callable[[Worker, Any], None]) -> None:
        super().__init__(cast("Any", FakeProcess()), cast("Any", self.Writer(self)), 1)
        self.serving = True
        self.reply = reply

    class Writer:
        def __init__(self, worker: Scripted) -> None:
            self._worker = worker

        def write(self, data: bytes) -> None:
            self._worker.reply(self._worker, protocol.to_worker(data))

        def close(self) -> None:
            pass


def report(number: int, open: int = 0) -> protocol.Report:
    return protocol.Report(number, open, 0.0, 1 << 20, "", {}, [])


def answers(worker: Worker, question: Any) -> None:
    worker.report = report(question.number, open=1)
    asyncio.get_running_loop().call_soon(worker.answered, worker.report)


def silent(worker: Worker, question: Any) -> None:
    pass


def dies(worker: Worker, question: Any) -> None:
    asyncio.get_running_loop().call_soon(worker.close)


def knows(record: dict[str, Any] | None) -> Callable[[Worker, Any], None]:
    def reply(worker: Worker, question: Any) -> None:
        asyncio.get_running_loop().call_soon(worker.answered, protocol.Found(question.number, record))

    return reply


def looking(*replies: Callable[[Worker, Any], None]) -> View:
    loaded = config.load(environment={})
    tree = Tree(Plan(loaded, []), Path(), cast("Any", None), lambda name, state: None)
    kept = tree.counts, tree.usage, tree.callers
    fleet = Fleet(1, loaded.settings, Path(), cast("Any", None), {}, *kept, KeyList, lambda worker, question: None)
    fleet.workers = {Scripted(reply) for reply in replies}
    tree.fleets.append(fleet)

    async def reload(why: str) -> Reloaded:
        raise NotImplementedError

    return View(tree, Path(), reload)


def within_a_minute(work: Any) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(60):
            return await work

    return asyncio.run(bounded())


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for the limit instead of an event waits for an hour."""
    monkeypatch.setattr(view, "REPORT_LIMIT_S", 3600.0)


@pytest.mark.usefixtures("patient")
def test_a_look_ends_when_every_living_worker_has_answered() -> None:
    workers, _ = within_a_minute(looking(answers, answers, dies).look())
    assert sorted(worker.open for worker in workers) == [0, 1, 1]


def test_a_worker_that_does_not_answer_is_shown_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "REPORT_LIMIT_S", 0.01)
    seen = looking(answers, silent)
    workers, _ = within_a_minute(seen.look())
    assert sorted(worker.open for worker in workers) == [0, 1]
    assert [worker._questions for worker in seen._tree.workers] == [{}, {}], "nobody waits for it any more"


@pytest.mark.usefixtures("patient")
def test_a_request_is_found_without_waiting_for_those_who_do_not_know_it() -> None:
    assert within_a_minute(looking(knows(None), silent, knows({"id": "x"})).find("x")) == {"id": "x"}
    assert within_a_minute(looking(knows(None), dies).find("x")) is None


@pytest.mark.usefixtures("patient")
def test_nobody_is_asked_where_nobody_serves() -> None:
    starting = looking(silent)
    for worker in starting._tree.workers:
        worker.serving = False
    workers, _ = within_a_minute(starting.look())
    assert [worker.state for worker in workers] == ["starting"]
    assert within_a_minute(starting.find("x")) is None
