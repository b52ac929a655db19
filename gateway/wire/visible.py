"""Text from elsewhere, made fit for people to read: in a terminal, a log, a page."""

from __future__ import annotations

import json
from typing import Any


def visible(text: str) -> str:
    """The text on one line, with every character that a terminal would obey or not show as its escape: `\\x1b`, `\\n`, `\\u202e`.

    Which those are is Unicode's word: controls, formats (marks that turn the direction of writing, or join, or show nothing), surrogates,
    private use, what is not assigned, and every separator but the space. Text that has none of them costs one look in C.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def visible_lines(text: str) -> str:
    """The same for a text of several lines."""
    return "\n".join(visible(line) for line in text.split("\n"))


def visible_values(value: Any) -> Any:
    """The same for every text in plain values (lists, dicts and what is in them)."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {visible_values(name): visible_values(below) for name, below in value.items()}
    return [visible_values(below) for below in value] if isinstance(value, list) else value


def visible_json(content: bytes) -> str:
    """JSON that means the same, with every such character in JSON's own escape. Raises UnicodeDecodeError."""
    text = content.decode()
    return text if text.isprintable() else "".join(one if one.isprintable() or one == "\n" else json.dumps(one)[1:-1] for one in text)
