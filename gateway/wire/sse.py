"""Server-sent events as bytes: a splitter with a bound, and nothing that decodes what it does not have to."""

from __future__ import annotations

DONE = b"data: [DONE]\n\n"
# One event of a chat stream is a few hundred bytes; 200 kB logprobs exist; megabytes without an end are a broken peer.
MAX_EVENT_BYTES = 8 << 20


class EventTooLarge(ValueError):
    """An event grew past the bound without ending."""


class Splitter:
    """Cuts a byte stream at blank lines into whole events.

    `feed(data)` returns the events completed by `data`, each with its closing blank line, bytes unchanged. What is incomplete waits,
    at most `limit` bytes. LF framing (what SGLang writes); CRLF is normalised to it, also when a read ends between CR and LF.
    """

    __slots__ = ("_held", "_limit", "_rest")

    def __init__(self, limit: int = MAX_EVENT_BYTES) -> None:
        self._rest = b""
        self._held = b""  # a CR whose LF has not come yet
        self._limit = limit

    def feed(self, data: bytes) -> list[bytes]:
        """Whole events in `data` and what was waiting; raises EventTooLarge."""
        if self._held or b"\r" in data:
            data = self._held + data
            self._held = b""
            if data.endswith(b"\r"):
                data, self._held = data[:-1], b"\r"
            data = data.replace(b"\r\n", b"\n")
        if self._rest:
            data = self._rest + data
        if data.find(b"\n\n") == len(data) - 2 > 0:  # one whole event, as a paced stream brings them
            self._rest = b""
            return [data]
        parts = data.split(b"\n\n")
        self._rest = parts.pop()
        if len(self._rest) > self._limit:
            raise EventTooLarge(f"an event of more than {self._limit} bytes")
        return [part + b"\n\n" for part in parts if part]

    @property
    def pending(self) -> bytes:
        """Bytes of an event that has not ended: not empty at the end of a stream means it was cut."""
        return self._rest + self._held
