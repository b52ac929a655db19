"""Which of several eligible targets is next. Weights are shares among whoever is eligible: 5, 1, 1 without the first is an even split.

- `two_choices`: two drawn by weight, the one with fewer requests in flight for its weight wins. Follows load without herding.
- `weighted_round_robin`: smooth and exact, 5:3:2 over every ten picks, whatever the load.
- `affinity`: a session meets the target that has its prefix in its cache. A target that holds most of the prompt as far as we know is
  asked first, the session's place on a ring decides among several, and where nobody holds it (consistent hashing). Whoever has more than
  a quarter over its share of the load is passed over, so that a popular prefix makes no hot spot. A request that nothing binds goes by
  `two_choices`.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol, TypeVar

from gateway.plugin import Target
from gateway.serving.balance import affinity
from gateway.serving.balance.affinity import Affinity
from gateway.serving.balance.cached import Placement, Prefixes
from gateway.serving.balance.weighted import WeightedRoundRobin

# A target's points on the ring, at average weight: shares are within a tenth of the weights.
POINTS = 160
# How far over its share of the load a favourite may be (bounded loads, Mirrokni et al. 2016, epsilon = 0.25).
OVERLOAD = 1.25
# Whoever holds this share of a prompt is asked before its place on the ring. Less is a beginning that many share, and following that would
# send everybody to whoever had it first.
HELD = 0.5
# Who holds nearly as much as the one that holds most is as good.
NEARLY = 0.8


class Candidate(Protocol):
    """An eligible target as a policy sees it."""

    target: Target
    in_flight: int
    # Requests there that are not ours.
    others: float
    share: float


C = TypeVar("C", bound=Candidate)


class Policy(Protocol):
    """Picks one of the candidates, which are never none; `bound` is what binds the request."""

    def pick(self, candidates: Sequence[C], bound: Affinity) -> C:
        """The next target."""


class First:
    """Whoever comes first, for asking whether there is anybody; leaves no trace in another policy's state."""

    def pick(self, candidates: Sequence[C], bound: Affinity) -> C:
        """See `Policy`."""
        return candidates[0]


class TwoChoices:
    """The default."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._of: Sequence[object] | None = None
        self._sums: list[float] = []

    def pick(self, candidates: Sequence[C], bound: Affinity) -> C:
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
        ours, theirs = first.in_flight + first.others, second.in_flight + second.others
        return second if theirs * first.share < ours * second.share else first


class RoundRobin:
    """Smooth weighted round robin as a policy."""

    def __init__(self) -> None:
        self._turn = WeightedRoundRobin()

    def pick(self, candidates: Sequence[C], bound: Affinity) -> C:
        """See `Policy`."""
        return self._turn.pick(candidates)


class Affine:
    """A ring of all targets it has been shown, rebuilt when these change, and an index of what they hold."""

    def __init__(self, chance: random.Random) -> None:
        self._unbound = TwoChoices(chance)
        self._index = Prefixes()
        self._of: tuple[tuple[str, float], ...] = ()
        self._seen: Sequence[object] | None = None
        # Those whose engines' word on their caches was taken.
        self._heard: Sequence[object] | None = None
        self._shares = 0.0
        self._points: list[int] = []
        self._owners: list[str] = []

    def place(self, bound: Affinity, host: str) -> Placement:
        """A request goes there, whoever has picked it."""
        return self._index.place(bound, host)

    def pick(self, candidates: Sequence[C], bound: Affinity) -> C:
        """See `Policy`."""
        if candidates is not self._heard:
            self._heard = candidates
            for candidate in candidates:
                if candidate.target.cache_since:
                    self._index.told(candidate.target.id, candidate.target.cache_since)
        if len(candidates) == 1:
            return candidates[0]
        if bound.source == affinity.NONE:
            return self._unbound.pick(candidates, bound)
        if candidates is not self._seen:
            known = tuple((candidate.target.id, candidate.share) for candidate in candidates)
            if known != self._of:
                self._build(known)
            self._seen = candidates
            self._shares = sum(candidate.share for candidate in candidates)
        eligible: dict[str, C] = {}
        load = 1.0
        for candidate in candidates:
            load += candidate.in_flight + candidate.others
            eligible[candidate.target.id] = candidate
        # A load of a few requests is no reason to leave a warm cache: each may always have one more than its share.
        most = OVERLOAD * load / self._shares
        holding = self._holding(bound, eligible)
        start = bisect.bisect(self._points, bound.point)
        seen: set[str] = set()
        fallback: C | None = None
        for step in range(len(self._owners)):
            owner = self._owners[(start + step) % len(self._owners)]
            if owner in seen:
                continue
            seen.add(owner)
            found = eligible[owner]
            if found.in_flight + found.others < most * found.share + 1:
                if not holding or owner in holding:
                    return found
                fallback = fallback or found
            if len(seen) == len(eligible):
                break
        if fallback is not None:
            return fallback
        return min(candidates, key=lambda candidate: (candidate.in_flight + candidate.others) / candidate.share)

    def _holding(self, bound: Affinity, eligible: dict[str, C]) -> set[str]:
        """Who holds most of the prompt."""
        if not bound.chain:
            return set()
        held = self._index.held(bound, eligible, HELD * NEARLY * bound.sizes[-1])
        if not held:
            return set()
        longest = max(held.values())
        if longest < HELD * bound.sizes[-1]:
            return set()
        return {host for host, size in held.items() if size >= NEARLY * longest}

    def _build(self, known: tuple[tuple[str, float], ...]) -> None:
        average = sum(share for _, share in known) / len(known)
        ring = sorted(
            (affinity.point(f"{name}#{number}".encode()), name)
            for name, share in known
            for number in range(max(1, round(POINTS * share / average)))
        )
        self._of = known
        self._points, self._owners = [point for point, _ in ring], [name for _, name in ring]


NAMES = ("affinity", "two_choices", "weighted_round_robin", "prefix_affinity")


def make(name: str, chance: random.Random) -> Policy:
    """The policy of that name, with a state of its own; `prefix_affinity` is `affinity` with nothing but leading messages to go by."""
    if name == "weighted_round_robin":
        return RoundRobin()
    return TwoChoices(chance) if name == "two_choices" else Affine(chance)
