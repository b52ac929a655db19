#!/usr/bin/env python3
"""Documents that must follow the code: rooms in architecture.md, tables in compatibility.md, and targets and links everywhere.
(Tables that are made from the code are checked by who makes them: scripts/settings.py, scripts/observability.py.)"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from backends.sglang_dsv3 import translate
from gateway.plugin import Endpoint
from gateway.wire import requests

ROOT = Path(__file__).resolve().parents[1]


def rooms() -> Iterator[str]:
    """Modules that architecture.md does not name, by path or by the name of a folder above them."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    for file in sorted(path for top in ("gateway", "middleware", "backends", "openapi") for path in (ROOT / top).rglob("*.py")):
        path = file.relative_to(ROOT)
        folders = [f"`{folder}/`" for folder in path.parents if folder != Path()]
        row = next((line for line in text.splitlines() if f"`{path.parent}/" in line and f"`{path.name}`" in line), "")
        if path.name != "__init__.py" and f"`{path}`" not in text and not row and not any(folder in text for folder in folders):
            yield f"docs/architecture.md does not say what {path} is for"


def commands() -> Iterator[str]:
    """`make` targets and files that a document names and that are not there."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for document in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        text = document.read_text()
        for name in sorted(set(re.findall(r"`make ([a-z-]+)`", text)) - targets):
            yield f"{document.name} names `make {name}`, which does not exist"
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            if not (document.parent / link).exists():
                yield f"{document.relative_to(ROOT)} links to {link}, which does not exist"


def compatibility() -> Iterator[str]:
    """Parameters and endpoints that compatibility.md does not name, or names though they are gone."""
    text = (ROOT / "docs" / "compatibility.md").read_text()
    sections = {part.split("\n", 1)[0]: part for part in text.split("\n## ")}
    internal = set(re.findall(r"`(\w+)`", sections["Parameters internal to the engine"].split("\n\n", 2)[2]))
    chat = {
        name for row in re.findall(r"^\| (`\w+`.*?) \|", sections["Parameters of a chat completion"], re.MULTILINE) for name in _quoted(row)
    }
    served = set(re.findall(r"^\| `POST (\S+)`", sections["Endpoints"], re.MULTILINE))
    for what, listed, known in (
        ("internal parameters", internal, set(translate.INTERNAL_FIELDS)),
        ("chat parameters", chat, set(requests.ChatRequest.__struct_fields__)),
        ("endpoints", served, {endpoint.value for endpoint in Endpoint}),
    ):
        for name in sorted(listed ^ known):
            yield f"docs/compatibility.md and the code disagree on {what}: {name}"


def _quoted(text: str) -> list[str]:
    return re.findall(r"`(\w+)`", text)


def main() -> int:
    """Print what does not agree; 1 if anything."""
    problems = [*rooms(), *compatibility(), *commands()]
    print("\n".join(problems) or "documents agree with the code")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
