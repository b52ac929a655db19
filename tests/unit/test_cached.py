"""What hosts have in their caches, as far as we know: what is entered, what the engine's word corrects, and what it means for a choice."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.plugin import Target, Verdict
from gateway.serving.balance.affinity import PREFIX, UNBOUND, Affinity, point
from gateway.serving.balance.cached import BYTES_PER_TOKEN, SHARED_BY, Placement, Prefixes
from gateway.serving.balance.hosts import Host, Hosts
from gateway.serving.balance.policies import OVERLOAD, Affine
from gateway.serving.balance.settings import Health


def prompt(*messages: str, lead: int = 2, size: int = 4400) -> Affinity:
    """Messages of `size` bytes each, about a thousand tokens; the first two are the system's and the user's first."""
    chain = [hash(messages[: number + 1]) for number in range(len(messages))]
    sizes = list(accumulate([size] * len(messages)))
    return Affinity(PREFIX, point(repr(messages[:lead]).encode()), chain, sizes, lead)


def answered(index: Prefixes, bound: Affinity, host: str, cached: int | None, tokens: int = 0) -> Placement:
    placement = index.place(bound, host)
    placement.begun()
    placement.ended(tokens or 1000 * len(bound.chain), cached)
    return placement


def test_a_prefix_is_expected_where_it_was_prefilled_and_nowhere_else() -> None:
    index = Prefixes()
    first = prompt("s", "u")
    assert index.place(first, "a").expected_tokens == 0
    assert index.place(first, "a").expected_tokens == 0, "nothing is in a cache before the host has begun to answer"
    answered(index, first, "a", 0, 2017)
    longer = prompt("s", "u", "x", "v")
    assert index.place(longer, "a").expected_tokens == 2017, "as the engine itself has counted"
    assert index.place(longer, "b").expected_tokens == 0
    assert index.held(longer, {"a", "b"}, 0) == {"a": 2 * 4400}
    sibling = prompt("s", "other")
    assert index.place(sibling, "a").expected_tokens == int(4400 / index._bytes_per_token), "by its size, where nobody has counted"
    assert 0.9 < index._bytes_per_token / BYTES_PER_TOKEN < 1.1


def test_a_conversation_that_moves_says_from_where_and_what_it_paid() -> None:
    index = Prefixes()
    answered(index, prompt("s", "u"), "a", 0)
    stayed = answered(index, prompt("s", "u", "x", "v"), "a", 2000)
    assert (stayed.moved_from, stayed.moved_tokens, stayed.expected_tokens) == ("", 0, 2000)
    moved = answered(index, prompt("s", "u", "x", "v", "y", "w"), "b", 100)
    assert (moved.moved_from, moved.expected_tokens, moved.moved_tokens) == ("a", 0, 3900)
    back = answered(index, prompt("s", "u", "x", "v", "y", "w", "z", "q"), "a", 4000)
    assert (back.moved_from, back.expected_tokens, back.moved_tokens) == ("b", 4000, 2000)
    begun = index.place(prompt("s", "new"), "b")
    assert begun.moved_from == "", "one that begins has been nowhere"
    assert index.place(prompt("s", "u"), "c").moved_from == "", "the same question again is no conversation"


def test_an_attempt_that_fails_has_moved_nothing() -> None:
    index = Prefixes()
    answered(index, prompt("s", "u"), "a", 0)
    longer = prompt("s", "u", "x", "v")
    failed = index.place(longer, "b")
    assert failed.moved_from == "a"
    failed.failed()
    failed.ended(4000, 0)
    assert (failed.moved_from, failed.moved_tokens, failed.cached_tokens) == ("", 0, None)
    assert index.place(longer, "b").expected_tokens == 0
    assert index.place(longer, "c").moved_from == "a"


def test_the_engines_word_corrects_it_for_all_that_is_older() -> None:
    index = Prefixes()
    for name in ("old", "lost", "new"):
        answered(index, prompt("s", name), "a", 0 if name == "old" else 1000)
    found = answered(index, prompt("s", "lost", "x", "v"), "a", 0)
    assert (found.expected_tokens, found.cached_tokens) == (2000, 0)
    assert index.place(prompt("s", "old", "x", "v"), "a").expected_tokens == pytest.approx(1000, abs=5), "only what was used since"
    assert index.place(prompt("s", "new", "x", "v"), "a").expected_tokens == 2000
    assert index.place(prompt("s", "lost", "x", "v", "y", "w"), "a").expected_tokens == 4000, "it is there again"
    answered(index, prompt("t", "u"), "b", 0)
    assert index.place(prompt("t", "u", "x", "v"), "b").expected_tokens == 2000, "another host's cache is another matter"


def test_a_page_less_is_no_loss_and_silence_says_nothing() -> None:
    index = Prefixes()
    answered(index, prompt("s", "u"), "a", 0)
    for cached in (1984, 1700, None):
        answered(index, prompt("s", "u", "x", "v"), "a", cached)
        assert index.place(prompt("s", "u", "x", "w"), "a").expected_tokens, cached


def test_old_prefixes_are_forgotten_and_what_is_used_is_not() -> None:
    index = Prefixes(most_nodes=40)
    for number in range(500):
        answered(index, prompt("kept", "u"), "a", None)
        answered(index, prompt("s", str(number)), "a", None)
        assert len(index) <= 2 * (40 + 2)
    assert index.place(prompt("kept", "u", "x", "v"), "a").expected_tokens == 2000
    assert index.held(prompt("s", "1"), {"a"}, 8000) == {}


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 5), st.sampled_from("abc")), max_size=300))
@settings(deadline=None, max_examples=50)
def test_it_never_expects_what_was_not_there(events: list[tuple[int, int, str]]) -> None:
    index, seen = Prefixes(most_nodes=40), set()
    for conversation, length, host in events:
        bound = prompt("s", *(f"{conversation}/{turn}" for turn in range(length)))
        placement = index.place(bound, host)
        if placement.expected_tokens:
            assert any((link, host) in seen for link in bound.chain)
        placement.begun()
        placement.ended(1000 * len(bound.chain), None)
        seen |= {(link, host) for link in bound.chain}


def fleet(*weights: float) -> Hosts:
    hosts = Hosts(Health(slow_start_s=0), random.Random(7))
    hosts.update([Target(f"h{number}", weight) for number, weight in enumerate(weights)], 0.0)
    return hosts


def pick(hosts: Hosts, policy: Affine, bound: Affinity, cached: int | None = None) -> Host:
    host = hosts.choose(policy, bound, (), 0.0)
    assert isinstance(host, Host)
    placement = policy.place(bound, host.target.id)
    placement.begun()
    placement.ended(1000 * max(1, len(bound.chain)), cached)
    return host


def test_who_holds_a_prompt_is_asked_before_its_place_on_the_ring() -> None:
    """A host that was away and comes back empty does not take a conversation from the one that has it."""
    hosts, policy = fleet(1, 1, 1), Affine(random.Random(1))
    home = pick(hosts, policy, prompt("s", "u"))
    hosts.probed(home, False, 0.0)
    second = pick(hosts, policy, prompt("s", "u", "x", "v"))
    assert second is not home
    third = pick(hosts, policy, prompt("s", "u", "x", "v", "y", "w"))
    hosts.probed(home, True, 0.0)
    assert pick(hosts, policy, prompt("s", "u", "x", "v", "y", "w", "z", "q")) is third is second
    fresh = Affine(random.Random(1))
    assert pick(hosts, fresh, prompt("s", "u", "x", "v", "y", "w", "z", "q")) is home, "which the ring alone would do"


def test_a_beginning_that_all_share_does_not_lead_all_to_one_host() -> None:
    """One system message before many short questions, which is most of every prompt: who has it is asked, all of them in time."""
    hosts, policy = fleet(1, 1, 1), Affine(random.Random(1))
    flying: list[Host] = []
    for number in range(300):
        bound = Affinity(PREFIX, point(str(number).encode()), [1, 1000 + number], [40_000, 40_100], 2)
        host = pick(hosts, policy, bound)
        hosts.begin(host, 0.0)
        flying.append(host)
        if len(flying) > 30:
            hosts.end(flying.pop(0), Verdict.OK, 0.0)
        most = max(host.in_flight for host in hosts)
        assert most <= OVERLOAD * (len(flying) + 1) / 3 + 2
    assert min(flying.count(host) for host in hosts) >= 5


def test_a_beginning_stays_at_its_host_for_a_few_and_is_everywhere_for_many() -> None:
    """Without any load: a document that a few ask about stays where it is cached; what all begin with fills every host's cache."""
    hosts, policy = fleet(1, 1, 1), Affine(random.Random(1))
    placed = []
    for number in range(90):
        bound = Affinity(PREFIX, point(str(number).encode()), [1, 1000 + number], [40_000, 40_100], 2)
        placed.append(pick(hosts, policy, bound).target.id)
    assert len(set(placed[:SHARED_BY])) == 1
    assert min(placed[-45:].count(f"h{number}") for number in range(3)) >= 5


def test_a_hot_session_does_not_overload_a_host() -> None:
    hosts, policy = fleet(5, 3, 2), Affine(random.Random(1))
    for number in range(200):
        bound = prompt("s", "u", "x", str(number))
        host = hosts.choose(policy, bound, (), 0.0)
        assert isinstance(host, Host)
        hosts.begin(host, 0.0)
        policy.place(bound, host.target.id).begun()
        for other in hosts:
            assert other.in_flight <= OVERLOAD * (number + 1) * other.target.weight / 10 + 2
    calm = fleet(5, 3, 2)
    assert len({pick(calm, policy, prompt("s", "u", "x", f"later {number}")).target.id for number in range(50)}) == 1, (
        "one after the other it stays"
    )


def test_what_nothing_binds_goes_by_load() -> None:
    hosts, policy = fleet(1, 1), Affine(random.Random(1))
    busy = hosts.get("h0")
    assert busy is not None
    for _ in range(5):
        hosts.begin(busy, 0.0)
    assert {pick(hosts, policy, UNBOUND).target.id for _ in range(20)} == {"h1"}
    for _ in range(5):
        hosts.end(busy, Verdict.OK, 0.0)
    assert len({pick(hosts, policy, UNBOUND).target.id for _ in range(50)}) == 2
