"""Who is next: shares, floors, deadlines, and what a full queue does. Decisions alone; how requests wait is in test_pool.py."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.serving.balance.queue import DEADLINE, DISPLACED, FULL, TOO_LONG, Queue, Ticket
from gateway.serving.patience import heed

WEIGHTS = st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0, 10.0])
LATER = 1e9


def ticket(key: str, priority: int = 0, deadline: float = LATER, weight: float = 1.0, team: str = "", team_weight: float = 1.0) -> Ticket:
    return Ticket(priority, key, deadline, 0.0, weight, team, team_weight)


def called(queue: Queue, most: int = 1 << 30) -> list[Ticket]:
    found: list[Ticket] = []
    while len(found) < most and (one := queue.call()) is not None:
        found.append(one)
    return found


def test_whoever_sends_two_is_not_behind_whoever_has_sent_a_hundred() -> None:
    queue = Queue(1000)
    for _ in range(100):
        assert queue.enter(ticket("heavy"), 0.0)
    called(queue, 10)
    for _ in range(2):
        assert queue.enter(ticket("light"), 0.0)
    assert [one.key for one in called(queue, 4)].count("light") == 2


def test_a_team_has_one_share_and_its_keys_share_it() -> None:
    queue = Queue(1000)
    for _ in range(60):
        for member in ("ann", "ben", "cat"):
            assert queue.enter(ticket(member, team="blue"), 0.0)
        assert queue.enter(ticket("alone"), 0.0)
        assert queue.enter(ticket("twice", team="green", team_weight=2.0), 0.0)
    assert Counter(one.key for one in called(queue, 48)) == {"alone": 12, "twice": 24, "ann": 4, "ben": 4, "cat": 4}


@given(st.dictionaries(st.sampled_from("abcdef"), WEIGHTS, min_size=2), st.integers(1, 120))
@settings(deadline=None)
def test_shares_follow_weights_at_every_moment(weights: dict[str, float], calls: int) -> None:
    queue = Queue(10_000)
    for name, weight in weights.items():
        for _ in range(calls):
            assert queue.enter(ticket(name, weight=weight), 0.0)
    got: Counter[str] = Counter()
    for one in called(queue, calls):
        got[one.key] += 1
        for name, weight in weights.items():
            for other, its in weights.items():
                # The bound of start-time fair queueing: nobody is ever ahead of another by more than a turn of each.
                assert got[name] / weight - got[other] / its <= 1 / weight + 1 / its + 1e-9


@given(st.lists(st.tuples(st.sampled_from("abc"), WEIGHTS), min_size=1, max_size=12))
@settings(deadline=None)
def test_who_comes_back_again_and_again_gains_nothing_by_it(clients: list[tuple[str, float]]) -> None:
    """Several keys with one request at a time, each back as soon as it was served, beside one that has everything waiting."""
    queue = Queue(10_000)
    light = {f"{name}{number}": weight for number, (name, weight) in enumerate(clients)}
    for _ in range(400):
        assert queue.enter(ticket("heavy"), 0.0)
    for name, weight in light.items():
        assert queue.enter(ticket(name, weight=weight), 0.0)
    got: Counter[str] = Counter()
    for _ in range(300):
        one = queue.call()
        assert one is not None
        got[one.key] += 1
        if one.key != "heavy":
            assert queue.enter(ticket(one.key, weight=one.weight), 0.0)
    whole = 1.0 + sum(light.values())
    assert got["heavy"] >= math.floor(300 / whole) - 1


@given(st.integers(1, 4), st.sampled_from([0.02, 0.05, 0.1]), st.integers(1, 300))
@settings(deadline=None)
def test_no_class_starves_below_others_that_never_end(lower: int, floor: float, calls: int) -> None:
    queue = Queue(100_000, floor)
    for priority in range(lower + 1):
        for _ in range(calls):
            assert queue.enter(ticket("k", priority), 0.0)
    order = [one.priority for one in called(queue, calls)]
    for priority in range(1, lower + 1):
        places = [0, *(number for number, one in enumerate(order, 1) if one == priority), calls]
        longest = max(after - before for before, after in itertools.pairwise(places))
        assert longest <= math.ceil(1 / floor) + lower, "the others' floors may come first"
        assert order.count(priority) <= calls * floor + 1, "a floor, and no more"


def test_without_a_floor_classes_are_strict() -> None:
    queue = Queue(1000, 0.0)
    for _ in range(100):
        assert queue.enter(ticket("low", 5), 0.0)
        assert queue.enter(ticket("high", 1), 0.0)
    assert {one.key for one in called(queue, 100)} == {"high"}


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 5)), max_size=40))
@settings(deadline=None)
def test_inside_a_key_the_nearest_deadline_is_first_and_equals_as_they_came(sent: list[tuple[str, int]]) -> None:
    queue = Queue(1000)
    tickets = [ticket(key, deadline=LATER + later) for key, later in sent]
    assert all(queue.enter(one, 0.0) for one in tickets)
    order = called(queue)
    for key in "ab":
        mine = [one for one in order if one.key == key]
        assert mine == sorted((one for one in tickets if one.key == key), key=lambda one: one.deadline)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["enter", "enter", "call", "leave"]),
        st.sampled_from([("a", ""), ("b", ""), ("c", "blue"), ("d", "blue"), ("e", "green")]),
        st.integers(0, 2),
        st.integers(0, 1 << 16),
    ),
    max_size=80,
)


@given(EVENTS, st.sampled_from([0.0, 0.1]))
@settings(deadline=None)
def test_whoever_leaves_leaves_no_trace(events: list[tuple[str, tuple[str, str], int, int]], floor: float) -> None:
    queue = Queue(1000, floor)
    waiting: list[Ticket] = []
    for what, (key, team), priority, which in events:
        if what == "enter":
            one = ticket(key, priority, LATER + which, team=team)
            assert queue.enter(one, 0.0)
            waiting.append(one)
        elif what == "call":
            found = queue.call()
            assert (found is None) == (not waiting)
            if found is not None:
                waiting.remove(found)
                queue.leave(found)  # as whoever was called does; it has left already
        elif waiting:
            gone = waiting.pop(which % len(waiting))
            queue.leave(gone)
            queue.leave(gone)
        assert queue.waiting == len(waiting)
    for one in waiting:
        queue.leave(one)
    assert queue.call() is None
    fresh = Queue(1000, floor)
    assert (queue.waiting, queue._classes, queue.displaced) == (fresh.waiting, fresh._classes, fresh.displaced)


@given(EVENTS, st.sampled_from([("a", ""), ("c", "blue"), ("f", "")]), st.integers(0, 2), st.integers(0, 1 << 16))
@settings(deadline=None)
def test_how_long_it_will_wait_is_what_its_own_turn_says(
    events: list[tuple[str, tuple[str, str], int, int]], whose: tuple[str, str], priority: int, which: int
) -> None:
    queue = Queue(1000)
    for now in range(1, 60):
        queue.freed(float(now))  # one a second
    for what, (key, team), its, later in events:
        if what == "enter":
            assert queue.enter(ticket(key, its, LATER + later, team=team), 0.0)
        elif what == "call":
            queue.call()
    one = ticket(whose[0], priority, LATER + which, team=whose[1])
    expected_s = queue.wait_s(one)
    assert queue.enter(one, 0.0)
    assert expected_s == pytest.approx(called(queue).index(one) + 1, rel=0.1)


def test_what_cannot_be_in_time_is_refused_at_once_and_says_whose_time_it_was() -> None:
    queue = Queue(1000)
    for now in range(1, 60):
        queue.freed(float(now))
    for _ in range(50):
        assert queue.enter(ticket("heavy"), 60.0)
    late = ticket("low", 5, deadline=90.0)
    assert not queue.enter(late, 60.0)
    assert late.shed == TOO_LONG
    hurried = ticket("low", 5)
    heed(hurried, [(b"x-stainless-read-timeout", b"30")], 60.0)
    assert not queue.enter(hurried, 60.0)
    assert hurried.shed == DEADLINE
    assert queue.retry_after_s(hurried) == pytest.approx(51.0, rel=0.1)
    soon = ticket("light")
    heed(soon, [(b"x-stainless-read-timeout", b"30")], 60.0)
    assert queue.enter(soon, 60.0), "whose key is next"
    first = ticket("heavy")
    heed(first, [(b"x-stainless-read-timeout", b"30")], 60.0)
    assert queue.enter(first, 60.0), "who waits for less is the first of its key"


def test_a_full_queue_makes_room_for_whoever_has_less_in_it() -> None:
    queue = Queue(4)
    heavy = [ticket("heavy") for _ in range(4)]
    assert all(queue.enter(one, 0.0) for one in heavy)
    refused = ticket("heavy")
    assert not queue.enter(refused, 0.0)
    assert refused.shed == FULL
    assert queue.enter(ticket("light"), 0.0)
    assert queue.displaced == [heavy[3]]
    assert (heavy[3].shed, heavy[3].waits, queue.waiting) == (DISPLACED, False, 4)
    assert queue.enter(ticket("light"), 0.0), "two of each"
    assert not queue.enter(ticket("light"), 0.0)
    assert not queue.enter(ticket("heavy"), 0.0)


def test_classes_make_room_for_each_other_as_far_as_their_floors_say() -> None:
    queue = Queue(20, 0.1)  # two places for each class
    assert all(queue.enter(ticket("low", 5), 0.0) for _ in range(20))
    for number in range(18):
        assert queue.enter(ticket("high", 0), 0.0), number
    assert not queue.enter(ticket("high", 0), 0.0), "the last two are the lower class's for sure"
    assert {one.key for one in queue.displaced} == {"low"}
    queue = Queue(20, 0.1)
    assert all(queue.enter(ticket("high", 0), 0.0) for _ in range(20))
    assert [queue.enter(ticket("low", 5), 0.0) for _ in range(3)] == [True, True, False]


@given(st.integers(2, 5), st.integers(5, 40), st.lists(st.integers(0, 4), max_size=200))
@settings(deadline=None)
def test_who_has_no_more_than_its_share_of_the_queue_is_never_refused(keys: int, limit: int, sent: list[int]) -> None:
    queue = Queue(limit)
    held: Counter[int] = Counter()
    for one in sent:
        key = one % keys
        entered = queue.enter(ticket(str(key)), 0.0)
        for out in queue.displaced:
            held[int(out.key)] -= 1
        queue.displaced.clear()
        assert entered or held[key] + 1 > limit / keys
        held[key] += entered
        assert queue.waiting == sum(held.values()) <= limit


def test_one_that_was_called_in_vain_is_first_again() -> None:
    queue = Queue(10, 0.05)
    tickets = [ticket("a"), ticket("a"), ticket("b")]
    assert all(queue.enter(one, 0.0) for one in tickets)
    first = queue.call()
    assert first is tickets[0]
    assert queue.enter(first, 0.0, again=True)
    assert not first.called
    assert called(queue) == [tickets[0], tickets[2], tickets[1]]


@pytest.mark.parametrize(
    ("headers", "waits_s", "by", "ignored"),
    [
        ([], 0.0, "", ()),
        ([(b"x-stainless-read-timeout", b"2.5")], 2.5, "x-stainless-read-timeout", ()),
        ([(b"x-stainless-timeout", b"3")], 3.0, "x-stainless-timeout", ()),
        ([(b"x-request-timeout-ms", b"1500")], 1.5, "x-request-timeout-ms", ()),
        ([(b"x-stainless-read-timeout", b"9"), (b"x-request-timeout-ms", b"1500")], 1.5, "x-request-timeout-ms", ()),
        (
            [(b"x-request-timeout-ms", b"soon"), (b"x-stainless-read-timeout", b"9")],
            9.0,
            "x-stainless-read-timeout",
            ("x-request-timeout-ms",),
        ),
        ([(b"x-stainless-read-timeout", b"600")], 0.0, "", ()),  # longer than is waited anyway
        *(
            ([(b"x-stainless-read-timeout", junk)], 0.0, "", ("x-stainless-read-timeout",))
            for junk in (b"", b"0", b"-1", b"+1", b"1e3", b"nan", b"inf", b" 1", b"1_0", b"0.0", b"9" * 400, b"\xb2", b"None", b"1.")
        ),
    ],
)
def test_a_clients_own_deadline_is_read_or_ignored(
    headers: list[tuple[bytes, bytes]], waits_s: float, by: str, ignored: tuple[str, ...]
) -> None:
    one = ticket("a", deadline=130.0)
    heed(one, headers, 99.0)
    assert (one.patience_s, one.named_by, one.ignored) == (waits_s, by, ignored)
    assert one.deadline == (99.0 + waits_s - min(0.5, waits_s / 10) if waits_s else 130.0)
    assert one.late == (DEADLINE if waits_s else TOO_LONG)
