"""When a host is said to be down, and what with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from gateway.processes.outages import Outages
from gateway.serving.hostview import HostView


def host(id: str, state: str = "ok", why: str = "", moved: int = 0, broke: int = 0) -> HostView:
    return HostView(id, "b", 1.0, 0, state, why, 0, None, moved=moved, broke=broke)


class Kept(logging.Handler):
    """Keeps the lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record)


@pytest.fixture
def said() -> Iterator[list[logging.LogRecord]]:
    log, kept = logging.getLogger("penstock.hosts"), Kept()
    before = log.level
    log.setLevel(logging.INFO)
    log.addHandler(kept)
    yield kept.lines
    log.removeHandler(kept)
    log.setLevel(before)


def test_it_is_said_once_at_the_second_look_with_all_that_left_shortly_before(said: list[logging.LogRecord]) -> None:
    outages = Outages(list)
    outages.look([host("a", moved=5), host("z")], 0.0)
    for second in range(1, 10):
        outages.look([host("a", moved=7), host("z")], float(second))
    outages.look([host("a", moved=16, broke=1), host("z")], 10.0)  # its streams break before its probe fails
    outages.look([host("a", "down", "Connection refused", 17, 1), host("z")], 11.0)
    assert not said
    for at in (12.0, 13.0, 14.0):
        outages.look([host("a", "down", "Connection refused", 18, 1), host("z")], at)
    assert [(one.levelname, one.getMessage()) for one in said] == [
        ("WARNING", "host a is down: Connection refused; 11 streams moved, 1 ended, 1 of 2 hosts left")
    ]
    assert said[0].fields == {"host": "a", "backend": "b", "cause": "Connection refused"}  # type: ignore[attr-defined]
    outages.look([host("a", moved=18, broke=1), host("z")], 20.0)
    assert (said[1].levelname, said[1].getMessage()) == ("INFO", "host a is back after 9 s; 2 of 2 hosts take requests")
    # Down again: what left before is not counted once more.
    for at in (21.0, 22.0):
        outages.look([host("a", "ejected", "too many failures; tried again in 5 s", 19, 1), host("z")], at)
    assert said[2].getMessage() == "host a is ejected: too many failures; 1 stream moved, 1 of 2 hosts left"


def test_what_is_no_outage_is_not_said(said: list[logging.LogRecord]) -> None:
    outages = Outages(list)
    loading = "The engine is loading."
    for at in range(5):  # still loading; drained by the operator, who knows; a blink
        blink = host("c", "down", "x") if at == 2 else host("c")
        drained = host("b", "drained", "by the operator") if at else host("b")
        outages.look([host("a", "not ready", loading), drained, blink], float(at))
    assert not said
    outages.look([host("a"), host("c")], 6.0)
    for later in (7.0, 8.0):
        outages.look([host("a", "not ready", loading), host("c")], later)
    assert [one.getMessage() for one in said] == ["host a is not ready: The engine is loading; 0 streams moved, 1 of 2 hosts left"]
    outages.look([host("c")], 9.0)  # it is not configured any more
    outages.look([host("a"), host("c")], 10.0)
    assert len(said) == 1


def test_a_host_that_is_down_from_the_start_is_said_too(said: list[logging.LogRecord]) -> None:
    outages = Outages(list)
    for second in range(4):
        outages.look([host("a", "down", "Connection refused", moved=3), host("z")], float(second))
    assert [one.getMessage() for one in said] == ["host a is down: Connection refused; 3 streams moved, 1 of 2 hosts left"]
