"""Hosts compared: the test itself, how often equals are taken for unequal, how soon the one that is worse is found."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.sentinel import statistics
from gateway.sentinel.rules import RULES
from gateway.sentinel.statistics import Alert, Place, Share, Window, fisher

WINDOW_S, LOOK_S = 1800.0, 5.0
RULE = "tool_arguments"


def window(window_s: float = WINDOW_S) -> Window:
    return Window(list(RULES), window_s, 30, window_s / LOOK_S)


def place(number: int, weights: str = "v1") -> Place:
    return "dsv3", weights, f"host-{number}"


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_fishers_exact_test_is_the_sum_of_the_hypergeometric_tail(bad: int, good: int, others_bad: int, others_good: int) -> None:
    one, others = Share(bad, bad + good), Share(others_bad, others_bad + others_good)
    every, all_bad = one.of + others.of, bad + others_bad
    exact = sum(
        Fraction(math.comb(all_bad, k) * math.comb(every - all_bad, one.of - k), math.comb(every, one.of))
        for k in range(bad, min(all_bad, one.of) + 1)
    )
    assert fisher(one, others) == pytest.approx(float(exact), rel=1e-9)


def run(seed: int, shares: list[float], looks: int, a_look: int, talkative: bool = False) -> tuple[int, list[Alert]]:
    """Answers of hosts that break a rule by these shares, `a_look` of each between two looks; after how many of each there was an alert, or
    0. `talkative`: each comes from one of a few conversations, of which some are bad in all they say."""
    chance, counted, now = random.Random(seed), window(), 0.0
    for look in range(1, looks + 1):
        now += LOOK_S
        for number, share in enumerate(shares):
            for one in range(a_look):
                unit = f"{number}-{look}-{one}"
                bad = chance.random() < share
                if talkative:
                    unit = f"{number}-{chance.randrange(60)}"
                    bad = random.Random(f"{seed}-{unit}").random() < share
                counted.count(place(number), unit, [RULE], [RULE] if bad else [], now)
        found = counted.look(now)
        if found:
            return look * a_look, found
    return 0, []


def test_equal_hosts_are_taken_for_unequal_as_seldom_as_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the rule's own errors, and at every look: with the level at a tenth at most a tenth of windows, and the difference that a
    call at night is worth left out, so that the test stands alone."""
    monkeypatch.setattr(statistics, "ALPHA", 0.1)
    monkeypatch.setattr(statistics, "TIMES", 0.0)
    monkeypatch.setattr(statistics, "LEAST_SHARE", 0.0)
    seeds = 100
    for share in (0.003, 0.05, 0.4):
        alarms = sum(bool(run(seed, [share] * 3, int(WINDOW_S / LOOK_S), 2)[1]) for seed in range(seeds))
        # Three standard deviations of a binomial distribution beyond the bound.
        assert alarms <= 0.1 * seeds + 3 * math.sqrt(seeds * 0.09), (share, alarms)


def test_equal_hosts_give_no_alarm_with_the_level_that_is_used() -> None:
    assert not any(run(seed, [0.05] * 2, int(WINDOW_S / LOOK_S), 2)[1] for seed in range(150))


def test_few_conversations_that_are_bad_in_all_they_say_are_no_evidence() -> None:
    """Sixty conversations a host, 5 % of them bad: by answers the hosts differ beyond all chance, by conversations they do not."""
    assert not any(run(seed, [0.05] * 2, 100, 20, talkative=True)[1] for seed in range(60))


def test_the_bad_host_is_found_within_three_hundred_of_its_answers_and_nobody_else_is() -> None:
    """12 % beside 0.4 %, among three: docs/sentinel.md says so."""
    found = [run(seed, [0.004, 0.12, 0.004], 80, 4) for seed in range(200)]
    assert all(alerts and {alert.place for alert in alerts} == {place(1)} for _, alerts in found)
    assert sum(count <= 300 for count, _ in found) >= 0.99 * len(found)


def test_a_host_that_is_very_bad_hides_none_that_is_bad() -> None:
    counted = window()
    for number in range(400):
        for host, every in enumerate((0, 8, 2)):
            counted.count(place(host), f"{host}-{number}", [RULE], [RULE] if every and number % every == 0 else [], 1.0)
    assert [alert.place for alert in counted.look(1.0)] == [place(2), place(1)]


def test_a_small_sample_is_none_and_a_small_difference_is_not_worth_it() -> None:
    counted = window()
    for number in range(29):
        counted.count(place(0), f"a{number}", [RULE], [RULE], 1.0)
    for number in range(500):
        counted.count(place(1), f"b{number}", [RULE], [], 1.0)
    assert counted.look(1.0) == []
    counted.count(place(0), "a29", [RULE], [RULE], 1.0)
    assert [alert.place for alert in counted.look(1.0)] == [place(0)]
    for share, others in ((0.015, 0.0), (0.2, 0.1)):  # so many answers that chance is out of the question
        counted = window()
        for number in range(20_000):
            counted.count(place(0), f"a{number}", [RULE], [RULE] if number % 1000 < 1000 * share else [], 1.0)
            counted.count(place(1), f"b{number}", [RULE], [RULE] if number % 1000 < 1000 * others else [], 1.0)
        assert counted.look(1.0) == []


def test_hosts_are_compared_with_those_that_serve_the_same() -> None:
    counted = window()
    for number in range(200):
        counted.count(place(0, "v2"), f"a{number}", [RULE], [RULE], 1.0)
        counted.count(place(1, "v1"), f"b{number}", [RULE], [], 1.0)
    assert counted.look(1.0) == []


def test_an_alert_holds_on_until_its_difference_is_gone() -> None:
    counted, now = window(600.0), 0.0
    for number in range(200):
        counted.count(place(0), f"a{number}", [RULE], [RULE] if number % 8 == 0 else [], now)
        counted.count(place(1), f"b{number}", [RULE], [], now)
    seen = []
    while now < 2000.0:
        now += LOOK_S
        counted.count(place(0), f"c{now}", [RULE], [], now)
        counted.count(place(1), f"d{now}", [RULE], [], now)
        seen.append(bool(counted.look(now)))
    assert seen[0]
    assert not seen[-1]
    assert sum(one != other for one, other in pairwise(seen)) == 1, "it ends once, and does not flap"


def test_what_is_counted_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MAX_UNITS", 1000)
    counted = window()
    for number in range(10_000):
        counted.count(place(number % 3), f"{number}", [RULE], [], 1.0)
        assert sum(half.size for half in counted._halves) <= 1000
