"""What this worker has granted and not yet settled: how many requests are open in each row of the ledger, and who holds a slot."""

from __future__ import annotations

from gateway.access.limits.rules import SLOTS, Lease


class Leases:
    """`open`: requests by ledger row; `slots`: lease ids by the key of the limit that they hold a slot of."""

    def __init__(self) -> None:
        self.open: dict[str, int] = {}
        self.slots: dict[str, set[str]] = {}
        self._ids: set[str] = set()

    def __contains__(self, lease: Lease) -> bool:
        return lease.id in self._ids

    def add(self, lease: Lease) -> None:
        """It was granted."""
        self._ids.add(lease.id)
        self.open[lease.ledger_row] = self.open.get(lease.ledger_row, 0) + 1
        for ask in lease.asks:
            if ask.limit.kind == SLOTS:
                self.slots.setdefault(ask.key, set()).add(lease.id)

    def remove(self, lease: Lease) -> None:
        """It is settled."""
        self._ids.remove(lease.id)
        self.open[lease.ledger_row] -= 1
        if not self.open[lease.ledger_row]:
            del self.open[lease.ledger_row]
        for ask in lease.asks:
            if ask.limit.kind == SLOTS:
                self.slots[ask.key].discard(lease.id)
                if not self.slots[ask.key]:
                    del self.slots[ask.key]
