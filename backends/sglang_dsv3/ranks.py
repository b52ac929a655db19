"""Data-parallel ranks of one host: each has a prefix cache of its own, so a session has to come back to its rank as well as to its host.

Within a host the rank is chosen as the host is among hosts: each session has its own order of ranks (rendezvous hashing, so that one rank
more or less moves only the sessions that it must), and a rank with more than a quarter over its share of the load is passed over. The load
is what `/v1/loads` says of each rank, with what has come and gone of ours since. Calls that nothing binds are left to SGLang's own balance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from backends.sglang_dsv3.shapes import Load

# The header by which SGLang 0.5.23 takes a rank (serving_base.py); it beats the body's `routed_dp_rank`, which `/generate` has alone.
HEADER = "x-data-parallel-rank"
OVERLOAD = 1.25
_MASK = (1 << 64) - 1


class Ranks:
    """Empty where a host has one rank only."""

    def __init__(self) -> None:
        self._ours: Counter[int] = Counter()
        self._others: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._others)

    def saw(self, loads: Sequence[Load]) -> None:
        """What the engine says of each."""
        if len(loads) < 2:
            self._others = {}
            return
        self._others = {load.dp_rank: max(0, load.num_running_reqs + load.num_waiting_reqs - self._ours[load.dp_rank]) for load in loads}

    def forget(self) -> None:
        """Whoever answers there next may have others."""
        self._others = {}

    def take(self, affinity: int | None) -> int | None:
        """Whose turn it is, until `give_back`; None leaves it to the engine."""
        others = self._others
        if affinity is None or not others:
            return None
        ours = self._ours
        total = 1 + sum([count + ours[rank] for rank, count in others.items()])
        most = OVERLOAD * total / len(others) + 1
        order = sorted(others, key=lambda rank: _mixed(affinity, rank), reverse=True)
        chosen = next((rank for rank in order if others[rank] + ours[rank] < most), order[0])
        ours[chosen] += 1
        return chosen

    def give_back(self, rank: int) -> None:
        """A call there is over."""
        self._ours[rank] -= 1


def _mixed(affinity: int, rank: int) -> int:
    """A number that depends on both in all its bits (the finaliser of MurmurHash3)."""
    mixed = (affinity ^ (rank + 1) * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ mixed >> 33) * 0xFF51AFD7ED558CCD) & _MASK
    mixed = ((mixed ^ mixed >> 33) * 0xC4CEB9FE1A85EC53) & _MASK
    return mixed ^ mixed >> 33
