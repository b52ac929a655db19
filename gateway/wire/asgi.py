"""ASGI's shapes, named once, and what our own server offers beyond ASGI."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, Protocol

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Where a scope holds its `Connection`.
CONNECTION: Final = "penstock.connection"
# And the first header of each name, by name; a server that is not ours does without.
FIRST: Final = "penstock.headers"


class Connection(Protocol):
    """The server's end of one request: the same as `receive` and `send`, without a coroutine for what need not wait.

    Everything here may be mixed with `receive` and `send`, and after the client has left all of it does nothing.
    """

    def watch(self, gone: Callable[[], None] | None) -> None:
        """`gone` is called once, from the event loop, when the client's connection ends before the answer is complete; at once, before
        this returns, if it has ended already. None stops watching."""

    def body(self) -> bytes | None:
        """The request's whole body if all of it has arrived and nobody has received any; None says to `receive` it."""

    def write(self, block: bytes) -> bool:
        """A piece of the answer's body, after `http.response.start`; False says to `drain` before the next one."""

    async def drain(self) -> None:
        """Waits until the client has taken enough of what was written."""


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of that (lower-case) name."""
    if FIRST in scope:
        first: dict[bytes, bytes] = scope[FIRST]
        return first[name] if name in first else None  # noqa: SIM401 - in compiled code `get` is dearer
    for key, value in scope["headers"]:
        if key == name:
            result: bytes = value
            return result
    return None
