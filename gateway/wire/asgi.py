"""ASGI's shapes, named once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of that (lower-case) name."""
    for key, value in scope["headers"]:
        if key == name:
            result: bytes = value
            return result
    return None


class Connection(Protocol):
    """What our own server gives beside ASGI, as `scope["penstock.connection"]`."""

    def watch(self, gone: Callable[[], None] | None) -> None:
        """`gone` is called once, from the event loop, when the client's connection ends before its answer is complete; at once if it has.
        None stops watching."""
