"""The splitter: whole events at every split position, bounds, and every framing that the standard allows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.wire.sse import DONE, EventTooLarge, Splitter
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


@given(
    st.lists(st.text(alphabet="ab\u00e9 :{}", min_size=1).filter(lambda word: not word.startswith(" ")), min_size=1),
    st.lists(st.integers(1, 9)),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(["", " "]),
    st.sampled_from(["", "event", "id"]),
)
def test_any_pieces_of_any_framing_give_the_same_events(words: list[str], sizes: list[int], newline: str, space: str, named: str) -> None:
    head = f"{named}:{space}a{newline}" if named else ""
    raw = "".join(f"{head}data:{space}{word}{newline}{newline}" for word in words).encode()
    splitter = Splitter()
    events: list[bytes] = []
    at = 0
    for size in [*sizes, len(raw)]:
        events += splitter.feed(raw[at : at + size])
        at += size
    plain = {"": "", "event": "event: a\n", "id": f"id:{space}a\n"}[named]
    assert events == [f"{plain}data: {word}\n\n".encode() for word in words]
    assert splitter.pending == b""


@pytest.mark.parametrize(
    ("sent", "events"),
    [
        (b"data:[DONE]\n\n", [DONE]),
        (b"data: [DONE]\r\n\r\n", [DONE]),
        (b"data:[DONE]\r\r", [DONE]),
        (b'event:message_stop\r\ndata:{"a":1}\r\n\r\n', [b'event: message_stop\ndata: {"a":1}\n\n']),
        (b"data:a\ndata:b\n\n", [b"data: a\ndata: b\n\n"]),
        (b"data: a\ndata:b\n\n", [b"data: a\ndata: b\n\n"]),
        (b"\n\n\ndata:a\n\n", [b"data: a\n\n"]),
        (b"\ndata: a\n\n", [b"data: a\n\n"]),
        (b": ping\n\n:ping\n\n", [b": ping\n\n", b":ping\n\n"]),
        (b'data: {"x":"data:y event:z"}\n\n', [b'data: {"x":"data:y event:z"}\n\n']),
        (b"data:\n\ndata: \n\n", [b"data:\n\n", b"data: \n\n"]),
        (b"metadata:x\n\n", [b"metadata:x\n\n"]),
    ],
)
def test_what_the_standard_allows_comes_out_in_one_form(sent: bytes, events: list[bytes]) -> None:
    for cut in range(len(sent) + 1):
        splitter = Splitter()
        assert splitter.feed(sent[:cut]) + splitter.feed(sent[cut:]) == events


def test_an_event_that_ends_in_a_lone_carriage_return_does_not_wait_for_more() -> None:
    splitter = Splitter()
    assert splitter.feed(b"data: 1\r\n\r") == [b"data: 1\n\n"]
    assert splitter.feed(b"\ndata: 2\r\n\r\n") == [b"data: 2\n\n"]


def test_an_event_that_never_ends_is_refused_at_the_bound() -> None:
    splitter = Splitter(limit=100)
    splitter.feed(b"data: " + b"x" * 90)
    with pytest.raises(EventTooLarge):
        splitter.feed(b"x" * 20)


def test_what_is_incomplete_is_pending() -> None:
    splitter = Splitter()
    assert splitter.feed(b"data: 1\n\ndata: 2\n") == [b"data: 1\n\n"]
    assert splitter.pending == b"data: 2\n"
