"""The log when things go wrong: enough of it, and no flood."""

from __future__ import annotations

import logging

from gateway.telemetry.log import Bounded


def line(at: float, message: str = "host %s is down", name: str = "penstock.pool", *args: object) -> logging.LogRecord:
    record = logging.LogRecord(name, logging.WARNING, "", 0, message, args or ("a",), None)
    record.created = at
    return record


def test_of_one_kind_of_line_so_many_are_written_and_then_how_many_more() -> None:
    bounded = Bounded(most=3, window_s=10)
    assert [bounded.filter(line(100 + n * 0.1)) for n in range(50)] == [True] * 3 + [False] * 47
    assert bounded.filter(line(101, "another kind")), "others are written on"
    late = line(111)
    assert bounded.filter(late)
    assert late.getMessage() == "host a is down (and 47 more like it before)"
    assert bounded.filter(line(112))
