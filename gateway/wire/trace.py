"""W3C trace context: the trace a request belongs to, our span in it, and the header that hands it on."""

from __future__ import annotations

import os
import re
from typing import Final

# Version 00 and, as the recommendation asks, whatever begins like it in a later version; ff is invalid.
_PARENT = re.compile(rb"^(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-((?!0{16})[0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?$")
# What may stand in a header we hand on: visible ASCII and spaces. 512 characters must be kept, no more is.
_STATE = re.compile(rb"^[\x20-\x7e]{1,512}$")


class Trace:
    """One trace: `id` is 32 hex digits; `parent` the client's span, or ""; `state` the client's. `sampled`: the client's word, and without
    one whether the trace id's last 64 bits are below `bound`, as every participant would decide."""

    __slots__ = ("flags", "id", "parent", "sampled", "state")

    def __init__(self, parent: bytes | None, state: bytes | None, bound: int = 0) -> None:
        found = _PARENT.match(parent) if parent else None
        if found is None:
            self.id = new_id()
            self.parent = self.state = ""
            self.sampled = bound > 0 and int(self.id[16:], 16) < bound
            self.flags = "01" if self.sampled else "00"
            return
        self.id, self.parent, self.flags = found[1].decode(), found[2].decode(), found[3].decode()
        self.sampled = int(self.flags, 16) & 1 == 1
        self.state = state.decode() if state and _STATE.match(state) else ""

    def headers(self, span: str) -> dict[str, str]:
        """`traceparent` with our span as the parent, and `tracestate`, for one attempt."""
        headers = {"traceparent": f"00-{self.id}-{span}-{self.flags}"}
        if self.state:
            headers["tracestate"] = self.state
        return headers


class _Randomness:
    """The system's own random bytes, many at a time: a system call for each id would cost more than the rest of it."""

    def __init__(self) -> None:
        self._digits = ""
        self._at = 0

    def take(self, digits: int) -> str:
        """So many hex digits, never given twice."""
        if self._at + digits > len(self._digits):
            self._digits, self._at = os.urandom(4096).hex(), 0
        start = self._at
        self._at = start + digits
        return self._digits[start : start + digits]


_randomness: Final = _Randomness()


def new_id() -> str:
    """32 hex digits of the system's own randomness: nobody can guess them."""
    return _randomness.take(32)


def new_span() -> str:
    """16 hex digits; all zero, which the recommendation forbids, comes once in 2 to the 64th."""
    return _randomness.take(16)
