"""Text from clients and engines as people get to see it."""

from __future__ import annotations

import json
import sys
import unicodedata

import pytest

from gateway.wire.visible import visible, visible_json, visible_lines, visible_values


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("deepseek-v3", "deepseek-v3"),
        ("深度求索 é 😀", "深度求索 é 😀"),
        ("\x1b]0;owned\x07\x1b[2J", r"\x1b]0;owned\x07\x1b[2J"),
        ("a\r\n2026-11-25 I forged\tline", r"a\r\n2026-11-25 I forged\tline"),
        ("\x9b31mred, in one character", r"\x9b31mred, in one character"),
        ("gpt\u202e4o\u2066", r"gpt\u202e4o\u2066"),
        ("zero\u200bwidth\ufeff\xad", r"zero\u200bwidth\ufeff\xad"),
        ("a\u2028b\u2029c\x85d", r"a\u2028b\u2029c\x85d"),
        ("lone \ud800", r"lone \ud800"),
        ("tag \U000e0041", r"tag \U000e0041"),
        ("", ""),
    ],
)
def test_what_a_terminal_would_obey_or_hide_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_nothing_but_what_is_seen_passes() -> None:
    passed = {char for char in map(chr, range(sys.maxunicode + 1)) if visible(char) == char}
    hidden = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert not [char for char in passed if unicodedata.category(char) in hidden]
    assert visible("".join(map(chr, range(sys.maxunicode + 1)))).isprintable()


def test_json_means_the_same() -> None:
    value = {"a\x9b31m": ["\u202e\U000e0041 é 深", {"b": "\x1b\n"}, 1.5, None]}
    shown = visible_json(json.dumps(value, ensure_ascii=False).encode())
    assert shown.isprintable()
    assert json.loads(shown) == value
    assert "é 深" in shown
    assert visible_json(b'{\n  "a": 1\n}') == '{\n  "a": 1\n}'


def test_lines_stay_lines_and_values_values() -> None:
    assert visible_lines("one\n\x1btwo\r\n") == "one\n\\x1btwo\\r\n"
    assert visible_values({"\x00": ["a\n", {"b": "c\x7f"}, 3, None, True]}) == {"\\x00": ["a\\n", {"b": "c\\x7f"}, 3, None, True]}
