"""Tables of docs/compatibility.md that are made by tests."""

from __future__ import annotations

import os
import re

from tests.support.processes import ROOT

FILE = ROOT / "docs" / "compatibility.md"


def agrees(name: str, rows: list[str]) -> None:
    """Assert that the table of this name is made of these rows; with PENSTOCK_WRITE, write it."""
    block = "\n".join([f"<!-- {name} -->", *rows, f"<!-- end of {name} -->"])
    text = FILE.read_text()
    new, places = re.subn(f"<!-- {name} -->.*?<!-- end of {name} -->", lambda _: block, text, flags=re.DOTALL)
    assert places == 1
    if os.environ.get("PENSTOCK_WRITE"):
        FILE.write_text(new)
    else:
        assert new == text, f"the table '{name}' of docs/compatibility.md is old: run `PENSTOCK_WRITE=1 make conformance`"
