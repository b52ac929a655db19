"""How many retries a pool affords: a share of what it is asked anyway, weighed in prompt tokens.

A count per request multiplies: three attempts everywhere turn a cluster that is too slow into one that is asked for three times as much,
and every retry of a generation repeats its whole prefill. A budget bounds the sum instead: retries cost at most `share` of the traffic of
the last WINDOW_S seconds, plus a reserve and one retry that is always allowed, so that a quiet
gateway can fail over too.
"""

from __future__ import annotations

WINDOW_S = 10.0


class Budget:
    """Deposits by requests, withdrawals by retries, both in prompt tokens; `reserve` is there in every window. No clock of its own."""

    def __init__(self, share: float, reserve: float = 0.0) -> None:
        self._share = share
        self._reserve = reserve
        self._half = 0
        # [asked, spent] of this half of the window and of the one before.
        self._sums = ([0.0, 0.0], [0.0, 0.0])

    def deposit(self, tokens: float, now: float) -> None:
        """A request has come."""
        self._turn(now)
        self._sums[0][0] += tokens

    def withdraw(self, tokens: float, now: float) -> bool:
        """Whether a retry of that size may be made; if so it is paid for."""
        self._turn(now)
        spent = self._sums[0][1] + self._sums[1][1]
        if spent > 0 and tokens > self.available(now):
            return False
        self._sums[0][1] += tokens
        return True

    def available(self, now: float) -> float:
        """Tokens that retries may still cost in this window; never negative."""
        self._turn(now)
        asked, spent = (one + two for one, two in zip(*self._sums, strict=True))
        return max(0.0, self._reserve + self._share * asked - spent)

    def _turn(self, now: float) -> None:
        half = int(now / (WINDOW_S / 2))
        if half != self._half:
            self._sums = ([0.0, 0.0], self._sums[0] if half == self._half + 1 else [0.0, 0.0])
            self._half = half
