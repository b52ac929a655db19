"""Server-sent events as bytes: a splitter with a bound, and nothing that decodes what it does not have to."""

from __future__ import annotations

from typing import Final

DONE: Final = b"data: [DONE]\n\n"
# One event of a chat stream is a few hundred bytes; 200 kB logprobs exist; megabytes without an end are a broken peer.
MAX_EVENT_BYTES: Final = 8 << 20
# As a number: of bytes `in` asks first whether they are one, and makes an exception to say that they are not.
_CR: Final = 0x0D


class EventTooLarge(ValueError):
    """An event grew past the bound without ending."""


class Splitter:
    """Cuts a byte stream at blank lines into whole events.

    `feed(data)` returns the events completed by `data`, each with its closing blank line, bytes unchanged. What is incomplete waits,
    at most `limit` bytes; every byte is looked at once, however small the pieces. Lines end in LF (what SGLang writes), CRLF or CR; the
    latter become the former, also when a read ends between the two.
    """

    __slots__ = ("_after_cr", "_limit", "_newline", "_rest")

    def __init__(self, limit: int = MAX_EVENT_BYTES) -> None:
        self._rest = bytearray()
        # Whether what waits ends with this line: the next may be blank.
        self._newline = False
        # Whether a LF that comes now belongs to the line that has ended.
        self._after_cr = False
        self._limit = limit

    def feed(self, data: bytes) -> list[bytes]:
        """Whole events in `data` and what was waiting; raises EventTooLarge."""
        if self._after_cr or _CR in data:
            data = self._with_lf(data)
        rest = self._rest
        if self._newline:
            data = b"\n" + data
        elif not rest and data.find(b"\n\n") == len(data) - 2 > 0:
            return [data]  # one whole event, as a paced stream brings them
        parts = data.split(b"\n\n")
        last = parts.pop()
        self._newline = last.endswith(b"\n")
        if self._newline:
            last = last[:-1]
        if parts and rest:
            parts[0] = bytes(rest) + parts[0]
            rest.clear()
        rest += last
        if len(rest) > self._limit:
            raise EventTooLarge(f"an event of more than {self._limit} bytes")
        return [part + b"\n\n" for part in parts if part]

    def _with_lf(self, data: bytes) -> bytes:
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
        if data:
            self._after_cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    @property
    def pending(self) -> bytes:
        """Bytes of an event that has not ended: not empty at the end of a stream means it was cut."""
        return bytes(self._rest) + (b"\n" if self._newline else b"")
