#!/usr/bin/env python3
"""Documents that must follow the code: rooms in architecture.md, tables in compatibility.md, bounds in security.md, and targets and links
everywhere. (Tables that are made from the code are checked by who makes them: scripts/settings.py, scripts/observability.py.)"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from backends.sglang_dsv3 import translate
from gateway import config
from gateway.plugin import Endpoint
from gateway.processes.http import bounds as http
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


_UNITS = {"": 1, "B": 1, "kB": 1 << 10, "MB": 1 << 20, "ms": 1e-3, "s": 1, "min": 60, "h": 3600, "days": 86400}
# What a setting's name says of its unit.
_SUFFIXES = {"_mb": 1 << 20, "_ms": 1e-3}


def bounds() -> Iterator[str]:
    """Bounds in security.md that are not the code's, tests that it names and nobody wrote, and bounds of the code that it does not name."""
    text = (ROOT / "docs" / "security.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in text.split("\n## Bounds\n")[1].splitlines() if line[:2] == "| "
    ]
    named = set()
    for row in rows[1:]:
        if len(row) != 6:
            yield f"docs/security.md: not six cells: {' | '.join(row)}"
            continue
        _, what, bound, value, _, shown_by = row
        named.add(bound.strip("`"))
        if bound.startswith("`"):
            try:
                found = _bound(bound.strip("`"))
            except (ImportError, AttributeError, KeyError, TypeError):
                yield f"docs/security.md: '{what}' is bounded by {bound}, which does not exist"
                continue
            if _amount(value) != found:
                yield f"docs/security.md: '{what}' is bounded to {value}; in the code {bound} is {found:g}"
        if shown_by != "—" and not re.fullmatch(r"`[^`]+`", shown_by):
            yield f"docs/security.md: '{what}' is shown by no test and does not say so"
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        path = ROOT / file
        if not path.exists() or not re.search(rf"^(async )?def {name}\(", path.read_text(), re.MULTILINE):
            yield f"docs/security.md names {file}::{name}, which does not exist"
    for file in sorted(path for top in ("gateway", "middleware", "backends") for path in (ROOT / top).rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for line in re.findall(r"^([A-Z_][\w, ]*)(?:: \w+)? = ", file.read_text(), re.MULTILINE):
            for name in (one.strip() for one in line.split(",")):
                if name.lstrip("_").startswith("MAX_") and f"{module}:{name}" not in named:
                    yield f"docs/security.md does not name the bound {module}:{name}"


def _bound(name: str) -> float:
    """The value of `module:CONSTANT`, or the default of a setting, in bytes, seconds or by number."""
    module, colon, constant = name.partition(":")
    if colon:
        return float(getattr(importlib.import_module(module), constant))
    value: Any = msgspec.to_builtins(config.Settings())
    for part in name.split("."):
        value = value[part]
    return float(value) * next((factor for suffix, factor in _SUFFIXES.items() if name.endswith(suffix)), 1)


def _amount(text: str) -> float | None:
    """`64 kB`, `50 ms`, `1,000`; None for what is no amount."""
    found = re.fullmatch(r"([\d.,]+) ?(\w*)", text)
    if found is None or found[2] not in _UNITS:
        return None
    return float(found[1].replace(",", "")) * _UNITS[found[2]]


def _quoted(text: str) -> list[str]:
    return re.findall(r"`(\w+)`", text)


def tests() -> Iterator[str]:
    """Tests that a document names and that are not there."""
    files = {path.stem: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for document in sorted(ROOT.glob("docs/*.md")):
        for file, name in sorted(set(re.findall(r"`(test_\w+)::(test_\w+)`", document.read_text()))):
            if f"def {name}(" not in files.get(file, ""):
                yield f"{document.name} names {file}::{name}, which does not exist"


def rows_of_http() -> Iterator[str]:
    """Rows about HTTP in compatibility.md that no test shows."""
    section = (ROOT / "docs" / "compatibility.md").read_text().split("\n## HTTP\n")[1].split("\n## ")[0]
    for line in section.splitlines():
        if line.startswith("| ") and line.split(" | ")[-1] != "test |" and not re.search(r"`test_\w+::test_\w+` \|$", line):
            yield f"docs/compatibility.md: no test shows '{line.split(' | ')[0].strip('| ')}'"


def http_bounds() -> Iterator[str]:
    """Bounds of the HTTP listener that compatibility.md does not give as the code has them."""
    text = (ROOT / "docs" / "compatibility.md").read_text()
    for name, value in vars(http).items():
        if name.isupper() and f"| `{name}` | {value:,} |" not in text:
            yield f"docs/compatibility.md does not say that {name} is {value:,}"


def main() -> int:
    """Print what does not agree; 1 if anything."""
    problems = [*rooms(), *compatibility(), *bounds(), *commands(), *tests(), *rows_of_http(), *http_bounds()]
    print("\n".join(problems) or "documents agree with the code")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
