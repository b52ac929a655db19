"""W3C trace context: the trace a request belongs to, and the header that hands it on."""

from __future__ import annotations

import os
import re

# Version 00 and, as the recommendation asks, whatever begins like it in a later version; ff is invalid.
_PARENT = re.compile(rb"^(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})(?:-.*)?$")
# What may stand in a header we hand on: visible ASCII and spaces. 512 characters must be kept, no more is.
_STATE = re.compile(rb"^[\x20-\x7e]{1,512}$")


class Trace:
    """One trace: `id` is 32 hex digits; `flags` and `state` are the client's, or none."""

    __slots__ = ("flags", "id", "state")

    def __init__(self, parent: bytes | None, state: bytes | None) -> None:
        found = _PARENT.match(parent) if parent else None
        self.id = found[1].decode() if found else os.urandom(16).hex()
        self.flags = found[2].decode() if found else "00"
        self.state = state.decode() if found and state and _STATE.match(state) else ""

    def headers(self) -> dict[str, str]:
        """`traceparent` with a parent id of its own, and `tracestate`, for one attempt."""
        headers = {"traceparent": f"00-{self.id}-{os.urandom(8).hex()}-{self.flags}"}
        if self.state:
            headers["tracestate"] = self.state
        return headers
