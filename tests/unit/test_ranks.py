"""Which data-parallel rank of a host a call goes to."""

from __future__ import annotations

import random
from collections import Counter

from backends.sglang_dsv3.ranks import OVERLOAD, Ranks
from backends.sglang_dsv3.shapes import Load


def ranks(*running: int) -> Ranks:
    found = Ranks()
    found.saw([Load(dp_rank=rank, num_running_reqs=count) for rank, count in enumerate(running)])
    return found


def once(found: Ranks, affinity: int) -> int:
    rank = found.take(affinity)
    assert rank is not None
    found.give_back(rank)
    return rank


def test_a_session_keeps_its_rank_and_sessions_are_spread() -> None:
    found, chance = ranks(0, 0, 0, 0), random.Random(1)
    sessions = [chance.getrandbits(64) for _ in range(400)]
    home = {session: once(found, session) for session in sessions}
    assert home == {session: once(found, session) for session in sessions}
    assert min(Counter(home.values()).values()) > 60
    fewer = ranks(0, 0, 0)
    moved = {session for session in sessions if once(fewer, session) != home[session]}
    assert moved == {session for session in sessions if home[session] == 3}, "only those of the rank that went"


def test_a_busy_rank_is_passed_over_whoever_made_it_busy() -> None:
    found = ranks(0, 0, 0, 0)
    home = once(found, 7)
    taken = [found.take(7) for _ in range(100)]
    counts = Counter(taken)
    assert max(counts.values()) <= OVERLOAD * 101 / 4 + 2
    assert len(counts) == 4
    theirs = ranks(*(50 if rank == home else 0 for rank in range(4)))
    assert once(theirs, 7) != home


def test_what_the_engine_counts_of_ours_is_not_others() -> None:
    found = ranks(0, 0)
    mine = [found.take(7) for _ in range(6)]
    counts = Counter(mine)
    found.saw([Load(dp_rank=rank, num_running_reqs=counts[rank]) for rank in range(2)])
    for rank in mine:
        assert rank is not None
        found.give_back(rank)
    assert len({once(found, session) for session in range(50)}) == 2, "nobody is busy any more"


def test_without_ranks_or_a_session_it_is_the_engines_choice() -> None:
    assert ranks(0).take(7) is None
    assert Ranks().take(7) is None
    found = ranks(0, 0)
    assert found.take(None) is None
    found.forget()
    assert found.take(7) is None
