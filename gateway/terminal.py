"""The one way in which commands write to a terminal: whatever a text holds that came from elsewhere, the terminal only shows it."""

from __future__ import annotations

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
