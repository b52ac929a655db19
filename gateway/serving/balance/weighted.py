"""Smooth weighted round robin, the algorithm NGINX's `weight=` uses: exact shares over every Σ weight picks, no bursts.

Each pick adds every candidate's weight to its credit, takes the candidate with the most credit, and charges it the sum. Shares are
renormalised over whoever is a candidate, so weights 5, 1, 1 with the first one down become an even split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from gateway.plugin import Target


class _Weighted(Protocol):
    target: Target
    share: float


T = TypeVar("T", bound=_Weighted)


class WeightedRoundRobin:
    """Picks one of the candidates; state is one number per target id."""

    def __init__(self) -> None:
        self._credit: dict[str, float] = {}

    def pick(self, candidates: Sequence[T]) -> T:
        """The next target; `candidates` must not be empty. Targets that are gone are forgotten."""
        if len(candidates) == 1:
            return candidates[0]
        before, credit = self._credit, {}
        chosen, most, total = candidates[0], float("-inf"), 0.0
        for candidate in candidates:
            share, name = candidate.share, candidate.target.id
            total += share
            credit[name] = now = before.get(name, 0.0) + share
            if now > most:
                chosen, most = candidate, now
        credit[chosen.target.id] -= total
        self._credit = credit
        return chosen
