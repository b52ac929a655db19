"""Sessions, and what hosts have cached, as clients, operators and a collector see it; before scripted servers that keep prefixes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.access.keys import hashed
from tests.support import raw
from tests.support.otlp import Collector, collector
from tests.support.processes import Gateway, Rehearsal, gateway, rehearsal, until

CHAT = "/v1/chat/completions"
LONG = "You know everything about waterworks. " * 40


@pytest.fixture(scope="module")
def engines() -> Iterator[list[Rehearsal]]:
    with rehearsal() as one, rehearsal() as two:
        yield [one, two]


@pytest.fixture(scope="module")
def sink() -> Iterator[Collector]:
    with collector() as running:
        yield running


@pytest.fixture(scope="module")
def routed(engines: list[Rehearsal], sink: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    config: dict[str, Any] = {
        "models": {"deepseek-v3": {"backend": "dsv3"}, "plain": {"backend": "dsv3", "balance": "two_choices"}},
        "backends": {
            "dsv3": {"kind": "sglang_dsv3", "hosts": [{"url": engine.url} for engine in engines], "health": {"slow_start_s": 0}},
        },
        "keys": [{"name": name, "hash": hashed(f"sk-{name}")} for name in "ab"],
        "tracing": {"otlp_endpoint": sink.endpoint},
    }
    with gateway(tmp_path_factory.mktemp("routed"), config, OTEL_BSP_SCHEDULE_DELAY="100") as running:
        running.wait_all_hosts()
        yield running


@pytest.fixture(autouse=True)
def caching(engines: list[Rehearsal]) -> None:
    for engine in engines:
        engine.behave(caching=1 << 20, ready=200)


def turns(name: str, count: int) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": LONG}, {"role": "user", "content": f"I am {name}."}]
    for turn in range(count):
        messages += [{"role": "assistant", "content": f"Hello {name}."}, {"role": "user", "content": f"Question {turn}. {LONG}"}]
    return messages


def ask(to: Gateway, messages: list[dict[str, str]], headers: dict[str, str] | None = None, key: str = "a", **more: Any) -> raw.Answer:
    body = {"model": "deepseek-v3", "messages": messages, **more}
    answer = raw.call(to.port, "POST", CHAT, body, {"authorization": f"Bearer sk-{key}", **(headers or {})})
    assert answer.status == 200, answer.body
    return answer


def explained(to: Gateway, answer: raw.Answer) -> dict[str, Any]:
    return until("it is observed", lambda: _kept(to, answer.headers["x-request-id"]))


def _kept(to: Gateway, request_id: str) -> dict[str, Any]:
    found = to.admin(f"/admin/requests/{request_id}")
    return found.json() if found.status == 200 else {}


def host(to: Gateway, answer: raw.Answer) -> str:
    return str(explained(to, answer)["attempts"][-1]["host"])


def test_conversations_keep_their_host_and_are_spread(routed: Gateway) -> None:
    placed: dict[int, set[str]] = {}
    for turn, number in itertools.product(range(3), range(24)):
        placed.setdefault(number, set()).add(host(routed, ask(routed, turns(f"keeper {number}", turn))))
    assert all(len(where) == 1 for where in placed.values()), placed
    assert len(set().union(*placed.values())) == 2


def test_a_session_keeps_its_host_whatever_it_asks_and_the_answer_says_why(routed: Gateway) -> None:
    for headers, more, source in (
        ({"X-Session-Id": "one"}, {}, "x-session-id"),
        ({}, {"prompt_cache_key": "two"}, "prompt_cache_key"),
        ({}, {"session_id": "three", "user": "u"}, "session_id"),
    ):
        answers = [ask(routed, turns(f"{source} {number}", 0), headers, **more) for number in range(6)]
        assert {answer.headers["x-penstock-affinity"] for answer in answers} == {source}
        assert len({host(routed, answer) for answer in answers}) == 1, source
        assert explained(routed, answers[0])["affinity"] == source
    others = [ask(routed, turns(f"somebody {number}", 0), prompt_cache_key=f"key {number}") for number in range(24)]
    assert len({host(routed, answer) for answer in others}) == 2


def test_without_a_session_the_leading_messages_bind_and_other_policies_say_none(routed: Gateway) -> None:
    assert ask(routed, turns("a", 0)).headers["x-penstock-affinity"] == "prefix"
    plain = raw.call(
        routed.port, "POST", CHAT, {"model": "plain", "messages": turns("a", 0), "prompt_cache_key": "k"}, {"authorization": "Bearer sk-a"}
    )
    assert plain.headers["x-penstock-affinity"] == "none"


def test_a_name_that_is_none_is_ignored_and_counted(routed: Gateway, engines: list[Rehearsal]) -> None:
    answer = ask(routed, turns("odd", 0), {"x-session-id": "x" * 257}, prompt_cache_key=["k"], session_id=7)
    assert answer.headers["x-penstock-affinity"] == "prefix"
    assert explained(routed, answer)["ignored"] == ["x-session-id", "prompt_cache_key", "session_id"]
    until("it is counted", lambda: "ignored_total{" in routed.admin("/metrics").body.decode())
    text = routed.admin("/metrics").body.decode()
    for source in ("x-session-id", "prompt_cache_key", "session_id"):
        assert f'penstock_session_names_ignored_total{{source="{source}"}} 1' in text


def test_a_session_id_is_the_gateways_and_no_engine_sees_it(routed: Gateway, engines: list[Rehearsal]) -> None:
    ask(routed, turns("mine", 0), session_id="s")
    assert all('"session_id"' not in engine.seen()["last_body"] for engine in engines)


def test_the_same_session_of_another_key_is_another(routed: Gateway) -> None:
    """Names are scoped: of sixteen sessions some must lie elsewhere for another key."""
    names = [f"scoped {number}" for number in range(16)]
    places: dict[str, list[str]] = {"a": [], "b": []}
    for key, name in itertools.product("ab", names):
        places[key].append(host(routed, ask(routed, [{"role": "user", "content": name}], {"x-session-id": name}, key)))
    assert places["a"] != places["b"]


def test_a_conversation_that_had_to_move_says_what_it_paid(routed: Gateway, engines: list[Rehearsal], sink: Collector) -> None:
    first = ask(routed, turns("mover", 0))
    second = ask(routed, turns("mover", 1))
    home = host(routed, first)
    stayed = explained(routed, second)["attempts"][0]
    prompt = explained(routed, first)["prompt_tokens"]
    assert (stayed["host"], stayed["expected_tokens"], stayed["cached_tokens"]) == (home, prompt, prompt)
    engine = next(engine for engine in engines if engine.url.endswith(home))
    engine.behave(ready=503)
    until("it is out", lambda: {row["id"]: row["state"] for row in routed.admin("/admin/hosts").json()["hosts"]}[home] == "down")
    third = ask(routed, turns("mover", 2))
    moved = explained(routed, third)["attempts"][0]
    assert moved["host"] != home
    assert moved["moved_from"] == home
    had = explained(routed, second)["prompt_tokens"]
    assert moved["moved_tokens"] == had - moved["cached_tokens"] > 300
    engine.behave(ready=200)
    until("it is back", lambda: {row["id"]: row["state"] for row in routed.admin("/admin/hosts").json()["hosts"]}[home] == "ok")
    fourth = explained(routed, ask(routed, turns("mover", 3)))["attempts"][0]
    assert fourth["host"] == moved["host"], "it stays where its prefix is now"
    assert fourth["cached_tokens"] > moved["cached_tokens"] + moved["moved_tokens"]
    text = routed.admin("/metrics").body.decode()
    assert f'penstock_conversation_moves_total{{model="deepseek-v3",host="{moved["host"]}"}} 1' in text
    assert f'penstock_conversation_moved_tokens_total{{model="deepseek-v3",host="{moved["host"]}"}} {moved["moved_tokens"]}' in text
    server, below = sink.tree(third.headers["x-trace-id"])
    assert server.attributes["penstock.affinity"] == "prefix"
    client = next(span for span in below if "penstock.moved.from" in span.attributes)
    assert client.attributes["penstock.moved.from"] == home
    assert client.attributes["penstock.moved.tokens"] == moved["moved_tokens"]


def test_what_was_expected_and_what_was_there_is_counted_by_host(routed: Gateway, engines: list[Rehearsal]) -> None:
    """An engine that has lost its cache says so by what it has not; after that nothing older is expected of it."""
    answers = [ask(routed, turns(f"loser {number}", 0)) for number in range(2)]
    for engine in engines:
        engine.behave(caching=1 << 20)  # as if it had been started anew
    again = explained(routed, ask(routed, turns("loser 1", 1)))["attempts"][0]
    assert again["expected_tokens"] > 300
    assert again["cached_tokens"] == 0
    if host(routed, answers[0]) == again["host"]:
        assert explained(routed, ask(routed, turns("loser 0", 1)))["attempts"][0]["expected_tokens"] < again["expected_tokens"]
    text = until("it is counted", lambda: routed.admin("/metrics").body.decode())
    lines = {
        line.split(" ")[0]: float(line.split(" ")[1]) for line in text.splitlines() if line.startswith("penstock_prefix_tokens_total{")
    }
    of = {
        kind: lines[f'penstock_prefix_tokens_total{{model="deepseek-v3",host="{again["host"]}",kind="{kind}"}}']
        for kind in ("prompt", "expected", "cached")
    }
    assert of["prompt"] > of["expected"] > of["cached"] > 0


def test_sessions_keep_their_rank_inside_a_host(tmp_path: Path) -> None:
    """A host with data-parallel ranks is told which of them, by SGLang's own header; a client cannot say."""
    with rehearsal() as engine:
        engine.behave(loads=[{"dp_rank": rank, "max_running_requests": 16} for rank in range(4)])
        with gateway(tmp_path, engine.backend()) as running:
            running.wait_all_hosts()

            def rank(session: str, **more: Any) -> str:
                body = {"model": "deepseek-v3", "messages": turns("x", 0), "prompt_cache_key": session, **more}
                assert raw.call(running.port, "POST", CHAT, body, {"x-data-parallel-rank": "9"}).status == 200
                return str({name.lower(): value for name, value in engine.seen()["last_headers"].items()}.get("x-data-parallel-rank"))

            first = [rank(f"session {number}") for number in range(16)]
            assert first == [rank(f"session {number}", stream=True) for number in range(16)]
            assert set(first) <= {"0", "1", "2", "3"}
            assert len(set(first)) > 1
            engine.behave(loads=[{"dp_rank": 0, "max_running_requests": 16}])
            until("it has one rank now", lambda: rank("session 0") == "None", 15, 0.5)


def test_what_others_have_at_a_host_counts(tmp_path: Path) -> None:
    """Another gateway keeps one of two hosts busy: ours learns that from the engine, and sends nearly everything to the other one."""
    with rehearsal() as busy, rehearsal() as idle:
        config = busy.backend()
        config["backends"]["dsv3"]["hosts"] = [{"url": busy.url}, {"url": idle.url}]
        busy.behave(loads=[{"dp_rank": 0, "num_running_reqs": 40, "max_running_requests": 64}])
        with gateway(tmp_path, config) as running:
            running.wait_all_hosts()
            seen = {"busy": 0, "idle": 0}

            def avoided() -> bool:
                before = busy.seen()["requests"], idle.seen()["requests"]
                for number in range(10):
                    body = {"model": "deepseek-v3", "messages": turns(f"{time.monotonic()} {number}", 0)}
                    assert raw.call(running.port, "POST", CHAT, body).status == 200
                seen["busy"], seen["idle"] = busy.seen()["requests"] - before[0], idle.seen()["requests"] - before[1]
                return seen == {"busy": 0, "idle": 10}

            until("the busy one is left alone", avoided, 30, 0.5)
