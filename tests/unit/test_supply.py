"""What the project is made of: locked with hashes, under licences that somebody has said yes to."""

from __future__ import annotations

import re
from email.message import Message
from importlib import metadata

import pytest

from scripts import licences
from tests.support.processes import ROOT


@pytest.mark.parametrize("path", ["requirements/gateway.txt", "requirements/dev.txt", "requirements/supply.txt"])
def test_every_package_is_locked_with_its_hashes(path: str) -> None:
    entries = re.split(r"\n(?=\S)", (ROOT / path).read_text().replace("\\\n", " "))
    packages = [entry for entry in entries if "==" in entry]
    assert len(packages) > 10
    assert [entry for entry in packages if "--hash=sha256:" not in entry] == []


def test_licences_are_accepted() -> None:
    assert list(licences.problems(licences.LOCK.read_text())) == []


@pytest.mark.parametrize(
    ("headers", "accepted"),
    [
        ([("License-Expression", "MIT")], True),
        ([("License-Expression", "MIT OR GPL-3.0-only")], True),
        ([("License-Expression", "Apache-2.0 AND GPL-3.0-only")], False),
        ([("License", "GPLv3")], False),
        ([("Classifier", "License :: OSI Approved :: BSD License")], True),
        ([("Classifier", "License :: OSI Approved :: GNU Affero General Public License v3")], False),
        ([], False),
    ],
)
def test_a_licence_that_nobody_has_said_yes_to_is_refused(
    headers: list[tuple[str, str]], accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Message()
    for name, value in headers:
        told[name] = value
    monkeypatch.setattr(metadata, "metadata", lambda name: told)
    assert (list(licences.problems("thing==1.0\n")) == []) is accepted


def test_a_package_that_is_not_there_is_named() -> None:
    assert list(licences.problems("surely-not-installed==1.0 \\\n")) == ["surely-not-installed is locked and not installed"]
