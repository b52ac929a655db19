"""The pool of one backend's targets: whom it picks, and what a probe that fails does to it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from backends.scripted import Config, Scripted
from gateway.plugin import Target
from gateway.registry import Pool

pytestmark = pytest.mark.unit


class Moody(Scripted):
    """Two targets; what each probe answers is set from outside, an exception is raised."""

    answers: dict[str, bool | Exception]

    async def probe(self, target: str) -> bool:
        answer = self.answers[target]
        if isinstance(answer, Exception):
            raise answer
        return answer


def probed(backend: Moody, pool: Pool) -> None:
    """One round of probes."""

    async def once() -> None:
        task = asyncio.create_task(pool.probe_forever(3600))
        while not pool._down:
            await asyncio.sleep(0)
        task.cancel()

    pool._down.clear()
    asyncio.run(once())


@pytest.mark.parametrize("answer", [False, RuntimeError("a bug in a backend")])
def test_a_target_whose_probe_fails_is_taken_only_when_no_other_is_left(answer: bool | Exception) -> None:
    backend = Moody("b", Config(targets=2))
    pool = Pool("b", backend)
    backend.answers = {"b/0": answer, "b/1": True}
    probed(backend, pool)
    assert {_id(pool.pick(set())) for _ in range(6)} == {"b/1"}
    assert _id(pool.pick({"b/1"})) == "b/0"
    assert pool.pick({"b/0", "b/1"}) is None
    backend.answers["b/0"] = True
    probed(backend, pool)
    assert {_id(pool.pick(set())) for _ in range(6)} == {"b/0", "b/1"}


def test_what_is_not_ready_is_never_picked_and_the_soonest_is_named() -> None:
    class Loading(Scripted):
        def targets(self) -> Sequence[Target]:
            return [Target("slow", ready=False, retry_after_s=30), Target("soon", ready=False, retry_after_s=3)]

    pool = Pool("b", Loading("b", Config()))
    assert pool.pick(set()) is None
    assert not pool.available()
    waiting = pool.waiting_for()
    assert waiting is not None
    assert waiting.id == "soon"


def _id(target: Target | None) -> str:
    assert target is not None
    return target.id
