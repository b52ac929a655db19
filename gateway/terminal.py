"""The one way in which commands write to a terminal: whatever a text holds that came from elsewhere, the terminal only shows it."""

from __future__ import annotations

from collections.abc import Sequence

import click

from gateway.wire.visible import visible, visible_json, visible_lines


def say(line: str, error: bool = False) -> None:
    """One line for people, on standard output or standard error; a line end in it is shown as such."""
    click.echo(visible(line), err=error)


def say_lines(text: str, error: bool = False) -> None:
    """Several, where nothing that came from elsewhere could add one."""
    click.echo(visible_lines(text), err=error)


def say_json(content: bytes) -> None:
    """A JSON document, for people and programs alike: it means the same."""
    click.echo(visible_json(content))


def table(header: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> list[str]:
    """Columns as wide as what stands in them: words to the left, numbers to the right, None as a dash."""
    columns = [_column(name, [row[index] for row in rows]) for index, name in enumerate(header)]
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def _column(name: str, cells: Sequence[str | float | None]) -> list[str]:
    shown = [name, *("-" if cell is None else visible(cell) if isinstance(cell, str) else f"{cell:,.10g}" for cell in cells)]
    width = max(map(len, shown))
    words = any(isinstance(cell, str) for cell in cells)
    return [one.ljust(width) if words else one.rjust(width) for one in shown]


def say_table(header: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> None:
    """The same, printed."""
    for line in table(header, rows):
        click.echo(line)
