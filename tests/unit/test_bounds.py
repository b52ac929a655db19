"""Bounds of docs/security.md that need no socket to be shown, and the check that holds that page against the code."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from gateway.admin import access, audit
from gateway.telemetry import metrics, record, ring
from gateway.telemetry.record import Record
from scripts import check_docs


def scope(**headers: str) -> dict[str, Any]:
    sent = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http", "method": "POST", "path": "/", "raw_path": b"/", "headers": sent, "client": ("127.0.0.1", 1)}


def test_a_request_id_of_ones_own() -> None:
    longest = "x" * record.MAX_ID
    assert record.request_id(scope(x_request_id=longest)) == longest
    for refused in (longest + "x", "a b", "a\n", "a\x1b", "é", ""):
        assert record.request_id(scope(x_request_id=refused)).startswith("req_")


def test_series() -> None:
    counted = metrics.Metrics()
    for number in range(metrics.MAX_SERIES + 500):
        counted.add(metrics.HOST_CHANGES, ("dsv3", f"host-{number}", "down"))
    series = counted.snapshot()[metrics.HOST_CHANGES.name]
    assert len(series) == metrics.MAX_SERIES + 1
    assert sum(values[0] for values in series.values()) == metrics.MAX_SERIES + 500, "what has no series of its own is counted all the same"


def test_requests_that_are_remembered() -> None:
    kept = ring.Ring()
    for number in range(ring.KEPT + 100):
        one = Record(scope(x_request_id=f"theirs-{number}"))
        one.model, one.call_id = "m", f"ours-{number}"
        kept.keep(one)
    assert kept.find("ours-99") is None
    assert kept.find("theirs-99") is None
    for name in ("ours-100", f"theirs-{ring.KEPT + 99}"):
        assert kept.find(name) is not None


def test_guesses_at_the_admin_key(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async def guess() -> access.Throttle:
        throttle = access.Throttle()
        for _ in range(12):
            await throttle.failed("10.0.0.1")
        await throttle.failed("10.0.0.2")
        for number in range(2 * access.MAX_REMEMBERED):
            await throttle.failed(f"10.1.{number // 256}.{number % 256}")
        return throttle

    monkeypatch.setattr(asyncio, "sleep", sleep)
    throttle = asyncio.run(guess())
    assert waits == [0.5, 1, 2, 4, *[access.LONGEST_WAIT_S] * 5], "three cost nothing, and nobody waits for another's"
    assert len(throttle._failures) == access.MAX_REMEMBERED


def test_the_audit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(audit, "MAX_FILE_BYTES", 10_000)
    kept = audit.Audit(tmp_path / "state")
    for number in range(500):
        kept.write(audit.Entry(audit.now(), "ann", "10.0.0.1", f"req_{number}", "POST /admin/reload", 200))
    files = sorted((tmp_path / "state").iterdir())
    assert [file.name for file in files] == ["audit.1.jsonl", "audit.jsonl"]
    assert all(file.stat().st_size < 10_000 + 500 for file in files)
    in_the_newer = len(files[1].read_bytes().splitlines())
    last = [row["request_id"] for row in kept.last(in_the_newer + 10)]
    assert last == [f"req_{number}" for number in range(499, 489 - in_the_newer, -1)], "over both files, newest first"
    with files[1].open("ab") as out:
        out.write(b'{"at":"cut off')
    assert kept.last(1)[0]["request_id"] == "req_499"
    kept.write(audit.Entry(audit.now(), "ann", "10.0.0.1", "req_500", "POST /admin/reload", 200))
    assert [row["request_id"] for row in kept.last(2)] == ["req_500", "req_499"]


def test_an_audit_that_cannot_be_written_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "state").write_text("a file where a folder should be")
    logger = logging.getLogger("penstock.admin")
    logger.addHandler(caplog.handler)
    try:
        audit.Audit(tmp_path / "state").write(audit.Entry(audit.now(), "ann", "10.0.0.1", "req_1", "POST /admin/reload", 200))
    finally:
        logger.removeHandler(caplog.handler)
    assert "the audit cannot be written" in caplog.text


def test_the_page_is_held_against_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert list(check_docs.bounds()) == []
    page = (check_docs.ROOT / "docs" / "security.md").read_text()
    (tmp_path / "docs").mkdir()
    for folder in ("gateway", "middleware", "backends", "tests"):
        (tmp_path / folder).symlink_to(check_docs.ROOT / folder)
    monkeypatch.setattr(check_docs, "ROOT", tmp_path)
    for old, new, complaint in (
        ("| 64 kB | 431", "| 65 kB | 431", "'request line and headers, together' is bounded to 65 kB; in the code"),
        ("| 32 MB | 413", "| 32 kB | 413", "'request body' is bounded to 32 kB; in the code `security.body_limit_mb` is 3.35544e+07"),
        ("`timeouts.head_s`", "`timeouts.heads_s`", "bounded by `timeouts.heads_s`, which does not exist"),
        ("gateway.admin.api:MAX_BODY", "gateway.admin.api:MAX_BODIES", "bounded by `gateway.admin.api:MAX_BODIES`, which does not exist"),
        ("gateway.admin.api:MAX_BODY", "gateway.admin.api:log", "docs/security.md does not name the bound gateway.admin.api:MAX_BODY"),
        ("::test_series`", "::test_nobody_wrote`", "names tests/unit/test_bounds.py::test_nobody_wrote, which does not exist"),
    ):
        assert old in page
        (tmp_path / "docs" / "security.md").write_text(page.replace(old, new))
        assert any(complaint in problem for problem in check_docs.bounds()), (old, list(check_docs.bounds()))
