"""Whose turn it is, who is left alone and for how long, what retries may cost, and who waits: decisions, tried as such."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.plugin import Stats, Target, Verdict
from gateway.serving.balance import policies
from gateway.serving.balance.affinity import PREFIX, UNBOUND, Affinity, point
from gateway.serving.balance.breaker import TABLE, Breaker, Event, Limits, State
from gateway.serving.balance.hosts import BUSY_S, Host, Hosts, NoHost
from gateway.serving.balance.policies import Affine, First, Policy, RoundRobin, TwoChoices
from gateway.serving.balance.queue import Queue, Ticket
from gateway.serving.balance.retries import WINDOW_S, Budget
from gateway.serving.balance.settings import Health

PLAIN = Health(slow_start_s=0)
WEIGHTS = st.lists(st.integers(1, 9), min_size=2, max_size=6)


def pool(*weights: float, health: Health = PLAIN, **target: object) -> Hosts:
    hosts = Hosts(health, random.Random(7))
    hosts.update([Target(f"h{number}", weight, **target) for number, weight in enumerate(weights)], 0.0)  # type: ignore[arg-type]
    return hosts


def bound(name: bytes) -> Affinity:
    return Affinity(PREFIX, point(name))


def picks(hosts: Hosts, policy: Policy, count: int, now: float = 0.0, key: bytes = b"") -> list[str]:
    found = []
    for _ in range(count):
        host = hosts.choose(policy, bound(key), (), now)
        assert isinstance(host, Host)
        found.append(host.target.id)
    return found


def test_five_three_two_is_exact_over_every_ten() -> None:
    found = picks(pool(5, 3, 2), RoundRobin(), 200)
    for start in range(190):
        assert Counter(found[start : start + 10]) == {"h0": 5, "h1": 3, "h2": 2}
    assert max(len(list(group)) for _, group in itertools.groupby(found)) <= 2, "no bursts"


@pytest.mark.parametrize("policy", [RoundRobin, lambda: TwoChoices(random.Random(1))])
def test_weights_are_shares_among_whoever_is_left(policy: object) -> None:
    hosts = pool(5, 1, 1)
    hosts.probed(next(iter(hosts)), False, 0.0)
    made: Policy = policy()  # type: ignore[operator]
    found = Counter(picks(hosts, made, 2000))
    assert set(found) == {"h1", "h2"}
    assert abs(found["h1"] - found["h2"]) < 200


@given(WEIGHTS)
@settings(deadline=None)
def test_round_robins_shares_are_exactly_the_weights(weights: list[int]) -> None:
    found = Counter(picks(pool(*weights), RoundRobin(), sum(weights)))
    assert found == {f"h{number}": weight for number, weight in enumerate(weights)}


@given(WEIGHTS, st.integers(0, 2**32))
@settings(deadline=None, max_examples=25)
def test_two_choices_converge_to_the_weights_under_saturation(weights: list[int], seed: int) -> None:
    """Each pick stays in flight for as long as any other, with many in flight: the shares are the weights."""
    hosts, policy = pool(*weights), TwoChoices(random.Random(seed))
    flying: list[Host] = []
    done: Counter[str] = Counter()
    for _ in range(4000):
        host = hosts.choose(policy, UNBOUND, (), 0.0)
        assert isinstance(host, Host)
        hosts.begin(host, 0.0)
        flying.append(host)
        done[host.target.id] += 1
        if len(flying) > 40 * len(weights):
            hosts.end(flying.pop(0), Verdict.OK, 0.0)
    for number, weight in enumerate(weights):
        assert done[f"h{number}"] / 4000 == pytest.approx(weight / sum(weights), abs=0.05)


def test_what_others_have_there_is_load_too_and_leaves_us_no_less_than_half() -> None:
    hosts = pool(1, 1, capacity=10)
    one = hosts.get("h0")
    assert one is not None

    looks = itertools.count(1)

    def tell(running: int, ours: int) -> None:
        stats, at = Stats(running_requests=running), float(next(looks))
        hosts.update([Target(host.target.id, 1, capacity=10, stats=stats, stats_at=at) for host in hosts], 0.0)
        hosts.told(one, ours)

    tell(12, 4)
    assert (one.others, one.limit) == (0, 10), "one look may be stale: what has ended meanwhile is no load"
    tell(11, 4)
    assert (one.others, one.limit) == (7, 5), "two gateways meet in the middle"
    assert set(picks(hosts, TwoChoices(random.Random(1)), 20)) == {"h1"}
    hosts.told(one, 0)
    assert one.others == 7, "the same words again say nothing new"
    tell(6, 4)
    assert (one.others, one.limit) == (2, 8)
    tell(3, 4)
    assert (one.others, one.limit) == (0, 10)


def test_two_choices_follow_the_load() -> None:
    hosts, policy = pool(1, 1), TwoChoices(random.Random(1))
    busy = hosts.get("h0")
    assert busy is not None
    for _ in range(5):
        hosts.begin(busy, 0.0)
    assert set(picks(hosts, policy, 50)) == {"h1"}


@given(WEIGHTS, st.integers(0, 2**32))
@settings(deadline=None, max_examples=15)
def test_affinitys_shares_are_the_weights_over_random_prefixes(weights: list[int], seed: int) -> None:
    chance, hosts, policy = random.Random(seed), pool(*weights), Affine(random.Random(5))
    found: Counter[str] = Counter()
    for _ in range(3000):
        found.update(picks(hosts, policy, 1, key=chance.randbytes(8)))
    for number, weight in enumerate(weights):
        assert found[f"h{number}"] / 3000 == pytest.approx(weight / sum(weights), abs=0.12)


def test_affinity_is_faithful_passes_over_the_overloaded_and_moves_little() -> None:
    hosts, policy = pool(1, 1, 1, 1), Affine(random.Random(5))
    keys = [str(number).encode() for number in range(400)]
    home = {key: picks(hosts, policy, 1, key=key)[0] for key in keys}
    assert home == {key: picks(hosts, policy, 1, key=key)[0] for key in keys}
    favourite = hosts.get(home[keys[0]])
    assert favourite is not None
    for _ in range(20):
        hosts.begin(favourite, 0.0)
    assert picks(hosts, policy, 1, key=keys[0]) != [favourite.target.id], "no hot spot"
    for _ in range(20):
        hosts.end(favourite, None, 0.0)
    hosts.probed(favourite, False, 0.0)
    moved = sum(picks(hosts, policy, 1, key=key)[0] != home[key] for key in keys)
    assert moved == sum(place == favourite.target.id for place in home.values()), "only its own have moved"


def test_a_lower_tier_is_for_when_the_upper_has_nobody() -> None:
    hosts = Hosts(Health(slow_start_s=0), random.Random(1))
    hosts.update([Target("spare", 9, priority=1), Target("a", 1), Target("b", 1)], 0.0)
    policy = RoundRobin()
    assert set(picks(hosts, policy, 20)) == {"a", "b"}
    for name in ("a", "b"):
        host = hosts.get(name)
        assert host is not None
        hosts.probed(host, False, 0.0)
    assert set(picks(hosts, policy, 5)) == {"spare"}


def test_full_is_told_from_sick_and_from_nobody() -> None:
    hosts = pool(1, 1, capacity=1)
    for host in hosts:
        hosts.begin(host, 0.0)
    assert hosts.choose(First(), UNBOUND, (), 0.0) is NoHost.FULL
    for host in hosts:
        hosts.end(host, Verdict.OK, 0.0)
    assert hosts.choose(First(), UNBOUND, {"h0", "h1"}, 0.0) is NoHost.NOBODY
    strict = pool(1, 1, health=Health(all_sick="fail_fast"))
    kind = pool(1, 1)
    for found in (strict, kind):
        for host in found:
            found.probed(host, False, 0.0)
    assert strict.choose(First(), UNBOUND, (), 0.0) is NoHost.SICK
    assert isinstance(kind.choose(First(), UNBOUND, (), 0.0), Host)


def test_capacity_is_shared_out_among_workers() -> None:
    hosts = Hosts(Health(), random.Random(1), divided=3)
    hosts.update([Target("a", capacity=10)], 0.0)
    assert [host.capacity for host in hosts] == [4]


def test_busy_is_never_sick_and_only_avoided_for_a_while() -> None:
    hosts = pool(1, 1)
    one = hosts.get("h0")
    assert one is not None
    for _ in range(50):
        hosts.begin(one, 0.0)
        hosts.end(one, Verdict.BUSY, 0.0)
    assert one.breaker.state is State.CLOSED
    assert set(picks(hosts, RoundRobin(), 10, now=BUSY_S / 2)) == {"h1"}
    assert set(picks(hosts, RoundRobin(), 10, now=BUSY_S + 0.1)) == {"h0", "h1"}
    assert isinstance(hosts.choose(First(), UNBOUND, {"h1"}, 0.1), Host), "better a busy one than none"


def test_a_client_that_leaves_counts_for_nothing() -> None:
    hosts = pool(1, 1)
    one = hosts.get("h0")
    assert one is not None
    for verdict in (None, Verdict.CLIENT_FAULT) * 50:
        hosts.begin(one, 0.0)
        hosts.end(one, verdict, 0.0)
    assert (one.in_flight, one.breaker.state, one.up) == (0, State.CLOSED, True)


def test_slow_start_gives_a_growing_share() -> None:
    hosts = pool(1, 1, health=Health(slow_start_s=10))
    one = hosts.get("h0")
    assert one is not None
    hosts.probed(one, False, 100.0)
    hosts.probed(one, True, 100.0)
    shares = [Counter(picks(hosts, RoundRobin(), 110, now=now))["h0"] for now in (100.0, 105.0, 110.0)]
    assert shares[0] == 10
    assert shares == sorted(shares)
    assert shares[2] == 55


def test_the_breakers_table_is_total() -> None:
    assert set(TABLE) == set(itertools.product(State, Event))


def test_a_breaker_opens_by_sample_and_ratio_and_backs_off_with_jitter() -> None:
    limits = Limits(min_sample=5, failure_ratio=0.5, window_s=10, ejection_s=5, max_ejection_s=40)
    breaker = Breaker(limits, lambda: 0.5)
    assert [breaker.outcome(True, 0.0) for _ in range(4)] == [False] * 4, "too few to tell"
    assert breaker.outcome(True, 0.0)
    calm = Breaker(limits, lambda: 0.5)
    for _ in range(10):
        calm.outcome(False, 0.0)
    assert [calm.outcome(True, 0.0) for _ in range(9)] == [False] * 9, "under the ratio"
    assert calm.outcome(True, 0.0)
    lengths, now = [], 0.0
    for _ in range(5):
        breaker.trip(now)
        lengths.append(breaker.until - now)
        now = breaker.until
        assert breaker.look(now) is State.PROBATION
        breaker.outcome(True, now)
        assert breaker.state is State.OPEN, "one failure in probation is enough"
        now = breaker.until
        breaker.look(now)
    assert lengths == [5, 20, 40, 40, 40]
    breaker.outcome(False, now)
    assert breaker.state is State.CLOSED
    for chance, length in ((0.0, 4.0), (1.0, 6.0)):
        jittered = Breaker(limits, lambda chance=chance: chance)  # type: ignore[misc]
        jittered.trip(0.0)
        assert jittered.until == pytest.approx(length)


def test_old_outcomes_are_forgotten() -> None:
    breaker = Breaker(Limits(min_sample=5, window_s=10), lambda: 0.5)
    for _ in range(4):
        breaker.outcome(True, 1.0)
    assert not breaker.outcome(True, 20.0)


def test_no_more_than_a_share_of_the_weight_is_ever_ejected() -> None:
    hosts = pool(1, 1, 1, 1, health=Health(min_sample=1, failure_ratio=0.1, max_ejected_share=0.5))
    for host in hosts:
        for _ in range(3):
            hosts.begin(host, 0.0)
            hosts.end(host, Verdict.SICK, 0.0)
    assert sum(host.breaker.state is State.OPEN for host in hosts) == 2


OUTCOMES = st.sampled_from([*Verdict, None])


@given(st.lists(st.tuples(OUTCOMES, st.booleans(), st.floats(0, 3)), max_size=120), st.sampled_from(policies.NAMES))
@settings(deadline=None)
def test_whatever_happens_in_flight_returns_to_zero_and_the_ejected_are_not_picked(
    events: list[tuple[Verdict | None, bool, float]], name: str
) -> None:
    hosts = pool(5, 3, 2, health=Health(min_sample=2, ejection_s=2, all_sick="fail_fast"))
    policy, now = policies.make(name, random.Random(3)), 0.0
    flying: list[Host] = []
    for verdict, connected, gap_s in events:
        now += gap_s
        host = hosts.choose(policy, bound(b"k"), (), now)
        if isinstance(host, Host):
            assert host.breaker.state is State.CLOSED or (host.breaker.state is State.PROBATION and host.in_flight == 0)
            assert host.up
            hosts.begin(host, now)
            flying.append(host)
        if len(flying) > 3:
            hosts.end(flying.pop(0), verdict, now, "" if connected else "refused")
        ejected = sum(host.target.weight for host in hosts if host.breaker.state is not State.CLOSED)
        assert ejected <= 5
    for host in flying:
        hosts.end(host, None, now)
    assert all(host.in_flight == 0 for host in hosts)


@given(st.lists(st.tuples(st.booleans(), st.floats(1, 5000), st.floats(0, 4)), max_size=100), st.floats(0, 1))
@settings(deadline=None)
def test_the_retry_budget_is_never_negative_nor_overspent(events: list[tuple[bool, float, float]], share: float) -> None:
    budget, now = Budget(share), 0.0
    asked: list[tuple[float, float]] = []
    spent: list[tuple[float, float]] = []
    for request, tokens, gap_s in events:
        now += gap_s
        if request:
            budget.deposit(tokens, now)
            asked.append((now, tokens))
        elif budget.withdraw(tokens, now):
            recent = [size for at, size in spent if at > now - WINDOW_S / 2]
            if recent:  # the first one in a while is always allowed
                assert sum(recent) + tokens <= share * sum(size for at, size in asked if at > now - WINDOW_S) + recent[0] + 1e-6
            spent.append((now, tokens))
        assert budget.available(now) >= 0


def test_a_retry_is_always_allowed_and_the_second_only_where_there_is_traffic() -> None:
    budget = Budget(0.2)
    assert budget.withdraw(30_000, 0.0)
    assert not budget.withdraw(10, 0.0)
    for _ in range(1000):
        budget.deposit(300, 1.0)
    assert budget.withdraw(10_000, 1.0)
    assert not budget.withdraw(30_000, 1.0)
    assert budget.withdraw(30_000, 30.0), "a new window"


def test_the_queue_is_strict_between_classes_and_fair_between_keys() -> None:
    queue = Queue(100)
    tickets = [Ticket(1, "a", 99.0) for _ in range(4)] + [Ticket(1, "b", 99.0), Ticket(0, "c", 99.0)]
    assert all(queue.enter(ticket, 0.0) for ticket in tickets)
    order = []
    while (found := queue.call()) is not None:
        order.append(found.key)
    assert order == ["c", "a", "b", "a", "a", "a"]
    assert queue.waiting == 0


def test_the_queue_is_bounded_and_refuses_what_is_hopeless() -> None:
    queue = Queue(2)
    first, second = Ticket(0, "a", 99.0), Ticket(0, "a", 99.0)
    assert queue.enter(first, 0.0)
    assert queue.enter(second, 0.0)
    assert not queue.enter(Ticket(0, "a", 99.0), 0.0), "full"
    queue.leave(first)
    queue.leave(first)
    assert queue.waiting == 1
    for now in range(1, 40):
        queue.freed(float(now))
    assert queue.wait_s() == pytest.approx(2.0, rel=0.2), "one a second, and it would be the second"
    assert queue.retry_after_s() == pytest.approx(2.0, rel=0.2)
    assert not queue.enter(Ticket(0, "a", 40.5), 40.0), "it would be called too late"
    assert queue.enter(Ticket(0, "a", 50.0), 40.0)


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abc"), st.booleans()), max_size=60))
@settings(deadline=None)
def test_nobody_is_lost_or_called_twice(events: list[tuple[int, str, bool]]) -> None:
    queue = Queue(1000)
    waiting: set[Ticket] = set()
    for priority, key, call in events:
        if call:
            found = queue.call()
            assert (found is None) == (not waiting)
            if found is not None:
                assert found.priority == min(ticket.priority for ticket in waiting)
                waiting.remove(found)
        else:
            ticket = Ticket(priority, key, 1e9)
            assert queue.enter(ticket, 0.0)
            waiting.add(ticket)
        assert queue.waiting == len(waiting)
