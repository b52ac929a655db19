"""Our reading of numbers and truth values is pydantic's."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from gateway.wire import lax

DIGITS = st.text(st.sampled_from("012_+-."), max_size=6) | st.text(
    st.sampled_from("0123456789_+-. e\n\u00a0\u2003\x1c\u0664,xTtRrUuEeYyNnOoFf"), max_size=8
)
VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.integers(-3, 3).map(float) | DIGITS | st.integers().map(str)
    | st.sampled_from(["true", "FALSE", "Yes", "no", "on", "oFf", "t", "F", "y", "N", "4.0", "4.", "1_000", " 7 ", "+0.00", 1e20, 2.0**63])
    | st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(max_size=2), st.integers(), max_size=2)
)  # fmt: skip


@settings(max_examples=3000, deadline=None)
@given(VALUES)
@example(-(2.0**63))
@example(2.0**62)
@example("9" * 60)
@example(-0.0)
@example("0__0")
@example("1__0")
@example("-0-1")
def test_it_reads_as_pydantic_does(value: Any) -> None:
    assume(not (isinstance(value, str) and "-" in value.lstrip("+- \t")))
    text = json.dumps(value).encode()
    for ours, theirs in ((lax.integer, TypeAdapter(int)), (lax.boolean, TypeAdapter(bool))):
        assert _outcome(lambda ours=ours: ours(text)) == _outcome(lambda theirs=theirs: theirs.validate_python(json.loads(text)))  # type: ignore[misc]


def _outcome(read: Callable[[], Any]) -> Any:
    try:
        found = read()
    except (ValueError, ValidationError):
        return "refused"
    return type(found), found


@pytest.mark.parametrize("value", [b"1" * 101, b'"' + b"1" * 5000 + b'"', b"true" + b" " * 200])
def test_what_is_too_long_is_refused_before_it_is_read(value: bytes) -> None:
    for read in (lax.integer, lax.boolean):
        with pytest.raises(ValueError):
            read(value)
