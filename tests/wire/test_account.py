"""`GET /v1/usage`: what the holder of a key sees of its limits and its use, and that it is its own alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from gateway.access.keys import hashed
from tests.support import raw, redis
from tests.support.processes import Gateway, Rehearsal, gateway, until

CHAT = "/v1/chat/completions"


@pytest.fixture(params=["memory", "redis"], scope="module")
def running(request: pytest.FixtureRequest, scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("account")
    keys: list[dict[str, Any]] = [
        {"name": "ann", "hash": hashed("ann"), "team": "blue", "rpm": 60, "max_in_flight": 5, "tokens_per_day": 10_000},
        {"name": "bob", "hash": hashed("bob"), "rpm": 1},
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        config = {**scripted_sglang.backend(), "keys": keys, "teams": [{"name": "blue", "tpm": 60_000}]}
        keys[0]["budget"] = {"amount": 5}
        config["models"]["deepseek-v3"]["price"] = {"prompt": 1000, "completion": 1000}
        if request.param == "redis":
            config["redis"] = {"url": stack.enter_context(redis.server(folder / "redis")).url}
        started = stack.enter_context(gateway(folder / "run", config))
        started.wait_ready()
        yield started


def ask(running: Gateway, key: str) -> int:
    return raw.call(running.port, "POST", CHAT, raw.chat("hi"), {"authorization": f"Bearer {key}"}).status


def usage(running: Gateway, key: str) -> dict[str, Any]:
    answer = raw.call(running.port, "GET", "/v1/usage", headers={"authorization": f"Bearer {key}"})
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json()
    return found


def test_a_key_sees_its_limits_what_is_left_and_its_use_by_day(running: Gateway) -> None:
    assert [ask(running, "ann") for _ in range(3)] == [200] * 3
    assert [ask(running, "bob") for _ in range(2)] == [200, 429]
    found = until(
        "the ledger has it", lambda: (got := usage(running, "ann"))["days"] and got["days"][0]["requests"] == 3 and got, every_s=0.3
    )
    assert (found["object"], found["key"], found["team"]) == ("usage", "ann", "blue")
    limits = {(row["of"], row["limit"]): row for row in found["limits"]}
    assert {place: row["per"] for place, row in limits.items()} == {
        ("key 'ann'", "rpm"): "minute",
        ("key 'ann'", "max_in_flight"): "now",
        ("key 'ann'", "tokens_per_day"): "day",
        ("key 'ann'", "budget"): "month",
        ("team 'blue'", "tpm"): "minute",
    }
    rpm = limits["key 'ann'", "rpm"]
    assert rpm["amount"] == 60
    assert 57 <= rpm["left"] <= 60
    (day,) = found["days"]
    tokens = day["prompt_tokens"] + day["generated_tokens"]
    assert (day["day"], day["model"]) == (time.strftime("%Y-%m-%d", time.gmtime()), "deepseek-v3")
    assert limits["key 'ann'", "tokens_per_day"]["left"] == 10_000 - tokens
    assert limits["key 'ann'", "budget"]["left"] == pytest.approx(5 - day["cost"])
    assert limits["key 'ann'", "max_in_flight"]["left"] is None
    other = until("the ledger has it", lambda: (got := usage(running, "bob"))["days"] and got, every_s=0.3)
    assert [(row["requests"], row["limited"]) for row in other["days"]] == [(1, 1)]
    assert other["team"] is None
    assert other["limits"][0]["left"] == 0
    assert 0 < other["limits"][0]["unused_in_s"] <= 60
    assert "ann" not in str(other)


def test_looking_takes_nothing(running: Gateway) -> None:
    before = usage(running, "bob")["limits"][0]["unused_in_s"]
    for _ in range(20):
        usage(running, "bob")
    assert usage(running, "bob")["limits"][0]["unused_in_s"] <= before


def test_an_sdk_asks_for_it_and_nobody_without_a_key_does(running: Gateway) -> None:
    with openai.OpenAI(base_url=running.base_url, api_key="ann") as client:
        assert client.get("/usage", cast_to=dict[str, Any])["key"] == "ann"
    assert raw.call(running.port, "GET", "/v1/usage").status == 401
    assert raw.call(running.port, "POST", "/v1/usage", b"{}", {"authorization": "Bearer ann"}).status == 405
