"""What may end a request from outside while it is answered: its client leaves, or the engine is silent for too long.

One timer in a worker looks at all of them a few times a second, so that a request costs no timer of its own; a limit may be overrun by
that much.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self

from gateway.errors import ClientGone, GatewayTimeout
from gateway.plugin import AttemptFailed
from gateway.wire.asgi import Connection, Receive

# How often all of them are looked at.
TICK_S = 0.05
# While every other host is full a slow one is looked at again after so long.
PATIENCE_S = 1.0
_NEVER = float("inf")

Reason = Literal["", "client gone", "engine silent", "too late"]


class Watches:
    """All requests of one event loop that are being answered."""

    def __init__(self) -> None:
        self._all: set[Watch] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def task(self) -> asyncio.Task[None] | None:
        """The one that asks. Told which loop it is asyncio need not ask for the process's id, which is a system call (Python 3.11)."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return asyncio.current_task(self._loop)

    def add(self, watch: Watch) -> None:
        """Look at it from now on."""
        self._all.add(watch)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TICK_S, self._look)

    def discard(self, watch: Watch) -> None:
        """It is over."""
        self._all.discard(watch)

    def _look(self) -> None:
        now = time.monotonic()
        try:
            for watch in list(self._all):
                if watch.until <= now:
                    watch.look(now)
        finally:  # what failed for one request is said by the loop, and must not be the last look at the others
            self._timer = asyncio.get_running_loop().call_later(TICK_S, self._look) if self._all else None


class Watch:
    """Cancels the task that entered it when the client leaves, when the engine is silent for too long, or at the request's own limit.

    Time spent waiting for a slow client is not the engine's silence: `to_client` stops the clock, `to_engine` starts it again. How long
    a client may leave its answer unread is the kernel's to watch (TCP_USER_TIMEOUT on the listening socket).
    """

    __slots__ = (
        "_connection",
        "_ended",
        "_others_are_full",
        "_receive",
        "_task",
        "_too_late_at",
        "_watcher",
        "_watches",
        "reason",
        "until",
    )

    def __init__(self, watches: Watches, connection: Connection | None, receive: Receive) -> None:
        self._watches = watches
        self._connection = connection
        self._receive = receive
        self._task: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._ended = False
        self._too_late_at = _NEVER
        self._others_are_full: Callable[[], bool] | None = None
        self.reason: Reason = ""
        # When it is to be looked at: the engine's limit or the request's own, whichever comes first.
        self.until = _NEVER

    def __enter__(self) -> Self:
        self._task = self._watches.task()
        self._watches.add(self)
        if self._connection is not None:
            self._connection.watch(self._client_gone)
        else:  # a server that is not ours
            self._watcher = asyncio.get_running_loop().create_task(self._until_disconnect())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()
        self._watches.discard(self)
        if self._watcher is not None:
            self._watcher.cancel()
        if kind is asyncio.CancelledError and self.reason == "client gone" and self._uncancelled():
            raise ClientGone from None

    def end(self) -> None:
        """The answer is complete: whatever happens to the connection now is no concern of this request."""
        if not self._ended:
            self._ended = True
            self.until = _NEVER
            if self._connection is not None:
                self._connection.watch(None)

    def begin_by(self, at: float) -> None:
        """The answer has to have begun by then."""
        self._too_late_at = self.until = at

    def attempt_by(self, at: float, others_are_full: Callable[[], bool]) -> None:
        """An attempt's first event has to be there by then, unless nobody else could do better: then it is looked at again and again."""
        self._others_are_full = others_are_full
        self.until = min(at, self._too_late_at)

    def attempt_over(self) -> None:
        """The attempt has begun or failed: only the request's own limit counts."""
        self._others_are_full = None
        self.until = self._too_late_at

    def begun(self) -> None:
        """The answer has begun: there is no limit to how long it may be."""
        self._others_are_full = None
        self._too_late_at = self.until = _NEVER

    def to_engine(self, until: float) -> None:
        """From now on it is the engine that has to say something, until then."""
        self.until = until

    def to_client(self) -> None:
        """From now on it is the client we wait for."""
        self.until = _NEVER

    def look(self, now: float) -> None:
        """A limit has come."""
        if self._others_are_full is not None and now < self._too_late_at and self._others_are_full():
            self.until = min(now + PATIENCE_S, self._too_late_at)
        else:
            self._cancel("too late" if now >= self._too_late_at else "engine silent")

    def as_failure(self, error: BaseException, words: str) -> AttemptFailed:
        """What broke an attempt: the failure itself, or the engine's silence; anybody else's cancellation is raised again."""
        if isinstance(error, AttemptFailed):
            return error
        if self.reason != "engine silent" or not self._uncancelled():
            raise error
        self.reason = ""
        if self._watcher is not None and self._watcher.done():  # both at once: then there is nobody to go on for
            self.reason = "client gone"
            raise ClientGone
        return AttemptFailed("timeout", GatewayTimeout(words))

    def was_too_late(self) -> bool:
        """Whether the cancellation that has just arrived came from the request's own limit, which it then no longer is."""
        return self.reason == "too late" and self._uncancelled()

    def _uncancelled(self) -> bool:
        assert self._task is not None
        return self._task.uncancel() == 0

    async def _until_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._client_gone()

    def _client_gone(self) -> None:
        self._cancel("client gone")

    def _cancel(self, reason: Reason) -> None:
        self.until = _NEVER
        if not self._ended and not self.reason:
            assert self._task is not None
            self.reason = reason
            self._task.cancel()
