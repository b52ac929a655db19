"""Which of several eligible targets is next. Weights are shares among whoever is eligible: 5, 1, 1 without the first is an even split.

- `two_choices`: two drawn by weight, the one with fewer requests in flight for its weight wins. Follows load without herding.
- `weighted_round_robin`: smooth and exact, 5:3:2 over every ten picks, whatever the load.
- `prefix_affinity`: the same leading messages meet the same target (its prefix cache), by consistent hashing, unless it has more than
  a quarter over its share of the load: then the next on the ring, so that a popular prefix makes no hot spot.
"""

from __future__ import annotations

import bisect
import hashlib
import random
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol, TypeVar

from gateway.plugin import Target
from gateway.serving.balance.weighted import WeightedRoundRobin

# A target's points on the ring, at average weight: shares are within a tenth of the weights.
POINTS = 160
# How far over its share of the load a favourite may be (bounded loads, Mirrokni et al. 2016, epsilon = 0.25).
OVERLOAD = 1.25


class Candidate(Protocol):
    """An eligible target as a policy sees it."""

    target: Target
    in_flight: int
    share: float


C = TypeVar("C", bound=Candidate)


class Policy(Protocol):
    """Picks one of the candidates, which are never none; `key` stands for the leading messages."""

    def pick(self, candidates: Sequence[C], key: bytes) -> C:
        """The next target."""


class First:
    """Whoever comes first, for asking whether there is anybody; leaves no trace in another policy's state."""

    def pick(self, candidates: Sequence[C], key: bytes) -> C:
        """See `Policy`."""
        return candidates[0]


class TwoChoices:
    """The default."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._of: Sequence[object] | None = None
        self._sums: list[float] = []

    def pick(self, candidates: Sequence[C], key: bytes) -> C:
        """See `Policy`."""
        if len(candidates) == 1:
            return candidates[0]
        if candidates is not self._of:
            self._of, self._sums = candidates, list(accumulate(candidate.share for candidate in candidates))
        sums, last = self._sums, len(candidates) - 1
        index = min(bisect.bisect_right(sums, self._chance.random() * sums[-1]), last)
        first = candidates[index]
        # The second out of what is left, as if the first one's stretch were not there.
        before = sums[index - 1] if index else 0.0
        at = self._chance.random() * (sums[-1] - first.share)
        if at >= before:
            at += first.share
        other = min(bisect.bisect_right(sums, at), last)
        second = candidates[other if other != index else (index + 1) % len(candidates)]
        return second if second.in_flight * first.share < first.in_flight * second.share else first


class RoundRobin:
    """Smooth weighted round robin as a policy."""

    def __init__(self) -> None:
        self._turn = WeightedRoundRobin()

    def pick(self, candidates: Sequence[C], key: bytes) -> C:
        """See `Policy`."""
        return self._turn.pick(candidates)


class PrefixAffinity:
    """A ring of all targets it has been shown; rebuilt when these change."""

    def __init__(self) -> None:
        self._of: tuple[tuple[str, float], ...] = ()
        self._seen: Sequence[object] | None = None
        self._shares = 0.0
        self._points: list[int] = []
        self._owners: list[str] = []

    def pick(self, candidates: Sequence[C], key: bytes) -> C:
        """See `Policy`."""
        if candidates is not self._seen:
            known = tuple((candidate.target.id, candidate.share) for candidate in candidates)
            if known != self._of:
                self._build(known)
            self._seen = candidates
            self._shares = sum(candidate.share for candidate in candidates)
        shares = self._shares
        eligible: dict[str, C] = {}
        load = 1
        for candidate in candidates:
            load += candidate.in_flight
            eligible[candidate.target.id] = candidate
        start = bisect.bisect(self._points, _hash(key))
        seen: set[str] = set()
        for step in range(len(self._owners)):
            owner = self._owners[(start + step) % len(self._owners)]
            if owner in seen:
                continue
            seen.add(owner)
            found = eligible[owner]
            # A load of a few requests is no reason to leave a warm cache: each may always have one more than its share.
            if found.in_flight < OVERLOAD * load * found.share / shares + 1:
                return found
            if len(seen) == len(eligible):
                break
        return min(candidates, key=lambda candidate: candidate.in_flight / candidate.share)

    def _build(self, known: tuple[tuple[str, float], ...]) -> None:
        average = sum(share for _, share in known) / len(known)
        ring = sorted(
            (_hash(f"{name}#{number}".encode()), name) for name, share in known for number in range(max(1, round(POINTS * share / average)))
        )
        self._of = known
        self._points, self._owners = [point for point, _ in ring], [name for _, name in ring]


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


NAMES = ("two_choices", "weighted_round_robin", "prefix_affinity")


def make(name: str, chance: random.Random) -> Policy:
    """The policy of that name, with a state of its own."""
    if name == "weighted_round_robin":
        return RoundRobin()
    return PrefixAffinity() if name == "prefix_affinity" else TwoChoices(chance)
