#!/usr/bin/env python3
"""Write the tables of docs/observability.md from the code, or with --check say whether they are what it makes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from gateway.telemetry import log, metrics
from gateway.telemetry import tracer as telemetry
from gateway.telemetry.record import OUTCOMES, PHASES

FILE = Path(__file__).resolve().parents[1] / "docs" / "observability.md"


def series() -> Iterator[str]:
    """Every series of `/metrics`."""
    yield "| series | kind | labels | |"
    yield "|---|---|---|---|"
    for family in metrics.FAMILIES:
        labels = ", ".join(f"`{label}`" for label in family.labels)
        yield f"| `{family.name}` | {family.kind} | {labels} | {family.help} |"


def attributes() -> Iterator[str]:
    """Every attribute of a span."""
    yield "| attribute | of |"
    yield "|---|---|"
    phases = {f"penstock.phase.{name}_ms" for name in PHASES}
    for name, of in telemetry.ATTRIBUTES.items():
        if name not in phases:
            yield f"| `{name}` | {of} |"
    yield f"| `penstock.phase.NAME_ms` | SERVER: time spent there; all of them add up to the span. NAME: {', '.join(PHASES)} |"


def fields() -> Iterator[str]:
    """Every field of a request's line in the log."""
    yield "| field | |"
    yield "|---|---|"
    for name, words in log.FIELDS.items():
        yield f"| `{name}` | {words} |"


def outcomes() -> Iterator[str]:
    """How a request may end."""
    yield "| outcome | |"
    yield "|---|---|"
    for name, words in OUTCOMES.items():
        yield f"| `{name}` | {words} |"


SECTIONS = {"series": series, "attributes": attributes, "fields": fields, "outcomes": outcomes}


def main() -> int:
    """Write, or check."""
    text = FILE.read_text()
    for name, rows in SECTIONS.items():
        block = f"<!-- {name} -->\n" + "\n".join(rows()) + f"\n<!-- end of {name} -->"
        text, found = re.subn(rf"<!-- {name} -->.*?<!-- end of {name} -->", lambda _, block=block: block, text, flags=re.DOTALL)
        if not found:
            print(f"docs/observability.md has no place for {name}")
            return 1
    if "--check" in sys.argv[1:]:
        if text != FILE.read_text():
            print("docs/observability.md is old: run `make fix`")
            return 1
        return 0
    FILE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
