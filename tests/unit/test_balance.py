"""Smooth weighted round robin: exact shares, no bursts, renormalised over who is there."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.balance.weighted import WeightedRoundRobin
from gateway.plugin import Target

pytestmark = pytest.mark.unit


def picks(weights: dict[str, float], count: int, turn: WeightedRoundRobin | None = None) -> list[str]:
    turn = turn or WeightedRoundRobin()
    targets = [Target(name, weight) for name, weight in weights.items()]
    return [turn.pick(targets).id for _ in range(count)]


def test_five_three_two_is_exact_over_every_ten() -> None:
    chosen = picks({"a": 5, "b": 3, "c": 2}, 100)
    for start in range(0, 100, 10):
        assert Counter(chosen[start : start + 10]) == {"a": 5, "b": 3, "c": 2}


def test_no_target_is_picked_in_a_burst() -> None:
    chosen = "".join(picks({"a": 5, "b": 3, "c": 2}, 100))
    assert "aaa" not in chosen


def test_shares_are_renormalised_when_one_is_missing() -> None:
    turn = WeightedRoundRobin()
    picks({"a": 5, "b": 1, "c": 1}, 21, turn)
    assert Counter(picks({"b": 1, "c": 1}, 100, turn)) == {"b": 50, "c": 50}


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 9), min_size=1))
def test_shares_are_the_weights(weights: dict[str, float]) -> None:
    total = int(sum(weights.values()))
    assert Counter(picks(weights, 3 * total)) == {name: 3 * int(weight) for name, weight in weights.items()}
