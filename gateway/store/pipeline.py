"""The one pipeline to the store: whatever its parts have to say goes in rounds, one under way at a time, so that under load many decisions
share a round trip.

The store is *up*; *late* while a round takes longer than `store_timeout_ms`, until it is answered; or *down* from a round that failed,
where nothing is sent but heartbeats, until one is answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from gateway.access.limits.rules import StoreFailed
from gateway.config import Redis
from gateway.store.connect import SOCKET_TIMEOUT_S, Client, Command
from gateway.store.membership import Membership
from gateway.telemetry.metrics import STORE_FAILURES, STORE_LATE, STORE_LATENCY, STORE_UP, Metrics

log = logging.getLogger("penstock.store")

# A timer that fires because this process was busy is no sign of the store's: its answer may lie unread.
_GRACE_S = 0.002
# A server that answers drop by drop is given up after so many times what one answer may take.
_PATIENCE = 2


class Part(Protocol):
    """Something that has things to say to the store. `take` and `answered` do no I/O and never wait."""

    def pending(self) -> bool:
        """Whether there is anything for the next round."""

    def take(self) -> list[Command]:
        """What goes with the next round."""

    def answered(self, answers: Sequence[Any]) -> None:
        """One answer for each command, or a StoreRefused in its place; raises it where that means that the store is of no use."""

    def lost(self) -> None:
        """The store is down; if something of this part's was under way, nobody knows whether it was done."""


class Pipeline:
    """`up`: whether the store is used; `late`: whether the round under way is, and `on_late` is called when it becomes so; `outages`: how
    often the one ended or the other began."""

    def __init__(self, settings: Redis, client: Client, membership: Membership, metrics: Metrics) -> None:
        self._timeout_s = settings.store_timeout_ms / 1000
        self._round_s = _PATIENCE * max(SOCKET_TIMEOUT_S, self._timeout_s)
        self._consequence = settings.on_store_failure
        self._client = client
        self._membership = membership
        self._metrics = metrics
        self.parts: Sequence[Part] = ()
        self.on_late: Callable[[], None] = lambda: None
        self.up = False
        self.late = False
        self.outages = 0
        self._failure_said = False
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._watching: asyncio.TimerHandle
        self._one_at_a_time = asyncio.Lock()

    def soon(self, delay_s: float = 0.0) -> None:
        """There is something to say: now, or within `delay_s` together with whatever comes up until then."""
        if not self.up:
            return
        if not delay_s:
            self._wake.set()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._due)

    def _due(self) -> None:
        self._timer = None
        self._wake.set()

    async def run(self) -> None:
        """For ever: rounds whenever there is something to say."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self.work()

    async def work(self) -> None:
        """Rounds until there is nothing more to say, or nobody to say it to."""
        async with self._one_at_a_time:
            while self.up and any(part.pending() for part in self.parts):
                self._watch()
                try:
                    await self._round(self.parts)
                finally:
                    self._watching.cancel()
                if self.late:
                    self.late = False
                    self._membership.due = True  # which says what was opened here meanwhile

    def _watch(self) -> None:
        due = asyncio.get_running_loop().time() + self._timeout_s
        self._watching = asyncio.get_running_loop().call_at(due, self._overdue, due)

    def _overdue(self, due: float) -> None:
        loop = asyncio.get_running_loop()
        # As late as this timer has fired, so late its answer may be read.
        self._watching = loop.call_later(max(_GRACE_S, loop.time() - due), self._is_late)

    def _is_late(self) -> None:
        self.late = True
        self.outages += 1
        self._metrics.add(STORE_LATE)
        self.on_late()

    async def heartbeat(self) -> None:
        """With the next round; or alone, to find out whether the store is back."""
        self._membership.due = True
        if self.up:
            self._wake.set()
            return
        async with self._one_at_a_time:
            if await self._round([self._membership]) and not self.up:
                self._back()

    async def _round(self, parts: Sequence[Part]) -> bool:
        """Whether it was answered."""
        loop = asyncio.get_running_loop()
        taken = [(part, part.take()) for part in parts]
        began = loop.time()
        try:
            async with asyncio.timeout(self._round_s):
                answers = await self._client.run([command for _, commands in taken for command in commands])
            self._metrics.observe(STORE_LATENCY, (), loop.time() - began)
            self._answered(taken, answers)
        except StoreFailed as error:
            self.fail(error)
        except TimeoutError:
            self.fail(f"no answer within {self._round_s:g} s")
        except Exception as error:
            self.fail(f"{type(error).__name__}: {error}")
            raise
        else:
            return True
        return False

    def _answered(self, taken: Sequence[tuple[Part, Sequence[Command]]], answers: Sequence[Any]) -> None:
        failure: StoreFailed | None = None
        for part, commands in taken:
            own, answers = answers[: len(commands)], answers[len(commands) :]
            try:
                part.answered(own)
            except StoreFailed as error:  # the others' answers count all the same
                failure = error
        if failure is not None:
            raise failure

    def _back(self) -> None:
        self.up = True
        self._metrics.put(STORE_UP, 1.0)
        if self._failure_said:
            log.warning("the shared store is back")
            self._failure_said = False
        # What is still to be written was counted before this heartbeat or after: another one behind it puts right what was counted twice.
        self._membership.due = True
        self._wake.set()

    def fail(self, reason: object) -> None:
        """The store is down."""
        if not self._failure_said:
            log.error("the shared store has failed (%s): limits are now %s", reason, self._consequence)
            self._metrics.add(STORE_FAILURES)
            self._failure_said = True
        self._metrics.put(STORE_UP, 0.0)
        self.outages += self.up and not self.late
        self.up = self.late = False
        for part in self.parts:
            part.lost()
