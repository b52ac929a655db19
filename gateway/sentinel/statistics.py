"""Which hosts' answers are worse than the others': counts of a while, and a test of each host against the rest.

What is counted is conversations and not answers: those of one conversation go to one host and are alike, so the second says nothing that
the first has not said. A host is under alert for a rule when

- it and all others that serve the same weights have had `min_sample` conversations each,
- Fisher's exact test, one-sided, finds a share like its own, or a larger one, among equals with a probability of at most ALPHA, divided by
  the number of tests that are made while a window passes: rules x hosts x looks (Bonferroni), and
- the difference is worth a call at night: at least LEAST_SHARE of its answers, and TIMES as many as the others'.

So among equal hosts a false alarm comes at most once in 1 / ALPHA windows, whatever the rules' own errors, which hosts share; the bound
holds for any dependence between the tests. Who is under alert is no measure for the others, so that one that is very bad hides none. An
alert ends when its difference does, or when the host has had no answers for a window.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

ALPHA = 1e-3
LEAST_SHARE = 0.02
TIMES = 3.0
# Conversations that are told apart, of all hosts together: beyond it the window becomes shorter.
MAX_UNITS = 100_000
# An alert that is on holds on while its host is so many times as bad as the others.
_STILL = 1.5

# Of whom: backend, weights, host.
Place = tuple[str, str, str]


class Share(NamedTuple):
    """Of so many so many were bad."""

    bad: int
    of: int

    @property
    def part(self) -> float:
        """From 0 to 1."""
        return self.bad / self.of if self.of else 0.0


_NONE = Share(0, 0)


class Alert(NamedTuple):
    """A host, its rule, how it stands and how the others do, by answers; and the test's probability, by conversations."""

    place: Place
    rule: str
    own: Share
    others: Share
    p: float


class _Half:
    """Half a window. By place: of each conversation the rules that it was held to and those that it broke, as bits; conversations, and
    answers, counted by rule, [all, bad]."""

    def __init__(self) -> None:
        self.units: dict[Place, dict[int | str, list[int]]] = {}
        self.conversations: dict[Place, dict[str, list[int]]] = {}
        self.answers: dict[Place, dict[str, list[int]]] = {}
        self.size = 0


class Window:
    """Counts of the last `window_s`, and of up to half of that beyond. No clock of its own; times in seconds."""

    def __init__(self, rules: Sequence[str], window_s: float, min_sample: int, looks: float) -> None:
        self._bits = {rule: 1 << number for number, rule in enumerate(rules)}
        self._window_s = window_s
        self._min_sample = min_sample
        # How often it is looked at while a window and its rest pass.
        self._looks = max(1.0, looks * 1.5)
        self._halves = [_Half(), _Half(), _Half()]
        self._turned_at = float("-inf")
        self._on: set[tuple[Place, str]] = set()

    def count(self, place: Place, unit: int | str, applied: Sequence[str], broken: Sequence[str], now: float) -> None:
        """An answer was judged."""
        self.turn(now)
        half = self._halves[0]
        answers = half.answers.setdefault(place, {})
        for rule in applied:
            found = answers.setdefault(rule, [0, 0])
            found[0] += 1
            found[1] += rule in broken
        home = next((each for each in self._halves if unit in each.units.get(place, {})), half)
        units = home.units.setdefault(place, {})
        if unit not in units:
            units[unit] = [0, 0]
            home.size += 1
        known, counted = units[unit], home.conversations.setdefault(place, {})
        for number, rules in enumerate((applied, broken)):
            for rule in rules:
                if not known[number] & self._bits[rule]:
                    known[number] |= self._bits[rule]
                    counted.setdefault(rule, [0, 0])[number] += 1

    def turn(self, now: float) -> None:
        """Forget what is too old."""
        if now - self._turned_at >= self._window_s / 2 or self._halves[0].size >= MAX_UNITS // len(self._halves):
            gone = now - self._turned_at >= 2 * self._window_s
            self._halves = [_Half(), *([_Half(), _Half()] if gone else self._halves[:2])]
            self._turned_at = now

    def places(self) -> list[Place]:
        """Everybody who has answered."""
        return list(dict.fromkeys(place for half in self._halves for place in half.answers))

    def shares(self, place: Place) -> dict[str, Share]:
        """Of its answers, by rule."""
        return _added(half.answers.get(place, {}) for half in self._halves)

    def _conversations(self, place: Place) -> dict[str, Share]:
        return _added(half.conversations.get(place, {}) for half in self._halves)

    def look(self, now: float) -> list[Alert]:
        """Everybody who is under alert now, the worst first."""
        self.turn(now)
        places = self.places()
        level = ALPHA / (len(self._bits) * max(2, len(places)) * self._looks)
        found = [alert for group in _groups(places) for alert in self._compare(group, level)]
        self._on = {(alert.place, alert.rule) for alert in found}
        return sorted(found, key=lambda alert: alert.p)

    def _compare(self, places: list[Place], level: float) -> Iterator[Alert]:
        by_answers = {place: self.shares(place) for place in places}
        units = {place: self._conversations(place) for place in places}
        for rule in self._bits:
            # The worst first: whoever is under alert is no measure for the next one.
            equals = set(places)
            for place in sorted(places, key=lambda place: -by_answers[place].get(rule, _NONE).part):
                own, one = by_answers[place].get(rule, _NONE), units[place].get(rule, _NONE)
                if not own.bad:
                    continue
                rest = _sum(by_answers[other].get(rule, _NONE) for other in equals if other != place)
                others = _sum(units[other].get(rule, _NONE) for other in equals if other != place)
                on = (place, rule) in self._on
                if min(one.of, others.of) < self._min_sample or own.part < LEAST_SHARE / (2 if on else 1):
                    continue
                if own.part < (_STILL if on else TIMES) * rest.part:
                    continue
                p = fisher(one, others)
                if p <= level or on:
                    equals.discard(place)
                    yield Alert(place, rule, own, rest, p)


def _groups(places: list[Place]) -> list[list[Place]]:
    """Those that serve the same."""
    found: dict[tuple[str, str], list[Place]] = {}
    for place in places:
        found.setdefault(place[:2], []).append(place)
    return [group for group in found.values() if len(group) > 1]


def _added(halves: Iterable[dict[str, list[int]]]) -> dict[str, Share]:
    found: dict[str, Share] = {}
    for half in halves:
        for rule, (of, bad) in half.items():
            before = found.get(rule, _NONE)
            found[rule] = Share(before.bad + bad, before.of + of)
    return found


def _sum(shares: Iterable[Share]) -> Share:
    bad = of = 0
    for share in shares:
        bad, of = bad + share.bad, of + share.of
    return Share(bad, of)


def fisher(one: Share, others: Share) -> float:
    """Fisher's exact test, one-sided: how probable it is that of all that are bad so many or more fall to the one, if it is as the others
    are. The upper tail of the hypergeometric distribution."""
    bad, every = one.bad + others.bad, one.of + others.of
    if not bad or not one.of:
        return 1.0
    first = _log_probability(one.bad, one.of, bad, every)
    total, term, k = 1.0, 1.0, one.bad
    while k < min(bad, one.of):  # each term from the one before
        term *= (bad - k) * (one.of - k) / ((k + 1) * (every - bad - one.of + k + 1))
        total += term
        k += 1
        if term < total * 1e-16:
            break
    return min(1.0, math.exp(first) * total)


def _log_probability(k: int, drawn: int, bad: int, every: int) -> float:
    def choose(n: int, of: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(of + 1) - math.lgamma(n - of + 1)

    return choose(bad, k) + choose(every - bad, drawn - k) - choose(every, drawn)
