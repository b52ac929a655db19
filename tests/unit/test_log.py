"""The log when things go wrong: enough of it, and no flood; and what a request's line leaves out."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

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


LINES = """
from gateway.telemetry import log
from gateway.telemetry.record import QUEUE, Record
log.setup("info", "json")
log.setup("info", "json")
record = Record({"method": "POST", "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions", "headers": []})
record.model, record.status, record.outcome, record.ended_at = "m", 200, "ok", record.started_at + 0.5
record.phases[QUEUE] = 0.25
log.requests([record], True)
"""


def test_a_process_whose_log_was_set_up_twice_ends_well_and_no_phase_that_never_was_is_logged(tmp_path: Path) -> None:
    """A compiled handler that was replaced killed it at its end, whose weak reference `logging` still held."""
    done = subprocess.run([sys.executable, "-c", LINES], cwd=tmp_path, capture_output=True, check=True)
    (line,) = map(json.loads, done.stderr.splitlines())
    assert line["phases_ms"] == {"queue": 250.0}
    assert line["ms"] == 500.0
    assert "first_event_ms" not in line
