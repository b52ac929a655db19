"""What the store is to be told and nobody waits for: corrections of limits, slots given back, requests no longer open, rows of the ledger.
Added up for each limit and row, so that it stays small while the store is down."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from gateway.access import ledger
from gateway.access.limits.memory import microseconds
from gateway.access.limits.rules import QUOTA, RATE, SLOTS, Ask, Lease
from gateway.store.charges import Charges
from gateway.store.connect import Client, Command, Script

log = logging.getLogger("penstock.store")

_JOIN = "\x1f"
# Kinds of operations that settle.lua knows, beside those of limits.
_HASH, _CHARGE = 4, 5
# Open requests of a gateway that nobody has declared dead are forgotten after a day.
_OPEN_KEPT_S = 86400
# So many problems are told apart until the store was down.
_SAID = 1000
_pack = msgspec.msgpack.Encoder().encode


class PendingWrites:
    """A part of the pipeline. A batch whose answer was lost is sent again, and counts once."""

    def __init__(self, client: Client, me: str, keep_s: int, now: Callable[[], float]) -> None:
        self._client = client
        self._me = me
        self._keep_s = keep_s
        self._now = now
        self._script = Script("settle")
        self._batch = 0
        # Sent, and not known whether it was done.
        self._unsure: Command | None = None
        self._said: set[str] = set()
        self.charges = Charges()
        self._clear()

    def _clear(self) -> None:
        self._rates: dict[str, float] = {}
        self._slots: dict[str, list[str]] = {}
        self._quotas: dict[str, tuple[float, float]] = {}
        self._open: dict[str, int] = {}
        self.rows: ledger.Rows = {}

    def rate(self, ask: Ask, more: float) -> None:
        """So much more was taken of a rate, or less."""
        self._rates[ask.key] = self._rates.get(ask.key, 0.0) + more * ask.limit.interval

    def quota(self, ask: Ask, more: float) -> None:
        """So much more was taken of a quota, or less."""
        if more:
            self._quotas[ask.key] = (self._quotas.get(ask.key, (0.0, 0.0))[0] + more, ask.ends_s)

    def slot(self, ask: Ask, lease: Lease) -> None:
        """A slot is free."""
        self._slots.setdefault(ask.key, []).append(lease.id)

    def open(self, lease: Lease, more: int) -> None:
        """A request is open, or not any more."""
        self._open[lease.ledger_row] = self._open.get(lease.ledger_row, 0) + more

    def give_back(self, lease: Lease, still_open: bool = False) -> None:
        """All that a lease has taken, as if it had not been asked; but for its slots where the request goes on."""
        if not still_open:
            self.open(lease, -1)
        for ask in lease.asks:
            if ask.limit.kind == SLOTS:
                if not still_open:
                    self.slot(ask, lease)
            elif ask.limit.kind == QUOTA:
                self.quota(ask, -ask.cost)
            else:
                self.rate(ask, -ask.cost)

    def pending(self) -> bool:
        """See `Part`."""
        return self._unsure is not None or bool(self.rows or self._open or self._rates or self._slots or self._quotas or self.charges)

    def take(self) -> list[Command]:
        """See `Part`."""
        if self._unsure is None and self.pending():
            self._unsure = self._settlement()
            self._clear()
        return [self._unsure] if self._unsure is not None else []

    def _settlement(self) -> Command:
        keys: dict[bytes, int] = {self._client.key("batches"): 1}
        self._batch += 1
        operations: list[Any] = [self._now(), self._me, self._batch]

        def index(*parts: str) -> int:
            return keys.setdefault(self._client.key(*parts), len(keys) + 1)

        operations += (
            [_CHARGE, index("limit", key), taken, empty_in, most] for key, taken, empty_in, most in self.charges.take(microseconds())
        )
        for key, more in self._rates.items():
            operations.append([RATE, index("limit", key), more])
        for key, ids in self._slots.items():
            operations.append([SLOTS, index("limit", key), *ids])
        for key, (more, ends_s) in self._quotas.items():
            operations.append([QUOTA, index("limit", key), more, ends_s])
        if open_now := [part for row, count in self._open.items() if count for part in (row, count)]:
            operations.append([_HASH, index("open", self._me), _OPEN_KEPT_S, *open_now])
        for (day, key, model), counts in self.rows.items():
            named = [part for column, count in counts.items() for part in (f"{key}{_JOIN}{model}{_JOIN}{column}", count)]
            operations.append([_HASH, index("usage", day), self._keep_s, *named])
        return Command(self._script, list(keys), [_pack(operations)])

    def answered(self, answers: Sequence[Any]) -> None:
        """See `Part`."""
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
            for problem in answer:
                self._say(problem.decode(errors="replace"))
            self._unsure = None

    def _say(self, problem: str) -> None:
        if problem not in self._said and len(self._said) < _SAID:
            self._said.add(problem)
            log.error("what ended cannot be written into the store: %s", problem)

    def lost(self) -> None:
        """See `Part`."""
        self._said.clear()
