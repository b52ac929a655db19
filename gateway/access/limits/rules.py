"""Limits as numbers, what a request asks of them, what it is told, and the contract of a store that keeps them.

A *rate* is a GCRA (generic cell rate algorithm): a bucket that holds `burst` and drains at an even rate, kept as one number, the time at
which it will be empty. There are no windows, so there are no edges to gather at. *Slots* are leases that expire by themselves. A *quota*
is a counter for a calendar day or month. All times here are microseconds, which a double keeps exactly until the year 2255.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, Protocol, final

# A lease is renewed four times before it would expire; a gateway that was killed gives its slots back after this.
LEASE_S = 10.0
# Money is counted in whole thousand-millionths of its unit.
NANO: Final = 1e9
SECOND: Final = 1_000_000.0

# How a limit is kept; the numbers are what the scripts in `gateway/store` know. Final, so that compiled code does not look them up.
RATE: Final = 1
SLOTS: Final = 2
QUOTA: Final = 3


class Unit(enum.StrEnum):
    """What is counted; the value is the setting's name."""

    REQUESTS = "rpm"
    TOKENS = "tpm"
    IN_FLIGHT = "max_in_flight"
    DAY = "tokens_per_day"
    MONEY = "budget"


@final
class Limit:
    """One bound. `key` names its state in a store; a quota's `period` is `day` or `month`, and stands in the key while it lasts.

    A rate of `amount` a minute: `interval` is the time one unit takes to drain, `tolerance` the time a full burst takes, `burst` what may
    be taken at once. `each`: whether every request takes one, whatever it holds. Never changed once it is made; no named tuple, since
    compiled code reads an attribute of its own class in one step.
    """

    __slots__ = ("amount", "amount_shown", "burst", "each", "interval", "key", "kind", "label", "period", "tolerance", "unit", "whose")

    def __init__(
        self,
        key: str,
        whose: str,
        unit: Unit,
        kind: int,
        amount: float,
        interval: float = 0.0,
        tolerance: float = 0.0,
        burst: float = 0.0,
        period: str = "",
        each: bool = False,
    ) -> None:
        self.key = key
        self.whose = whose
        self.unit = unit
        self.kind = kind
        self.amount = amount
        self.interval = interval
        self.tolerance = tolerance
        self.burst = burst
        self.period = period
        self.each = each
        # What every request is told of it.
        self.label = f"{whose}: {unit}"
        self.amount_shown = b"%d" % amount


def rate(key: str, whose: str, unit: Unit, per_minute: float, burst_s: float) -> Limit:
    """So much a minute, evenly; at once as much as comes in `burst_s` seconds, and never less than one."""
    interval = 60 * SECOND / per_minute
    tolerance = max(burst_s * SECOND, interval)
    return Limit(key, whose, unit, RATE, per_minute, interval, tolerance, tolerance / interval, each=unit is Unit.REQUESTS)


def slots(key: str, whose: str, amount: int) -> Limit:
    """So many at once."""
    return Limit(key, whose, Unit.IN_FLIGHT, SLOTS, amount, each=True)


def quota(key: str, whose: str, unit: Unit, amount: float, period: str) -> Limit:
    """So much a calendar day or month."""
    return Limit(key, whose, unit, QUOTA, amount, period=period)


@final
class Ask:
    """What a request wants of one limit. `key`: the limit's, with a quota's period; `ends_s`: seconds until that period ends."""

    __slots__ = ("cost", "ends_s", "key", "limit")

    def __init__(self, key: str, limit: Limit, cost: float, ends_s: float = 0.0) -> None:
        self.key = key
        self.limit = limit
        self.cost = cost
        self.ends_s = ends_s


# How a limit stands after a decision: what is left, and the microseconds until nothing of it is used.
State = tuple[float, float]


@final
class Decision:
    """Granted when `refused` is None; else the limit in the way, and the microseconds after which the same request would pass (rates)."""

    __slots__ = ("refused", "states", "wait")

    def __init__(self, refused: Limit | None, wait: float, states: Sequence[State]) -> None:
        self.refused = refused
        self.wait = wait
        self.states = states


@final
class Lease:
    """What a granted request holds until it is settled. `outage`: None where the store granted it; where it was decided here because a
    shared store did not answer, the number of that outage."""

    __slots__ = ("asks", "id", "key", "ledger_row", "model", "outage")

    def __init__(self, id: str, key: str, model: str, asks: Sequence[Ask]) -> None:
        self.id = id
        self.key = key
        self.model = model
        # Under which name it is counted while it is open, should its gateway die.
        self.ledger_row = f"{key}\x1f{model}"
        self.asks = asks
        self.outage: int | None = None


class Row(NamedTuple):
    """What a settled request adds to the ledger: `counts` by column of `gateway.access.ledger`."""

    day: str
    key: str
    model: str
    counts: Mapping[str, int]


class StoreFailed(Exception):
    """The shared store does not answer, or cannot serve us whatever we ask."""


class StoreRefused(StoreFailed):
    """It answers, but not this one question: what it holds there is nothing that we wrote."""


class Store(Protocol):
    """Where limits are kept. `admit` takes all or nothing; `settle` corrects what was taken, gives slots back and counts."""

    async def open(self) -> None:
        """Get ready; succeeds with the shared store down."""

    async def admit(self, lease: Lease) -> Decision:
        """Take what the lease asks for, or say which limit is in the way. Raises StoreFailed."""

    def settle(self, lease: Lease, costs: Sequence[float], row: Row) -> None:
        """The true costs, in the order of the lease's asks. Never fails and never waits."""

    async def peek(self, asks: Sequence[Ask]) -> Sequence[State]:
        """How rates and quotas stand (no slots); nothing is taken. Raises StoreFailed."""

    def count(self, row: Row) -> None:
        """For the ledger alone: nothing was taken. Never fails and never waits."""

    async def aclose(self) -> None:
        """Write what is owed, and let go."""
