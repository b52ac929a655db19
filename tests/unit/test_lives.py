"""What keeps processes alive: back-off, the loop around a child's lives, an engine's progress, and a console nobody reads."""

from __future__ import annotations

import asyncio

import click
import pytest

from backends.sglang_dsv3.engine.supervise import Progress, remaining_s
from gateway import cli, config, lifeline
from gateway.lifeline import Backoff
from gateway.plugin import Service, ServiceState
from gateway.processes import children


def test_delays_double_up_to_half_a_minute_and_a_healthy_minute_resets_them() -> None:
    backoff = Backoff()
    assert [backoff.next(0.1) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert [backoff.next(lived_s) for lived_s in (60, 5)] == [1, 2]


@pytest.mark.parametrize(
    "trouble", [OSError("no more processes"), ValueError("a line without an end"), RuntimeError("what nobody foresaw")]
)
def test_a_child_that_cannot_even_begin_is_tried_again(monkeypatch: pytest.MonkeyPatch, trouble: Exception) -> None:
    monkeypatch.setattr(lifeline, "BACKOFF_FIRST_S", 0.0)
    lives: list[Exception | int] = [trouble, -9, 3, 0]
    ends: list[str] = []

    async def keep() -> None:
        stop = asyncio.Event()

        async def one_life() -> int:
            life = lives.pop(0)
            if not lives:
                stop.set()
            if isinstance(life, Exception):
                raise life
            return life

        await children.keep(one_life, lambda how, delay_s: ends.append(how), stop)

    asyncio.run(keep())
    assert ends == [f"{type(trouble).__name__}: {trouble}", "signal SIGKILL", "exit code 3"], "whoever ends when it should is no loss"


def test_whoever_stops_waits_for_no_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline, "BACKOFF_FIRST_S", 3600.0)
    monkeypatch.setattr(lifeline, "BACKOFF_MAX_S", 3600.0)

    async def keep() -> None:
        stop = asyncio.Event()

        async def one_life() -> int:
            return 1

        def ended(how: str, delay_s: float) -> None:
            asyncio.get_running_loop().call_soon(stop.set)

        async with asyncio.timeout(60):
            await children.keep(one_life, ended, stop)

    asyncio.run(keep())


def test_progress_is_told_once_a_step_and_never_after_the_engine_is_ready() -> None:
    told: list[str] = []
    progress = Progress(told.append)
    for line in ("[t] Load weight begin.", "noise", "Memory pool end", "KV Cache is allocated. #tokens: 9", "Load weight begin again"):
        progress.hear(line)
    assert told == ["loading weights", "memory is allocated"]
    progress.end()
    progress.hear('a client\'s text in a warning: "Uvicorn running"')
    assert told == ["loading weights", "memory is allocated"]


@pytest.mark.parametrize(("elapsed_s", "left_s"), [(0, 20), (12, 8), (16, 4), (20, 5), (60, 15)])
def test_a_start_takes_a_quarter_longer_than_usual_and_longer_still_when_it_is_overdue(elapsed_s: float, left_s: float) -> None:
    assert remaining_s(16.0, elapsed_s) == left_s


def test_nobody_has_to_read_what_the_console_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*words: object, **more: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(click, "echo", closed)
    console = cli.Console(config.load(environment={}).settings, "http://127.0.0.1:1/v1", "", [Service("dsv3/local-0", [])])
    console.listening()
    console.observe("dsv3/local-0", ServiceState("ready"))


def test_nothing_is_said_to_be_loading_that_has_failed(capsys: pytest.CaptureFixture[str]) -> None:
    console = cli.Console(config.load(environment={}).settings, "http://127.0.0.1:1/v1", "", [Service("dsv3/local-0", [])])
    console.observe("dsv3/local-0", ServiceState("failed", "its environment is not installed"))
    console.listening()
    assert "is loading" not in capsys.readouterr().out
    console.observe("dsv3/local-0", ServiceState("loading"))
    console.listening()
    assert "is loading" in capsys.readouterr().out
