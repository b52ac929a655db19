"""Who shares the store: every worker's heartbeat, which renews what it holds, and what becomes of those whose heartbeat has stopped."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from gateway.access.ledger import Days
from gateway.access.limits.rules import LEASE_S, SECOND
from gateway.store.connect import Client, Command, Script
from gateway.store.leases import Leases
from gateway.telemetry.metrics import LOST, Metrics

log = logging.getLogger("penstock.store")

# Leases are renewed four times before they would expire.
HEARTBEAT_S = LEASE_S / 4
_JOIN = "\x1f"
_pack = msgspec.msgpack.Encoder().encode


class Membership:
    """A part of the pipeline. `due`: a heartbeat goes with the next round; `gateways`: how many workers the last one has found alive;
    `ahead`: the microseconds by which time in the store is ahead of its machine's clock, which was set back by as much."""

    def __init__(self, client: Client, me: str, leases: Leases, days: Days, keep_s: int, metrics: Metrics) -> None:
        self._client = client
        self.me = me
        self._leases = leases
        self._days = days
        self._keep_s = keep_s
        self.metrics = metrics
        self._heartbeat, self._dead = Script("heartbeat"), Script("dead")
        self._sent: list[str] = []  # in this round: "" for the heartbeat, else who has died
        self._found_dead: deque[str] = deque()
        self.due = False
        self.gateways = 1
        self.ahead = 0.0

    def pending(self) -> bool:
        """See `Part`."""
        return self.due or bool(self._found_dead)

    def take(self) -> list[Command]:
        """See `Part`."""
        self._sent = []
        commands = []
        if self.due:
            self.due = False
            self._sent.append("")
            commands.append(self._say(LEASE_S))
        while self._found_dead:
            self._sent.append(self._found_dead.popleft())
            commands.append(self._lost(self._sent[-1]))
        return commands

    def farewell(self) -> list[Command]:
        """That we are not there any more; whatever is still open is lost."""
        return [self._say(0.0), self._lost(self.me)]

    def _say(self, length_s: float) -> Command:
        slots = list(self._leases.slots.items())
        keys = [self._client.key("gateways"), self._client.key("open", self.me), self._client.key("clock")]
        keys += [self._client.key("limit", key) for key, _ in slots]
        opened = [part for item in self._leases.open.items() for part in item]
        return Command(self._heartbeat, keys, [_pack([self.me, length_s * SECOND, opened, *(list(ids) for _, ids in slots)])])

    def _lost(self, name: str) -> Command:
        day = self._days.at(time.time())["day"][0]
        keys = [self._client.key(*parts) for parts in (("gateways",), ("open", name), ("usage", day), ("batches",))]
        return Command(self._dead, keys, [name, self._keep_s, f"{_JOIN}lost", f"{self.ahead:.17g}"])

    def answered(self, answers: Sequence[Any]) -> None:
        """See `Part`."""
        for name, answer in zip(self._sent, answers, strict=True):
            if isinstance(answer, Exception):
                raise answer
            if not name:
                ahead, self.gateways = float(answer[0]), int(answer[1])
                if ahead - self.ahead > SECOND:
                    log.warning("the store's clock was set back by %.0f s; limits and leases go on by time that passes", ahead / SECOND)
                self.ahead = ahead
                self._found_dead.extend(found.decode() for found in answer[2:])
            elif answer:
                self.metrics.add(LOST, amount=float(answer))
                log.error("gateway %s has died with %d requests open; they are in the ledger as lost", name, answer)

    def lost(self) -> None:
        """See `Part`. Whoever has died is found again by the next heartbeat."""
