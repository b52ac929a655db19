"""What the real engine says of answers that nobody waited for: limits and the ledger go by its word."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.access.keys import hashed
from tests.support import raw
from tests.support.engine import engine_urls
from tests.support.processes import Gateway, gateway, until

CHAT = "/v1/chat/completions"
PRICE = {"prompt": 1.0, "completion": 2.0, "cached": 0.1}


@pytest.fixture(scope="module")
def keyed(served: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with keys in front of the engine that the default one has launched."""
    folder = tmp_path_factory.mktemp("keyed")
    config = {
        "models": {"deepseek-v3-tiny": {"backend": "dsv3", "price": PRICE}},
        "backends": {"dsv3": {"kind": "sglang_dsv3", "hosts": [{"url": url} for url in engine_urls(served)]}},
        "keys": [{"name": name, "hash": hashed(name)} for name in ("whole", "stream", "tools", "two", "json", "one", "other")],
    }
    with gateway(folder, config, PENSTOCK_HOME=str(folder)) as running:
        running.wait_ready()
        yield running


def body(prompt: str = "Tell me a story", **more: Any) -> bytes:
    return json.dumps({**raw.chat(prompt, max_tokens=2000, ignore_eos=True, **more), "model": "deepseek-v3-tiny"}).encode()


def used(of: Gateway, name: str) -> dict[str, Any]:
    rows = of.admin(f"/admin/usage?key={name}&by=key").json()["usage"]
    found: dict[str, Any] = rows[0] if rows else {"client_gone": 0, "ok": 0}
    return found


def generating(of: Gateway) -> float:
    """Requests in the engine's batch, as it says itself."""
    (row,) = of.admin("/admin/hosts").json()["hosts"]
    found: float = (row["stats"] or {}).get("running_requests") or 0.0
    return found


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("stream", {"stream": True}),
        ("tools", {"stream": True, "logprobs": True}),  # what cannot be continued tells no usage while it runs
        ("two", {"stream": True, "n": 2}),
        ("json", {}),
    ],
)
def test_an_answer_that_is_left_is_counted_by_the_engine_itself(keyed: Gateway, name: str, more: dict[str, Any]) -> None:
    with raw.connect(keyed.port) as peer:
        peer.sendall(raw.request("POST", CHAT, body(**more), {"authorization": f"Bearer {name}"}))
        if more:
            got = b""
            while got.count(b"data: ") < 20:
                got += peer.recv(65536)
        else:
            until("a story is begun", lambda: generating(keyed) >= 1, 30)
    until("it is settled", lambda: used(keyed, name)["client_gone"], 10)
    row = used(keyed, name)
    assert row["estimated_tokens"] == 0, "the engine has told"
    assert 3 < row["generated_tokens"] < 2000 * more.get("n", 1)
    assert row["delivered_tokens"] + row["wasted_client_tokens"] == row["generated_tokens"]
    assert (row["delivered_tokens"] > 5) == bool(more)


def test_a_whole_answer_is_charged_as_it_says_and_cached_prompts_at_their_price(keyed: Gateway) -> None:
    prompt = "The same beginning, long enough to be kept in a cache of pages of one token each. " * 4
    usages = []
    for _ in range(2):
        content = json.dumps({**raw.chat(prompt, max_tokens=8), "model": "deepseek-v3-tiny"}).encode()
        usages.append(raw.call(keyed.port, "POST", CHAT, content, {"authorization": "Bearer whole"}).json()["usage"])
    row = used(keyed, "whole")
    cached = sum((usage["prompt_tokens_details"] or {}).get("cached_tokens", 0) for usage in usages)
    assert row["cached_tokens"] == cached
    assert row["prompt_tokens"] == sum(usage["prompt_tokens"] for usage in usages)
    assert row["delivered_tokens"] == row["generated_tokens"] == sum(usage["completion_tokens"] for usage in usages)
    expected = (row["prompt_tokens"] - cached) * 1.0 + cached * 0.1 + row["delivered_tokens"] * 2.0
    assert row["cost"] == pytest.approx(expected / 1e6)


def test_keys_do_not_share_the_prefix_cache(keyed: Gateway) -> None:
    """What one has asked another cannot find out by the cache; its own it finds."""
    prompt = "A secret that is long enough to be worth a place in the cache of prefixes. " * 8
    cached = {}
    for name in ("one", "one", "other"):
        content = json.dumps({**raw.chat(prompt, max_tokens=2), "model": "deepseek-v3-tiny"}).encode()
        before = used(keyed, name).get("cached_tokens", 0)
        assert raw.call(keyed.port, "POST", CHAT, content, {"authorization": f"Bearer {name}"}).status == 200
        cached[name] = used(keyed, name)["cached_tokens"] - before
    assert cached["one"] > 50
    assert cached["other"] < 10
