"""What all connections of a server have in common."""

from __future__ import annotations

import asyncio
from email.utils import formatdate
from typing import TYPE_CHECKING, Any, Protocol

from gateway.wire.asgi import App

if TYPE_CHECKING:
    from gateway.processes.http.connection import Connection


class Life(Protocol):
    """What a connection asks of the worker's life: whether connections stay open after an answer."""

    keep: bool


class Shared:
    """Whom to hand requests to, how long a request's head may take (seconds), who is connected, and what is being answered. `most`: so many
    connections are served, a quarter as many again are told that there are too many, and what comes then is closed."""

    def __init__(self, app: App, life: Life, head_s: float, most: int) -> None:
        self.app = app
        self.life = life
        self.head_s = head_s
        self.most = most
        self.loop: Any = None
        self.connections: set[Connection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        # The header, line end included, as of this second.
        self.date = b""
        # Host headers that were found sound.
        self.hosts: set[bytes] = set()

    def tick(self) -> None:
        """Another second has come."""
        self.date = b"date: " + formatdate(usegmt=True).encode() + b"\r\n"
