#!/usr/bin/env python3
"""Documents that must follow the code: rooms in architecture.md, settings in configuration.md, tables in compatibility.md, and targets
and links everywhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from backends.sglang_dsv3 import translate
from gateway import config
from gateway.plugin import Endpoint
from gateway.processes.http import bounds
from gateway.serving import registry
from gateway.serving.balance.settings import Health
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


def settings() -> Iterator[str]:
    """Settings that configuration.md does not list, or lists though they are gone."""
    text = (ROOT / "docs" / "configuration.md").read_text()
    core, *sections = re.split(r"^## `kind: (\w+)`$", text, flags=re.MULTILINE)
    yield from _compare(core, set(_names(config.Settings)) - {"backends.NAME"} | {"backends.NAME.kind"}, "configuration")
    for kind, body in zip(sections[::2], sections[1::2], strict=True):
        yield from _compare(body.split("\n## ")[0], set(_names(registry.plugins()[kind].Config)), f"kind {kind}")


def _names(kind: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
    for field in msgspec.structs.fields(kind):
        name = prefix + field.encode_name
        value = field.type
        if name == "models":
            yield from _names(config.ModelEntry, "models.NAME.")
        elif name == "backends":
            yield "backends.NAME"
            yield from _names(Health, "backends.NAME.health.")
        elif isinstance(value, type) and issubclass(value, msgspec.Struct):
            yield from _names(value, f"{name}.")
        else:
            yield name


def _compare(text: str, known: set[str], where: str) -> Iterator[str]:
    listed = set(re.findall(r"^\| `([\w.]+)` \|", text, flags=re.MULTILINE))
    for name in sorted(known - listed):
        yield f"docs/configuration.md ({where}) does not list {name}"
    for name in sorted(listed - known):
        yield f"docs/configuration.md ({where}) lists {name}, which does not exist"


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


def tests() -> Iterator[str]:
    """Tests that a document names and that are not there."""
    files = {path.stem: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for document in sorted(ROOT.glob("docs/*.md")):
        for file, name in sorted(set(re.findall(r"`(test_\w+)::(test_\w+)`", document.read_text()))):
            if f"def {name}(" not in files.get(file, ""):
                yield f"{document.name} names {file}::{name}, which does not exist"


def http_bounds() -> Iterator[str]:
    """Bounds of the HTTP listener that compatibility.md does not give as the code has them."""
    text = (ROOT / "docs" / "compatibility.md").read_text()
    for name, value in vars(bounds).items():
        if name.isupper() and f"| `{name}` | {value:,} |" not in text:
            yield f"docs/compatibility.md does not say that {name} is {value:,}"


def main() -> int:
    """Print what does not agree; 1 if anything."""
    problems = [*rooms(), *settings(), *compatibility(), *commands(), *tests(), *http_bounds()]
    print("\n".join(problems) or "documents agree with the code")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
