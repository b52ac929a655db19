"""Two real engines: conversations keep their host, and the engines' `cached_tokens` prove it; one that has to move pays what is said."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.support.processes import Gateway, gateway, until

CONVERSATIONS, TURNS = 10, 4
MODELS = {name: {"backend": "dsv3", "balance": balance} for name, balance in (("bound", "affinity"), ("unbound", "two_choices"))}
Asked = tuple[dict[str, Any], int, int]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with two engines of its own."""
    section = {"kind": "sglang_dsv3", "hosts": [{"launch": "local"}, {"launch": "local"}], "health": {"slow_start_s": 0}}
    with gateway(tmp_path_factory.mktemp("two"), {"models": MODELS, "backends": {"dsv3": section}}) as running:
        running.wait_ready(300)
        running.wait_all_hosts(300)
        yield running


def explained(to: Gateway, name: str) -> dict[str, Any]:
    def look() -> dict[str, Any]:
        found = to.admin(f"/admin/requests/{name}")
        return found.json() if found.status == 200 else {}

    return until("it is observed", look)


def talk(to: Gateway, model: str, name: str) -> Iterator[Asked]:
    """A conversation, turn by turn: of each the record, its prompt's tokens, and how many of them the engine had."""
    messages: list[Any] = [{"role": "system", "content": f"You are {name}. " * 8}, {"role": "user", "content": f"Who are you, {name}?"}]
    with openai.OpenAI(base_url=to.base_url, api_key="none", max_retries=0) as client:
        for turn in itertools.count():
            answer = client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)
            usage = answer.usage
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            yield explained(to, answer.id), usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens or 0
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
            messages.append({"role": "user", "content": f"And what do you say to number {turn}?"})


def all_of(to: Gateway, model: str) -> list[list[Asked]]:
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(lambda number: list(itertools.islice(talk(to, model, f"{model} {number}"), TURNS)), range(CONVERSATIONS)))


def hit_rate(conversations: list[list[Asked]]) -> float:
    """Of the turns after the first."""
    turns = [turn for conversation in conversations for turn in conversation[1:]]
    return sum(cached for _, _, cached in turns) / sum(prompt for _, prompt, _ in turns)


def test_conversations_keep_their_host_and_the_engines_say_so(two: Gateway) -> None:
    bound, unbound = all_of(two, "bound"), all_of(two, "unbound")
    places = [[found["attempts"][0]["host"] for found, _, _ in conversation] for conversation in bound]
    stayed = [conversation for conversation, where in zip(bound, places, strict=True) if len(set(where)) == 1]
    assert len(stayed) >= CONVERSATIONS - 2, places  # the bound on a host's load may move one
    assert len({host for where in places for host in where}) == 2, "and not all at the same"
    for conversation in stayed:
        for (_, before, _), (found, _, cached) in itertools.pairwise(conversation):
            attempt = found["attempts"][0]
            assert cached >= before - 2, "all that was asked before, but for what the template puts at its end"
            assert attempt["cached_tokens"] == cached
            assert attempt["expected_tokens"] == before, "and it was expected to the token"
    print(
        f"\n{CONVERSATIONS} conversations of {TURNS} turns at two engines: {hit_rate(bound):.1%} of the prompts of later turns were cached"
    )
    print(f"under two_choices {hit_rate(unbound):.1%}")
    assert hit_rate(bound) > hit_rate(unbound)


def test_a_conversation_whose_host_is_drained_says_what_it_paid(two: Gateway) -> None:
    conversation = talk(two, "bound", "somebody who moves")
    next(conversation)
    second, prompt, _ = next(conversation)
    home = second["attempts"][0]["host"]
    drained = two.admin(f"/admin/hosts/{home}/drain", "POST")
    assert drained.status == 200, drained.body
    try:
        until("it is drained", lambda: {row["id"]: row["state"] for row in two.admin("/admin/hosts").json()["hosts"]}[home] == "drained")
        third, longer, cached = next(conversation)
    finally:
        two.admin(f"/admin/hosts/{home}/undrain", "POST")
    attempt = third["attempts"][0]
    assert attempt["host"] != home
    assert (attempt["moved_from"], attempt["moved_tokens"]) == (home, prompt - cached)
    assert cached < prompt / 2
    fourth, _, cached = next(conversation)
    assert fourth["attempts"][0]["host"] == attempt["host"], "and it stays where its prefix is now"
    assert cached >= longer - 2
