"""What binds a request to the host that has its prefix in its cache: a point on the ring, and a chain of hashes, one a message.

The point is the same in every worker and every gateway, so that all of them lead a session to the same host. The chain is this process's
own: it says how far two prompts are the same, and never leaves the memory of one worker (see `cached`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

# Where a request has nothing that binds it, or its model's policy does not ask.
NONE = "none"
# Where nothing but its leading messages binds it.
PREFIX = "prefix"


class Affinity:
    """`source`: what binds it, in a word for people. `point`: 64 bits. `chain[n]` stands for the first n + 1 messages, which with all
    that precedes them have `sizes[n]` bytes; the first `lead` of them end with the first one of the user."""

    __slots__ = ("chain", "lead", "point", "sizes", "source")

    def __init__(self, source: str, point: int = 0, chain: Sequence[int] = (), sizes: Sequence[int] = (), lead: int = 0) -> None:
        self.source = source
        self.point = point
        self.chain = chain
        self.sizes = sizes
        self.lead = lead


UNBOUND = Affinity(NONE)


def point(data: bytes) -> int:
    """Where it lies on the ring, from 0 to 2^64 - 1."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
