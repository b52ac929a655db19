"""The splitter: whole events at every split position, bounds, every line ending."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.wire.sse import EventTooLarge, Splitter
from tests.support.processes import GOLDEN


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.sse")), ids=lambda file: file.stem)
def test_events_are_the_same_at_every_split_position(file: object) -> None:
    recorded = file.read_bytes()  # type: ignore[attr-defined]
    whole = Splitter().feed(recorded)
    assert b"".join(whole) == recorded
    for cut in range(len(recorded)):
        splitter = Splitter()
        assert splitter.feed(recorded[:cut]) + splitter.feed(recorded[cut:]) == whole
        assert splitter.pending == b""


WORDS = st.lists(st.text(alphabet="ab\u00e9 :{}", min_size=1), min_size=1)


@given(WORDS, st.lists(st.integers(1, 9)), st.sampled_from(["\n", "\r\n", "\r"]))
def test_any_pieces_give_the_same_events(words: list[str], sizes: list[int], newline: str) -> None:
    raw = "".join(f"data: {word}{newline}{newline}" for word in words).encode()
    splitter = Splitter()
    events: list[bytes] = []
    at = 0
    for size in [*sizes, len(raw)]:
        events += splitter.feed(raw[at : at + size])
        at += size
    assert events == [f"data: {word}\n\n".encode() for word in words]


def test_an_event_that_never_ends_is_refused_at_the_bound() -> None:
    splitter = Splitter(limit=100)
    splitter.feed(b"data: " + b"x" * 90)
    with pytest.raises(EventTooLarge):
        splitter.feed(b"x" * 20)


def test_what_is_incomplete_is_pending() -> None:
    splitter = Splitter()
    assert splitter.feed(b"data: 1\n\ndata: 2\n") == [b"data: 1\n\n"]
    assert splitter.pending == b"data: 2\n"


def test_an_event_in_the_smallest_pieces_is_put_together_once() -> None:
    """Were what is there joined anew with each piece, this would copy 4 TB and run into the time limit of tests."""
    splitter, size = Splitter(), 3 << 20
    for _ in range(size):
        assert splitter.feed(b"x") == []
    (event,) = splitter.feed(b"\n\n")
    assert len(event) == size + 2
    assert splitter.pending == b""
