"""How much memory the bodies of requests may take together, in one worker, and whose turn it is to be refused."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from gateway.errors import LimitReached, Unavailable

# What a worker gives to the bodies of requests, as they come; decoding and sending them on takes the same again.
BODY_MEMORY_BYTES = 256 << 20
# What is smaller is not counted: it takes no more than the rest of what a request holds.
COUNTED_BYTES = 16 << 10
# A key may hold so many times of what it leaves: two thirds where it is alone, with n others 2/(2n+3) each, and some is always left for
# one that comes new (Choudhury and Hahne's dynamic threshold). So the largest body must be no more than two thirds of all.
_SHARE = 2
# The rest of a body that is refused is not read.
_UNREAD = ((b"connection", b"close"),)


class BodyMemory:
    """The bytes of all bodies that a worker is reading, or holds for a request under way, by key."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held: dict[str, int] = {}
        self.total = 0

    def lease(self, key: str) -> BodyLease:
        """What one request of this key will hold; to be entered."""
        return BodyLease(self, key)

    def take(self, key: str, size: int) -> None:
        """Count `size` bytes more; raises Unavailable where there is no room for anybody, LimitReached where this key has had its share."""
        left = self._limit_bytes - self.total
        if size > left:
            raise Unavailable(
                "The gateway holds as many request bodies as it may.", code="bodies_overloaded", retry_after_s=1, headers=list(_UNREAD)
            )
        held = self._held.get(key, 0)
        if held + size > _SHARE * (left - size):
            raise LimitReached(
                "Your requests' bodies take as much of the gateway's memory as they may together. Please try again in 1s.",
                type="requests",
                retry_after_s=1,
                headers=list(_UNREAD),
            )
        self._held[key] = held + size
        self.total += size

    def give_back(self, key: str, size: int) -> None:
        """The opposite of `take`."""
        self.total -= size
        left = self._held[key] - size
        if left:
            self._held[key] = left
        else:
            del self._held[key]


class BodyLease:
    """What one request's body holds, given back when it is left."""

    __slots__ = ("_key", "_memory", "_size")

    def __init__(self, memory: BodyMemory, key: str) -> None:
        self._memory = memory
        self._key = key
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    def end(self) -> None:
        """The body is let go of."""
        if self._size:
            self._memory.give_back(self._key, self._size)
            self._size = 0

    def grow(self, size: int) -> None:
        """The body has `size` bytes by now, or will have; raises what `BodyMemory.take` raises."""
        if size > COUNTED_BYTES and size > self._size:
            self._memory.take(self._key, size - self._size)
            self._size = size
