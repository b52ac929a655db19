"""What happened to requests, kept in the store for whoever asks at whatever gateway (`penstock explain`)."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from gateway.store.connect import Client, Command, Script
from gateway.telemetry import ring
from gateway.telemetry.record import Record

log = logging.getLogger("penstock.store")

# Of the whole deployment so many are kept, a few kilobytes each; of one worker so many may wait for the store, and go with one round.
KEPT, _WAITING, _AT_ONCE = 5000, 1000, 100
_pack = msgspec.msgpack.Encoder().encode


class Memories:
    """A part of the pipeline; nobody waits for it, and what is lost with a connection is lost."""

    def __init__(self, client: Client) -> None:
        self._keys = [client.key("requests", part) for part in ("records", "times", "ids")]
        self._script = Script("records")
        self._waiting: deque[Record] = deque(maxlen=_WAITING)

    def add(self, record: Record) -> None:
        """A request has ended; while the store is gone the oldest are forgotten."""
        self._waiting.append(record)

    def pending(self) -> bool:
        """See `Part`."""
        return bool(self._waiting)

    def take(self) -> list[Command]:
        """See `Part`."""
        given: list[Any] = [KEPT]
        for _ in range(min(len(self._waiting), _AT_ONCE)):
            record = self._waiting.popleft()
            given.append([record.call_id, record.request_id, time.time(), msgspec.json.encode(ring.summary(record)).decode()])
        return [Command(self._script, self._keys, [_pack(given)])] if len(given) > 1 else []

    def answered(self, answers: Sequence[Any]) -> None:
        """See `Part`."""
        for answer in answers:
            if isinstance(answer, Exception):
                log.error("requests cannot be remembered in the store: %s", answer)

    def lost(self) -> None:
        """See `Part`."""
