"""Server-sent events as bytes: a splitter with a bound, and nothing that decodes what it does not have to."""

from __future__ import annotations

import re

DONE = b"data: [DONE]\n\n"
# One event of a chat stream is a few hundred bytes; 200 kB logprobs exist; megabytes without an end are a broken peer.
MAX_EVENT_BYTES = 8 << 20
# A field whose value begins at once; the space after the colon is no part of it.
_CLOSE = re.compile(rb"^(data|event):(?=[^ \n])", re.MULTILINE)


class EventTooLarge(ValueError):
    """An event grew past the bound without ending."""


class Splitter:
    """Cuts a byte stream at blank lines into whole events.

    `feed(data)` returns the events completed by `data`, each with its closing blank line. What is incomplete waits, at most `limit` bytes.
    Events as SGLang writes them pass byte for byte. What else the standard allows comes out in the same form, so that nobody after us has
    to know of it: lines end in LF (CRLF or CR before, also when a read ends between the two), and one space follows `data:` and `event:`.
    """

    __slots__ = ("_limit", "_rest", "_return")

    def __init__(self, limit: int = MAX_EVENT_BYTES) -> None:
        self._rest = b""
        self._return = False  # the last byte was a CR: it has ended a line, and an LF that follows belongs to it
        self._limit = limit

    def feed(self, data: bytes) -> list[bytes]:
        """Whole events in `data` and what was waiting; raises EventTooLarge."""
        if self._return or b"\r" in data:
            data = self._with_line_feeds(data)
        if self._rest:
            data = self._rest + data
        # One whole event of one line, as a paced stream brings them.
        if data.find(b"\n") == len(data) - 2 > 0 and data[-1] == 10 and data[4:6] == b": ":
            self._rest = b""
            return [data]
        parts = data.split(b"\n\n")
        self._rest = parts.pop()
        if len(self._rest) > self._limit:
            raise EventTooLarge(f"an event of more than {self._limit} bytes")
        return [
            part + b"\n\n" if b"\n" not in part and part[4:6] == b": " else _CLOSE.sub(rb"\1: ", part.lstrip(b"\n")) + b"\n\n"
            for part in parts
            if part and part != b"\n"
        ]

    @property
    def pending(self) -> bytes:
        """Bytes of an event that has not ended: not empty at the end of a stream means it was cut."""
        return self._rest

    def _with_line_feeds(self, data: bytes) -> bytes:
        if self._return and data[:1] == b"\n":
            data, self._return = data[1:], False
        if data:
            self._return = data[-1] == 13
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
