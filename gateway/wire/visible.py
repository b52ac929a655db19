"""Text from elsewhere, made fit for people to read: in a terminal, a log, a page."""

from __future__ import annotations


def visible(text: str) -> str:
    """The text on one line, with every character that a terminal would obey or not show as its escape: `\\x1b`, `\\n`, `\\u202e`.

    Which those are is Unicode's word: controls, formats (marks that turn the direction of writing, or join, or show nothing), surrogates,
    private use, what is not assigned, and every separator but the space. Text that has none of them costs one look in C.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)
