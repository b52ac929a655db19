"""What documents show of `penstock plan` and `penstock engine import` is what they print; `...` stands for lines that are left out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from gateway import cli
from scripts import capacity
from tests.support.processes import ROOT
from tests.unit.test_former import HOW_TO

DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "capacity.md", ROOT / "docs" / "origin.md")


def sessions() -> Iterator[tuple[str, list[str]]]:
    """Every such command of a document, and the lines that are shown below it."""
    for document in DOCUMENTS:
        for block in re.findall(r"```console\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
            for command in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                first, *shown = command.splitlines()
                if first.startswith(("penstock plan", "penstock engine import")):
                    yield first, shown


SESSIONS = list(sessions())


@pytest.mark.parametrize(("command", "shown"), SESSIONS, ids=[command for command, _ in SESSIONS])
def test_what_is_shown_is_what_is_printed(command: str, shown: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sglang_deepseek.yaml").write_text(HOW_TO)
    words, _, file = command.partition(" > ")
    done = CliRunner().invoke(cli.main, shlex.split(words)[1:])
    printed = iter((done.stderr if file else done.stdout).splitlines())
    skips = False
    for line in shown:
        if line == "...":
            skips = True
            continue
        for found in printed:
            if found == line:
                break
            assert skips, f"{found!r} is printed where {line!r} is shown"
        else:
            raise AssertionError(f"{line!r} is not printed by {command}")
        skips = False
    assert skips or next(printed, None) is None, "more is printed"


def test_each_document_shows_some() -> None:
    assert {first for first, _ in SESSIONS} >= {
        "penstock plan V3 --gpus 4xH100-80",
        "penstock plan V3 --gpus 4xB300",
        "penstock engine import sglang_deepseek.yaml > penstock.yaml",
    }


def test_tables_and_the_picture_are_what_is_computed() -> None:
    for path, text in capacity.made().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old: run `make fix`"
