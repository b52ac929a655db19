"""The algorithm alone, against a model that keeps every arrival and adds up."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.access.limits import rules
from gateway.access.limits.memory import SLOT_WAIT, Memory
from gateway.access.limits.rules import SECOND, Ask, Limit, Unit
from gateway.store.charges import Charges
from middleware.rate_limit import duration, headers


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000 * SECOND

    def __call__(self) -> float:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += seconds * SECOND


def rate(per_minute: float, burst_s: float = 60.0, unit: Unit = Unit.TOKENS) -> Limit:
    return rules.rate("k", "key 'k'", unit, per_minute, burst_s)


def ask(limit: Limit, cost: float = 1.0) -> list[Ask]:
    return [Ask(limit.key, limit, cost, 3600.0)]


def test_a_burst_is_what_comes_in_its_time_and_then_it_is_even() -> None:
    clock, limit = Clock(), rate(60, burst_s=10, unit=Unit.REQUESTS)
    store = Memory(now=clock)
    assert [store.decide(ask(limit)).refused is None for _ in range(12)] == [True] * 10 + [False] * 2
    clock.pass_s(1)
    assert [store.decide(ask(limit)).refused is None for _ in range(2)] == [True, False]
    clock.pass_s(3600)
    assert sum(store.decide(ask(limit)).refused is None for _ in range(50)) == 10, "an idle hour saves up a burst, no more"


def test_what_is_left_is_said_and_when_nothing_is_used() -> None:
    clock, limit = Clock(), rate(60, burst_s=10, unit=Unit.REQUESTS)
    store = Memory(now=clock)
    assert store.decide(ask(limit)).states == [(9.0, SECOND)]
    assert store.decide(ask(limit, 9)).states == [(0.0, 10 * SECOND)]
    assert store.decide(ask(limit)).states == [(0.0, 10 * SECOND)], "a refusal takes nothing"


class Step(NamedTuple):
    after_s: float
    cost: int
    truth: float  # what it really takes, as a share of what was reserved
    held_for: int  # settled after so many steps


steps = st.lists(
    st.builds(Step, st.floats(0, 30), st.integers(0, 400), st.floats(0, 3), st.integers(0, 5)),
    min_size=1,
    max_size=60,
)


@settings(max_examples=400, deadline=None)
@given(steps, st.integers(1, 5000), st.integers(1, 120))
def test_never_above_rate_times_time_and_burst(arrivals: list[Step], per_minute: int, burst_s: int) -> None:
    """Over any stretch of time what was admitted in it takes at most rate x time + burst, and beyond that only by how much the estimates in
    flight were too low, and what was reserved at its beginning and then not used."""
    clock, limit = Clock(), rate(per_minute, burst_s)
    store = Memory(now=clock)
    admitted: list[tuple[float, float, float]] = []  # when, estimate, truth
    open_: list[tuple[int, list[Ask], float]] = []
    reserved: list[float] = []
    for number, step in enumerate(arrivals):
        clock.pass_s(step.after_s)
        for due, asks, truth in [item for item in open_ if item[0] <= number]:
            store.correct(asks, [truth])
            open_.remove((due, asks, truth))
        reserved.append(sum(asks[0].cost for _, asks, _ in open_))
        cost = min(step.cost, limit.burst)
        asks = ask(limit, cost)
        if store.decide(asks).refused is None:
            truth = cost * step.truth
            admitted.append((clock.now, cost, truth))
            open_.append((number + step.held_for, asks, truth))
        else:
            admitted.append((clock.now, 0.0, 0.0))
    for first in range(len(admitted)):
        for last in range(first, len(admitted)):
            took = sum(truth for _, _, truth in admitted[first : last + 1])
            under = sum(max(0.0, truth - estimate) for _, estimate, truth in admitted[first : last + 1])
            time_s = (admitted[last][0] - admitted[first][0]) / SECOND
            assert took <= per_minute / 60 * time_s + limit.burst + under + reserved[first] + 1e-3


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 300)), min_size=1, max_size=40), st.integers(1, 3000))
def test_who_waits_just_so_long_is_admitted_and_not_before(arrivals: list[tuple[float, int]], per_minute: int) -> None:
    clock, limit = Clock(), rate(per_minute, 30)
    store = Memory(now=clock)
    for after_s, cost in arrivals:
        clock.pass_s(after_s)
        asks = ask(limit, min(cost, limit.burst))
        decision = store.decide(asks)
        if decision.refused is not None:
            clock.now += decision.wait - 2
            assert store.decide(asks).refused is limit, "two microseconds too early"
            clock.now += 3
            assert store.decide(asks).refused is None


def test_what_runs_over_is_debt_and_what_is_under_comes_back() -> None:
    clock, limit = Clock(), rate(6000, burst_s=10)  # 100 a second, 1000 at once
    store = Memory(now=clock)
    first = ask(limit, 400)
    assert store.decide(first).states[0][0] == 600
    store.correct(first, [1400])
    refused = store.decide(ask(limit, 1))
    assert refused.refused is limit
    assert refused.wait == pytest.approx(4.01 * SECOND)
    clock.pass_s(20)
    again = ask(limit, 1000)
    assert store.decide(again).refused is None
    store.correct(again, [0])
    assert store.decide(ask(limit, 1000)).refused is None, "a failed request's tokens are there for the next"


def test_all_limits_or_none() -> None:
    clock = Clock()
    store = Memory(now=clock)
    rpm, tpm = rules.rate("r", "k", Unit.REQUESTS, 60, 60), rules.rate("t", "k", Unit.TOKENS, 60, 60)
    slots = rules.slots("s", "k", 1)
    both = [Ask("r", rpm, 1), Ask("t", tpm, 40), Ask("s", slots, 1)]
    assert store.decide(both).refused is None
    assert store.decide(both).refused is tpm, "the one that takes longest is named"
    store.correct(both, [1, 0, 1])
    decision = store.decide(both)
    assert decision.refused is None
    assert decision.states[0][0] == 58, "a refused request has taken none of the others"


def test_slots_are_held_while_requests_are_open() -> None:
    store = Memory(now=Clock())
    slots = rules.slots("s", "k", 2)
    held = [ask(slots), ask(slots)]
    assert all(store.decide(asks).refused is None for asks in held)
    assert store.decide(ask(slots)).wait == SLOT_WAIT
    store.correct(held[0], [1])
    assert store.decide(ask(slots)).refused is None


def test_a_quota_ends_with_its_day() -> None:
    store = Memory(now=Clock())
    day = rules.quota("d", "k", Unit.DAY, 1000, "day")
    asks = [Ask("d/2026-11-25", day, 600, 50.0)]
    assert store.decide(asks).states == [(400, 50 * SECOND)]
    assert store.decide(asks).refused is day
    store.correct(asks, [100])
    assert store.decide(asks).states == [(300, 50 * SECOND)]
    assert store.decide([Ask("d/2026-11-26", day, 600, 86400.0)]).refused is None


def test_a_share_of_every_limit_holds_while_the_store_is_gone() -> None:
    clock = Clock()
    store = Memory(now=clock)
    store.share = 0.25
    limit = rate(600, burst_s=60, unit=Unit.REQUESTS)
    assert sum(store.decide(ask(limit)).refused is None for _ in range(1000)) == 150
    slots = rules.slots("s", "k", 2)
    assert store.decide(ask(slots)).refused is None, "one is always left"
    assert store.decide(ask(slots)).refused is slots
    day = rules.quota("d", "k", Unit.DAY, 1000, "day")
    store.know("d", day, (400, 0))
    assert store.decide(ask(day, 100)).refused is None
    assert store.decide(ask(day, 1)).refused is day, "a quarter of the 400 that were left"


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(0, "0ms"), (0.0119, "12ms"), (1, "1s"), (1.5, "1.5s"), (60, "1m0s"), (90.5, "1m30.5s"), (360, "6m0s"), (3600, "1h0m0s"),
     (86399.9994, "24h0m0s")],
)  # fmt: skip
def test_durations_are_written_as_openai_does(seconds: float, written: str) -> None:
    assert duration(seconds * 1000) == written


def test_of_several_limits_the_tightest_is_shown() -> None:
    loose, tight = rules.rate("a", "k", Unit.REQUESTS, 600, 60), rules.rate("b", "m", Unit.REQUESTS, 100, 60)
    day = rules.quota("d", "k", Unit.DAY, 1000, "day")
    asks = [Ask("a", loose, 1), Ask("b", tight, 1), Ask("d", day, 10)]
    assert headers(asks, [(500, 1 * SECOND), (7, 2.5 * SECOND), (-3, 60 * SECOND)]) == [
        (b"x-ratelimit-limit-requests", b"100"),
        (b"x-ratelimit-remaining-requests", b"7"),
        (b"x-ratelimit-reset-requests", b"2.5s"),
        (b"x-ratelimit-limit-tokens", b"1000"),
        (b"x-ratelimit-remaining-tokens", b"0"),
        (b"x-ratelimit-reset-tokens", b"1m0s"),
    ]


class Arrival(NamedTuple):
    after_s: float
    cost: int
    truth: int
    held_for: int


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.builds(Arrival, st.floats(0, 20), st.integers(1, 300), st.integers(0, 400), st.integers(0, 3)), min_size=1, max_size=30),
    st.floats(-100, 100),
    st.integers(10, 3000),
)
def test_what_was_admitted_without_the_store_comes_to_what_it_would_have_come_to_there(
    arrivals: list[Arrival], before_s: float, per_minute: int
) -> None:
    """Two numbers replay any row of requests and corrections on whatever bucket is found when the store answers again."""
    limit, now, charges = rate(per_minute), 1_000_000 * SECOND, Charges()
    there = before = now + before_s * SECOND
    open_: list[tuple[int, Ask, int]] = []
    for number, (after_s, cost, truth, held_for) in enumerate(arrivals):
        now += after_s * SECOND
        for due, one, true_cost in [item for item in open_ if item[0] <= number]:
            more = (true_cost - one.cost) * limit.interval
            there = (max(there, now) if more > 0 else there) + more
            charges.correct(one, true_cost, now)
            open_.remove((due, one, true_cost))
        one = ask(limit, cost)[0]
        there = max(there, now) + cost * limit.interval
        charges.add([one], now)
        open_.append((number + held_for, one, truth))
    now += 5 * SECOND
    ((key, taken, empty_in, most),) = charges.take(now)
    assert (key, most) == (limit.key, limit.tolerance)
    # A correction downwards of what had long drained away may take more from an empty bucket than is in it; then both are empty.
    assert max(before + taken, now + empty_in, now) == pytest.approx(max(there, now), abs=SECOND / 1e3)
    assert not charges
    assert charges.number == 2


def test_slots_that_are_held_count_when_the_store_is_gone() -> None:
    store, slots = Memory(now=Clock()), rules.slots("s", "k", 4)
    store.know("s", slots, (1, 0.0))
    assert store.decide(ask(slots)).refused is None
    assert store.decide(ask(slots)).refused is slots
