"""A real engine with a small KV cache that says what leaves it: the gateway expects there what is there, before any answer has told."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import raw
from tests.support.engine import engine_url, sglang
from tests.support.processes import Gateway, fetch, gateway, until

CHAT = "/v1/chat/completions"
TOKENS = 5000


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def telling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    events, replay = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    publisher = json.dumps({"publisher": "zmq", "endpoint": events, "replay_endpoint": replay.replace("127.0.0.1", "*"), "bind": True})
    engine = {"max_total_tokens": TOKENS, "context_length": 2048, "extra_args": ["--kv-events-config", publisher]}
    hosts = [{"launch": "local", "kv_events": events, "kv_replay": replay}]
    backend = {"kind": "sglang_dsv3", "hosts": hosts, "engine": engine, "health": {"slow_start_s": 0, "probe_s": 0.2}}
    config = {"models": {"m": {"backend": "dsv3"}}, "backends": {"dsv3": backend}}
    with gateway(tmp_path_factory.mktemp("telling"), config) as running:
        running.wait_ready(300)
        running.wait_all_hosts(300)
        yield running


def ask(to: Gateway, name: str, turns: int = 0, words: int = 60) -> tuple[dict[str, Any], int]:
    """The attempt as `explain` has it, and how many tokens the engine had."""
    messages = [{"role": "user", "content": f"I am {name}. " + f"{name} tells a story. " * words}]
    for turn in range(turns):
        messages += [{"role": "assistant", "content": f"Well, {name}."}, {"role": "user", "content": f"Question {turn}"}]
    answer = raw.call(to.port, "POST", CHAT, {"model": "m", "messages": messages, "max_tokens": 4, "temperature": 0})
    assert answer.status == 200, answer.body

    def kept() -> dict[str, Any]:
        found = to.admin(f"/admin/requests/{answer.headers['x-request-id']}")
        return found.json() if found.status == 200 else {}

    attempt = until("it is observed", kept)["attempts"][-1]
    return attempt, int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def stats(to: Gateway) -> dict[str, Any]:
    found = to.admin("/admin/hosts").json()["hosts"][0]["stats"] or {}
    return dict(found)


def evicted(to: Gateway) -> float:
    return float(stats(to).get("kv_events_evicted_blocks") or 0)


def test_what_others_have_pushed_out_is_not_expected_any_more(telling: Gateway) -> None:
    ask(telling, "anna")
    again, cached = ask(telling, "anna", turns=1)
    assert again["expected_tokens"] > 200
    assert cached > 200
    assert "evicted" not in again
    for number in range(16):
        ask(telling, f"number{number}", words=80)
    until("the engine has told of it", lambda: evicted(telling) > 300, 30, 0.1)
    gone, cached = ask(telling, "anna", turns=2)
    assert cached < 50
    assert gone["expected_tokens"] < 50
    assert gone["evicted"]
    known, cached = ask(telling, "anna", turns=3)
    assert known["expected_tokens"] > 200
    assert cached > 200
    assert stats(telling)["kv_events_missed"] == 0
    metrics = telling.admin("/metrics").body.decode()
    assert 'penstock_engine_kv_events_evicted_blocks{backend="dsv3"' in metrics


def test_a_cache_that_was_flushed_is_empty(telling: Gateway) -> None:
    ask(telling, "berta")
    assert ask(telling, "berta")[0]["expected_tokens"] > 200
    before = evicted(telling)
    fetch(f"{engine_url(telling)}/flush_cache")
    until("the engine has told of it", lambda: evicted(telling) > before, 30, 0.1)
    attempt, cached = ask(telling, "berta")
    assert (attempt["expected_tokens"], attempt["evicted"]) == (0, True)
    assert cached < 50


def test_an_engine_that_was_started_again_has_nothing(telling: Gateway) -> None:
    ask(telling, "carla")
    assert ask(telling, "carla")[0]["expected_tokens"] > 200
    before = sglang(telling)
    before.kill()
    until("it is another one", lambda: sglang(telling).pid != before.pid, 120, 0.5)
    telling.wait_ready(300)
    telling.wait_all_hosts(300)
    attempt, cached = ask(telling, "carla")
    assert attempt["expected_tokens"] == 0
    assert cached < 50
    attempt, cached = ask(telling, "carla")
    assert attempt["expected_tokens"] > 200
    assert cached > 200
