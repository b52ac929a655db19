"""What a handler of the admin API is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec

from gateway.access.keys import StoredKey
from gateway.access.limits.rules import StoreFailed
from gateway.errors import Unavailable

T = TypeVar("T")
# Status, content type, content.
Answer = tuple[int, bytes, bytes]


class Request(NamedTuple):
    """Parts of the path by name, the query, the body, what the client accepts, and whose admin key it has sent, of which role."""

    parts: Mapping[str, str]
    query: Mapping[str, str]
    content: bytes
    accept: str = ""
    operator: str = ""
    role: str = ""


Handler = Callable[[Request], Awaitable[Answer]]


class StoredKeys(Protocol):
    """The keys that were made while gateways run."""

    async def keys(self) -> tuple[dict[str, StoredKey], dict[str, str]]:
        """All of them by name, and of those that cannot be used what is wrong with them."""

    async def lost(self) -> Mapping[str, StoredKey]:
        """Those that work here and that the store has lost (or has in another state), by name."""

    async def restore(self, discard: bool) -> list[str]:
        """Put back what is lost, or give it up everywhere; the names."""

    async def create(self, key: StoredKey) -> bool:
        """False where one of that name is there already."""

    async def put(self, key: StoredKey) -> bool:
        """False where there is none of that name any more."""

    async def drop(self, name: str) -> bool:
        """False where there is none of that name."""


def as_json(value: Any, status: int = 200) -> Answer:
    """A value as JSON."""
    return status, b"application/json", msgspec.json.encode(value)


async def from_store(work: Awaitable[T]) -> T:
    """What the store answers; its failure is an answer too."""
    try:
        return await work
    except StoreFailed as error:
        raise Unavailable(f"Redis does not answer: {error}", code="store_unavailable", retry_after_s=1) from None
