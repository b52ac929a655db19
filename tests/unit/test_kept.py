"""What is kept of a stream comes back as it was, and takes little."""

from __future__ import annotations

import sys

from hypothesis import given
from hypothesis import strategies as st

from gateway.serving.kept import Kept

EVENT = (
    b'data: {"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1,"model":"deepseek-v3","choices":[{"index":0,'
    b'"delta":{"reasoning_content":null,"content":"%s"},"logprobs":null,"finish_reason":null,"matched_stop":null}]}\n\n'
)


def test_a_thousand_events_take_a_tenth_of_their_size() -> None:
    events = [EVENT % b" the"] * 20 + [EVENT % f" word{number}".encode() for number in range(1000)]
    kept = Kept()
    for number, event in enumerate(events, 1):
        kept.fresh.append(event)
        if not number % 16:
            kept.pack()
    kept.pack()
    assert kept.whole() == b"".join(events)
    assert kept.size == len(kept.whole())
    assert sys.getsizeof(kept._packed) < kept.size / 10


PIECES = [EVENT % b"a", EVENT % b"", b": comment\n\n", b"\x00", b"\x01\x00", EVENT * 20, EVENT[:90], EVENT[90:], b'"', b'""', b""]


@given(
    st.lists(
        st.one_of(st.binary(max_size=40), st.binary(max_size=12).map(lambda word: EVENT % word), st.sampled_from(PIECES)), max_size=80
    ),
    st.integers(1, 20),
)
def test_whatever_is_kept_comes_back(blocks: list[bytes], every: int) -> None:
    kept = Kept()
    for number, block in enumerate(blocks, 1):
        kept.fresh.append(block)
        if not number % every:
            kept.pack()
            assert kept.whole() == b"".join(blocks[:number])
            assert kept.size == len(kept.whole())
    assert kept.whole() == b"".join(blocks)
