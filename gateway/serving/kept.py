"""What a client was given of a stream, for as long as the answer may have to be continued elsewhere.

Events of one stream differ in a few bytes each. What they share is taken out of them, some at a time, and put back when it is asked for:
a thousand events of 250 bytes take 25 kB and not 290.
"""

from __future__ import annotations

from typing import Final

# What stands for what events share: bytes that JSON has only escaped.
_BEGINNING: Final = 0x00
_END: Final = 0x01


class Answer:
    """What a client was given, whole or packed with what its events share; see `unpacked`."""

    __slots__ = ("beginning", "body", "end")

    def __init__(self, body: bytes, beginning: bytes = b"", end: bytes = b"") -> None:
        self.body = body
        self.beginning = beginning
        self.end = end


class Kept:
    """Blocks in their order. Whoever relays them appends to `fresh`, and calls `pack` every now and then. `size`: bytes that were packed,
    as they were given."""

    __slots__ = ("_beginning", "_end", "_packed", "_packs", "fresh", "size")

    def __init__(self) -> None:
        self.fresh: list[bytes] = []
        self.size = 0
        self._packed = bytearray()
        self._packs = True
        self._beginning = self._end = b""

    def whole(self) -> bytes:
        """All of them."""
        return unpacked(bytes(self._packed), self._beginning, self._end) + b"".join(self.fresh)

    def answer(self) -> Answer:
        """All of them, for who looks at them elsewhere."""
        if self.fresh:
            self.pack()
        return Answer(bytes(self._packed), self._beginning, self._end)

    def pack(self) -> None:
        """Take out of the fresh blocks what they share with those before."""
        data = b"".join(self.fresh)
        self.size += len(data)
        if self._packs and (_BEGINNING in data or _END in data):  # no events of JSON: nothing is taken out any more
            self._packed = bytearray(self.whole())
            self._packs = False
            self._beginning = self._end = b""
        else:
            if self._packs and not self._beginning:
                self._beginning, self._end = _shared(self.fresh)
            if self._beginning:
                data = data.replace(self._beginning, bytes((_BEGINNING,))).replace(self._end, bytes((_END,)))
            self._packed += data
        self.fresh.clear()


def unpacked(packed: bytes, beginning: bytes, end: bytes) -> bytes:
    """Blocks as they were given."""
    if not beginning:
        return packed
    return packed.replace(bytes((_END,)), end).replace(bytes((_BEGINNING,)), beginning)


def _shared(blocks: list[bytes]) -> tuple[bytes, bytes]:
    """How the last two events that differ begin and end, up to a quote and from a quote on: words that are alike by chance are not
    shared."""
    one = blocks[-1]
    other = next((block for block in reversed(blocks) if block != one), one)
    beginning = one[: _alike(one, other)].rpartition(b'"')
    end = one[len(one) - _alike(one[::-1], other[::-1]) :].partition(b'"')
    start, rest = beginning[0] + beginning[1], end[1] + end[2]
    return (start, rest) if start and rest and len(start) + len(rest) <= min(len(one), len(other)) else (b"", b"")


def _alike(one: bytes, other: bytes) -> int:
    """How many of the first bytes are the same."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
