"""A real engine with two data-parallel ranks, each with a cache of its own: sessions keep their rank, and `cached_tokens` prove it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.support.processes import Gateway, gateway, until

MODELS = {name: {"backend": "dsv3", "balance": balance} for name, balance in (("bound", "affinity"), ("unbound", "two_choices"))}
SESSIONS = 8


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    engine = {"extra_args": ["--dp-size", "2", "--load-balance-method", "round_robin"], "max_total_tokens": 16384}
    section = {"kind": "sglang_dsv3", "hosts": [{"launch": "local"}], "engine": engine}
    config = {"models": MODELS, "backends": {"dsv3": section}}
    # SGLang counts a CPU for each rank and refuses to share one unless it is told which.
    cores = sorted(os.sched_getaffinity(0))
    with gateway(tmp_path_factory.mktemp("ranked"), config, SGLANG_CPU_OMP_THREADS_BIND=f"{cores[0]}|{cores[-1]}") as running:
        running.wait_ready(300)
        running.wait_all_hosts(300)
        yield running


def cached(to: Gateway, model: str, name: str) -> int:
    """How many tokens of a prompt the engine had that was asked just before."""
    messages: list[Any] = [{"role": "system", "content": f"You are {name}. " * 12}, {"role": "user", "content": "Who are you?"}]
    with openai.OpenAI(base_url=to.base_url, api_key="none", max_retries=0) as client:
        found = [client.chat.completions.create(model=model, messages=messages, max_tokens=2, temperature=0).usage for _ in range(2)]
    first, second = found
    assert first is not None
    assert second is not None
    assert second.prompt_tokens_details is not None
    assert first.prompt_tokens > 50
    return second.prompt_tokens_details.cached_tokens or 0


def test_a_session_comes_back_to_its_rank(ranked: Gateway) -> None:
    """Left to itself this engine gives the second question to the other rank, which has nothing of it."""
    until("both ranks are known", lambda: len(ranked.admin("/admin/hosts").json()["hosts"]) == 1 and capacity(ranked) >= 128, 30, 0.5)
    bound = [cached(ranked, "bound", f"session {number}") for number in range(SESSIONS)]
    unbound = [cached(ranked, "unbound", f"nobody {number}") for number in range(SESSIONS)]
    assert min(bound) > 50, bound
    assert max(unbound) < 20, unbound


def capacity(to: Gateway) -> int:
    return int(to.admin("/admin/hosts").json()["hosts"][0]["capacity"] or 0)
