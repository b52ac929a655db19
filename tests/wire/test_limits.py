"""A gateway with keys and limits, in memory: what clients are told, what is held against them, and what the ledger says of it."""

from __future__ import annotations

import csv
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from gateway.access.keys import hashed
from tests.support import raw
from tests.support.processes import Gateway, Rehearsal, gateway, rehearsal, until
from tests.wire.test_command import penstock

CHAT = "/v1/chat/completions"
# Every key that is used here; a test looks for them wherever they must not be.
SECRETS = {name: f"sk-penstock-secret-of-{name}" for name in (
    "free", "narrow", "burst", "tokens", "slots", "daily", "budget", "bounded", "expired", "sdk", "rest", "huge", "shared-a", "shared-b",
    "gone",
)}  # fmt: skip
ADMIN = "sk-admin-secret"


def key(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "hash": hashed(SECRETS[name]), **more}


KEYS = [
    key("free"),
    key("narrow", models=["deepseek-v3"]),
    key("burst", rpm=600),
    key("tokens", tpm=60_000),
    key("slots", max_in_flight=2),
    key("daily", tokens_per_day=1000),
    key("budget", budget={"amount": 0.001, "per": "month"}),
    key("bounded", max_n=2, max_tokens=50, max_prompt_bytes=2000, max_grammar_bytes=100),
    key("expired", expires="2026-01-01T00:00:00Z"),
    key("sdk", rpm=60),
    key("rest"),
    key("huge", tpm=600),
    key("shared-a"),
    key("shared-b"),
    key("gone"),
]


@pytest.fixture(scope="module")
def engine() -> Iterator[Rehearsal]:
    with rehearsal() as running:
        yield running


def configuration(engine: Rehearsal) -> dict[str, Any]:
    return {
        "models": {
            "deepseek-v3": {"backend": "dsv3", "aliases": ["alias"], "price": {"prompt": 1.0, "completion": 10.0, "cached": 0.5}},
            "secret-model": {"backend": "dsv3"},
            "shared": {"backend": "dsv3", "limits": {"rpm": 60}},
        },
        "backends": {"dsv3": {"kind": "sglang_dsv3", "hosts": [{"url": engine.url}]}},
        "keys": KEYS,
        "limits": {"burst_s": 1},
        "admin": {"key_hash": hashed(ADMIN)},
    }


@pytest.fixture(scope="module")
def limited(engine: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("limited")
    with gateway(folder, configuration(engine), PENSTOCK_HOME=str(folder)) as running:
        running.wait_ready()
        yield running


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {SECRETS[name]}"}


def ask(to: Gateway, name: str, prompt: str = "hi", path: str = CHAT, **more: Any) -> raw.Answer:
    return raw.call(to.port, "POST", path, raw.chat(prompt, **more), bearer(name))


def used(of: Gateway, name: str, **query: str) -> dict[str, Any]:
    """The key's row in the ledger; zeros while there is none."""
    asked = "&".join(f"{field}={value}" for field, value in {"key": name, "by": "key", **query}.items())
    rows = of.admin(f"/admin/usage?{asked}", headers={"authorization": f"Bearer {ADMIN}"}).json()["usage"]
    return (
        rows[0] if rows else dict.fromkeys(("requests", "ok", "failed", "client_gone", "generated_tokens", "delivered_tokens", "cost"), 0)
    )


# Who may call


def test_every_key_that_is_not_good_gets_the_same_answer(limited: Gateway) -> None:
    bad = [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer sk-unknown"},
        {"authorization": f"Basic {SECRETS['free']}"},
        bearer("expired"),
    ]
    answers = [raw.call(limited.port, "POST", CHAT, raw.chat("hi"), headers) for headers in bad]
    assert {answer.status for answer in answers} == {401}
    assert {json.dumps(answer.error()) for answer in answers} == {json.dumps(answers[0].error())}
    assert answers[0].error()["code"] == "invalid_api_key"


def test_a_model_that_a_key_may_not_use_does_not_exist_for_it(limited: Gateway) -> None:
    assert ask(limited, "narrow").status == 200
    assert ask(limited, "narrow", model="alias").status == 200, "a model's other names are the same model"
    there, nowhere = ask(limited, "narrow", model="secret-model"), ask(limited, "narrow", model="no-such-model")
    assert (there.status, there.error()["code"]) == (404, "model_not_found")
    assert there.body.replace(b"secret-model", b"X") == nowhere.body.replace(b"no-such-model", b"X")
    listed = raw.call(limited.port, "GET", "/v1/models", headers=bearer("narrow")).json()["data"]
    assert [model["id"] for model in listed] == ["deepseek-v3", "alias"]
    assert raw.call(limited.port, "GET", "/v1/models/secret-model", headers=bearer("narrow")).status == 404
    assert raw.call(limited.port, "GET", "/v1/models/secret-model", headers=bearer("free")).status == 200


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 3}, "n"),
        ({"max_tokens": 51}, "max_tokens"),
        ({"max_completion_tokens": 51}, "max_completion_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"description": "x" * 100}}}},
            "response_format",
        ),
        ({"regex": "x" * 200}, "regex"),
    ],
)
def test_what_a_key_may_never_ask_is_said(limited: Gateway, more: dict[str, Any], param: str | None) -> None:
    answer = ask(limited, "bounded", **more)
    assert (answer.status, answer.error()["param"]) == (400, param)
    assert "your key may" in answer.error()["message"]
    assert ask(limited, "free", **more).status == 200


def test_a_keys_bound_is_set_where_the_client_names_none(limited: Gateway, engine: Rehearsal) -> None:
    assert ask(limited, "bounded", "[[tokens 60]]").json()["usage"]["completion_tokens"] == 50
    assert json.loads(engine.seen()["last_body"])["max_completion_tokens"] == 50


def test_the_clients_key_reaches_no_engine_and_its_prompts_have_a_cache_of_their_own(limited: Gateway, engine: Rehearsal) -> None:
    salts: dict[str, set[str]] = {}
    for name in ("shared-a", "shared-b"):
        for _ in range(2):
            ask(limited, name)
            seen = engine.seen()
            salts.setdefault(name, set()).add(json.loads(seen["last_body"])["cache_salt"])
            assert SECRETS[name] not in json.dumps(seen)
    assert all(len(found) == 1 for found in salts.values())
    assert salts["shared-a"] != salts["shared-b"]


# Limits


def test_the_headers_say_what_is_left_and_a_refusal_names_the_limit(limited: Gateway) -> None:
    first = ask(limited, "burst")
    assert first.headers["x-ratelimit-limit-requests"] == "600"
    assert first.headers["x-ratelimit-remaining-requests"] == "9", "a second's worth at once"
    assert first.headers["x-ratelimit-reset-requests"] == "100ms"
    answers = [ask(limited, "burst") for _ in range(40)]
    refused = [answer for answer in answers if answer.status == 429]
    assert refused
    error = refused[0].error()
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "requests")
    assert "key 'burst'" in error["message"]
    assert "requests per minute (rpm)" in error["message"]
    assert refused[0].headers["x-ratelimit-remaining-requests"] == "0"
    assert 1 <= int(refused[0].headers["retry-after-ms"]) <= 100
    assert refused[0].headers["retry-after"] == "1"


def test_who_waits_as_long_as_it_was_told_is_admitted(limited: Gateway) -> None:
    for _ in range(3):
        while (answer := ask(limited, "burst")).status == 200:
            pass
        time.sleep(int(answer.headers["retry-after-ms"]) / 1000)
        assert ask(limited, "burst").status == 200


def test_a_failure_answer_carries_the_headers_too(limited: Gateway) -> None:
    answer = ask(limited, "tokens", "[[refuse 503]]")
    assert answer.status == 503
    assert "x-ratelimit-remaining-tokens" in answer.headers


def test_a_large_bound_alone_is_not_punished(limited: Gateway) -> None:
    """60,000 a minute are 1,000 at once: a bound of 100,000 would never fit."""
    until("the estimate is learnt", lambda: ask(limited, "tokens", max_tokens=100_000).status == 200)
    before = int(ask(limited, "tokens", max_tokens=5).headers["x-ratelimit-remaining-tokens"])
    assert before > 500


def test_what_really_was_used_is_charged(limited: Gateway) -> None:
    """2,000 tokens where a few were thought of: then there is a debt of a second."""
    until("the bucket is full", lambda: int(ask(limited, "tokens").headers["x-ratelimit-remaining-tokens"]) > 900)
    assert ask(limited, "tokens", "[[tokens 2000]]").status == 200
    refused = ask(limited, "tokens")
    assert (refused.status, refused.error()["type"]) == (429, "tokens")
    assert 800 < int(refused.headers["retry-after-ms"]) < 1400


def test_a_failed_request_gets_its_tokens_back(limited: Gateway) -> None:
    until("the bucket is full", lambda: int(ask(limited, "tokens").headers["x-ratelimit-remaining-tokens"]) > 900)
    for _ in range(30):
        assert ask(limited, "tokens", "[[refuse 503]] " + "word " * 50).status == 503
    assert int(ask(limited, "tokens").headers["x-ratelimit-remaining-tokens"]) > 700


def test_a_prompt_that_could_never_pass_is_told_so_at_once(limited: Gateway) -> None:
    refused = ask(limited, "huge", "word " * 2000)
    assert (refused.status, refused.error()["code"]) == (429, "rate_limit_exceeded")
    assert "Request too large" in refused.error()["message"]
    assert refused.headers["x-should-retry"] == "false"
    assert "retry-after" not in refused.headers


def test_slots_are_open_requests(limited: Gateway) -> None:
    """In every way a request can end: whole, refused by the engine, cut off, and left by its client in any phase."""
    with raw.connect(limited.port) as one, raw.connect(limited.port) as two:
        for peer in (one, two):
            content = json.dumps(raw.chat("[[tokens 1000]] [[pace 0.02]]", stream=True)).encode()
            peer.sendall(raw.request("POST", CHAT, content, bearer("slots")))
            peer.recv(100)
        third = ask(limited, "slots")
        assert (third.status, third.error()["code"]) == (429, "rate_limit_exceeded")
        assert "requests in flight" in third.error()["message"]
    until("both are given back", lambda: ask(limited, "slots").status == 200)
    for prompt, stream in (
        ("hi", False),
        ("hi", True),
        ("[[refuse 503]]", True),
        ("[[refuse 400]]", False),
        ("[[cut 3]]", True),
        ("[[die 0]]", False),
    ):
        ask(limited, "slots", prompt, stream=stream)
    ask(limited, "slots", temperature=99)
    with raw.connect(limited.port) as peer:
        peer.sendall(raw.request("POST", CHAT, json.dumps(raw.chat("[[stall 0]]")).encode(), bearer("slots")))
        until(
            "it is held",
            lambda: (
                used(limited, "slots")["requests"] >= 0
                and limited.admin("/admin/workers", headers={"authorization": f"Bearer {ADMIN}"}).json()["workers"][0]["open"]
            ),
        )

    def both_free() -> bool:
        with raw.connect(limited.port) as one, raw.connect(limited.port) as two:
            heads = []
            for peer in (one, two):
                peer.sendall(
                    raw.request("POST", CHAT, json.dumps(raw.chat("[[tokens 50]] [[pace 0.02]]", stream=True)).encode(), bearer("slots"))
                )
                heads.append(peer.recv(15))
            return heads == [b"HTTP/1.1 200 OK"] * 2

    until("two slots are free again", both_free)


def test_a_models_own_limit_is_for_all_keys_together(limited: Gateway) -> None:
    assert ask(limited, "shared-a", model="shared").status == 200
    refused = ask(limited, "shared-b", model="shared")
    assert refused.status == 429
    assert "model 'shared'" in refused.error()["message"]
    assert ask(limited, "shared-b").status == 200


def test_a_days_tokens_end_and_the_sdks_do_not_come_again(limited: Gateway) -> None:
    until("they are used up", lambda: ask(limited, "daily", "[[tokens 300]]").status != 200, 30)
    refused = ask(limited, "daily", "[[tokens 300]]")
    assert (refused.status, refused.error()["code"], refused.error()["type"]) == (429, "insufficient_quota", "insufficient_quota")
    assert "renewed at" in refused.error()["message"]
    assert refused.headers["x-should-retry"] == "false"
    assert "retry-after" not in refused.headers


def test_a_budget_counts_money(limited: Gateway) -> None:
    """A thousandth: 12 prompt tokens at one and 8 completions at ten a million cost 0.000092, so eleven answers and no more fit."""
    answers = [ask(limited, "budget") for _ in range(14)]
    assert 8 <= sum(answer.status == 200 for answer in answers) <= 11
    assert answers[-1].error()["code"] == "insufficient_quota"
    assert "budget of 0.001 a month" in answers[-1].error()["message"]
    assert used(limited, "budget")["cost"] == pytest.approx(0.000092 * used(limited, "budget")["ok"])


def test_the_sdk_rides_out_a_429_by_itself(limited: Gateway) -> None:
    client = openai.OpenAI(base_url=limited.base_url, api_key=SECRETS["sdk"], max_retries=5)
    for _ in range(3):  # one a second
        done = client.chat.completions.create(model="deepseek-v3", messages=[{"role": "user", "content": "hi"}])
        assert done.choices[0].message.content


# The ledger


def test_what_was_used_is_in_the_ledger(limited: Gateway) -> None:
    before = used(limited, "rest")
    ask(limited, "rest", "[[tokens 20]]")
    raw.call(limited.port, "POST", CHAT, raw.chat("[[tokens 30]]", stream=True), bearer("rest"))
    raw.call(limited.port, "POST", "/v1/messages", {**raw.chat("[[tokens 5]]"), "max_tokens": 50}, bearer("rest"))
    ask(limited, "rest", "[[refuse 503]]")
    after = used(limited, "rest")
    assert after["requests"] - before["requests"] == 4
    assert (after["ok"], after["failed"]) == (3, 1)
    assert (after["prompt_tokens"], after["generated_tokens"], after["delivered_tokens"]) == (36, 55, 55)
    assert after["cost"] == pytest.approx(36e-6 + 550e-6)


@pytest.mark.parametrize("phase", ["stream", "stream of two", "json", "named events"])
def test_a_client_that_leaves_pays_for_what_it_got_and_is_limited_by_what_was_made(engine: Rehearsal, tmp_path: Path, phase: str) -> None:
    """The scripted engine says itself how many tokens it made."""
    with gateway(tmp_path, configuration(engine), PENSTOCK_HOME=str(tmp_path)) as running:
        running.wait_ready()
        made = engine.seen()["generated"]
        cases: dict[str, tuple[str, dict[str, Any]]] = {
            "stream": (CHAT, {"stream": True}),
            "stream of two": (CHAT, {"stream": True, "n": 2}),
            "json": (CHAT, {}),
            "named events": ("/v1/messages", {"stream": True, "max_tokens": 5000}),
        }
        path, more = cases[phase]
        content = json.dumps(raw.chat("[[tokens 1000]] [[pace 0.01]]", **more)).encode()
        with raw.connect(running.port) as peer:
            peer.sendall(raw.request("POST", path, content, bearer("gone")))
            if more:
                got = b""
                while got.count(b"token ") < 20:
                    got += peer.recv(65536)
            else:
                time.sleep(0.5)
        until("it is settled", lambda: used(running, "gone")["client_gone"], 10)
        row = used(running, "gone")
        until("the engine has stopped", lambda: engine.seen()["open"] == 0)
        truth = engine.seen()["generated"] - made
        assert 20 <= truth < 500
        if phase == "named events":
            # The engine does not stop by an id there and says nothing at the end: what passed is counted, and marked.
            assert row["estimated_tokens"] == row["generated_tokens"] > 0
        else:
            assert row["generated_tokens"] == truth
            assert row["estimated_tokens"] == 0
        assert row["delivered_tokens"] + row["wasted_client_tokens"] == row["generated_tokens"]
        assert (row["delivered_tokens"] > 0) == bool(more)
        paid = row["prompt_tokens"] * 1e-6 + row["delivered_tokens"] * 10e-6
        assert row["cost"] == pytest.approx(paid, rel=0.01)


def test_usage_for_a_spreadsheet_and_by_what_one_asks(limited: Gateway) -> None:
    for name in ("rest", "free"):
        assert ask(limited, name).status == 200
    headers = {"authorization": f"Bearer {ADMIN}"}
    table = list(csv.DictReader(io.StringIO(limited.admin("/admin/usage?format=csv", headers=headers).body.decode())))
    assert {"rest", "free"} <= {row["key"] for row in table}
    assert all(row["day"] and row["model"] for row in table)
    total = limited.admin("/admin/usage?by=model", headers=headers).json()["usage"]
    assert {row["key"] for row in total} == {""}
    assert sum(int(row["requests"]) for row in table) == sum(row["requests"] for row in total)
    for query in ("by=colour", "from=yesterday", "format=xml", "from=2026-12-01&to=2026-11-01", "nope=1"):
        refused = limited.admin(f"/admin/usage?{query}", headers=headers)
        assert (refused.status, refused.error()["code"]) == (400, "invalid_value")


def test_budgets_and_ledger_survive_a_restart_without_redis(engine: Rehearsal, tmp_path: Path) -> None:
    config = {**configuration(engine), "keys": [key("daily", tokens_per_day=400)]}
    with gateway(tmp_path, config, PENSTOCK_HOME=str(tmp_path)) as first:
        first.wait_ready()
        assert ask(first, "daily", "[[tokens 380]]").status == 200
        assert ask(first, "daily").status == 429
    with gateway(tmp_path / "again", config, PENSTOCK_HOME=str(tmp_path)) as second:
        second.wait_ready()
        assert used(second, "daily")["generated_tokens"] == 380
        assert ask(second, "daily").status == 429
        for worker in second.workers():
            worker.kill()
        until("a worker serves again", lambda: len(second.workers()) == 1)
        until("its budget is where it was", lambda: ask(second, "daily").status == 429)


def test_a_ledger_that_another_gateway_keeps_is_left_alone(engine: Rehearsal, tmp_path: Path) -> None:
    home = {"PENSTOCK_HOME": str(tmp_path)}
    with gateway(tmp_path / "1", configuration(engine), (), "", **home) as first:
        first.wait_ready()
        assert ask(first, "rest", "[[tokens 20]]").status == 200
        with gateway(tmp_path / "2", configuration(engine), (), "", **home) as second:
            second.wait_ready()
            assert "belongs to another gateway" in second.output()
            assert ask(second, "rest", "[[tokens 70]]").status == 200
            assert used(second, "rest")["generated_tokens"] == 70, "its own, in memory"
        assert used(first, "rest")["generated_tokens"] == 20
    with gateway(tmp_path / "3", configuration(engine), (), "", **home) as third:
        assert used(third, "rest")["generated_tokens"] == 20


def test_a_ledger_that_cannot_be_read_is_put_aside(engine: Rehearsal, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "usage.json").write_text("{nonsense")
    with gateway(tmp_path, configuration(engine), PENSTOCK_HOME=str(tmp_path)) as running:
        assert "cannot be read" in running.output()
        assert [path.read_text() for path in (tmp_path / "state").glob("usage.unreadable-*")] == ["{nonsense"]


def test_a_models_tokenizer_counts_prompts(engine: Rehearsal, tmp_path: Path) -> None:
    """One token a word, where bytes would make five of it: 600 a minute, one second's worth at once."""
    tokenizer: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "post_processor": None,
        "decoder": None, "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = configuration(engine)
    config["models"]["deepseek-v3"]["tokenizer"] = str(tmp_path / "tokenizer.json")
    config["keys"] = [key("huge", tpm=6000)]
    with gateway(tmp_path, config, PENSTOCK_HOME=str(tmp_path)) as running:
        running.wait_ready()
        prompt = "extraordinarily " * 80
        assert ask(running, "huge", prompt, max_tokens=1).status == 200
        refused = ask(running, "huge", prompt * 2)
        assert "about 16" in refused.error()["message"]


# Bad input


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keys": [{"name": "a", "hash": "sk-in-the-clear"}]}, "keys.0.hash: is not accepted; accepted: 'sha256:' and 64 hex digits"),
        ({"keys": [key("free", rpm=0)]}, "keys.0.rpm: 0 is out of range; accepted: above 0"),
        ({"keys": [key("free", tpm=-5)]}, "keys.0.tpm: -5 is out of range"),
        (
            {"keys": [key("free", per_model={"deepseek-v3": {"max_in_flight": 0}})]},
            "keys.0.per_model.deepseek-v3.max_in_flight: 0 is out of range",
        ),
        ({"keys": [key("free", models=["deepseek-v4"])]}, "keys.0.models: no model is called 'deepseek-v4'; did you mean 'deepseek-v3'?"),
        ({"keys": [key("free", budget={"amount": 0})]}, "keys.0.budget.amount: 0 is out of range"),
        ({"keys": [key("free", priority=10)]}, "keys.0.priority: 10 is out of range; accepted: 0 (first) to 9"),
        ({"keys": [key("free", expires="soon")]}, "keys.0.expires: 'soon' is no date and time"),
        ({"keys": [{**key("free"), "name": "a b"}]}, "keys.0.name: 'a b' is not accepted; accepted: up to 64 letters"),
        ({"keys": [key("free", rmp=5)]}, "keys.0.rmp: unknown key; did you mean 'rpm'?"),
        ({"limits": {"timezone": "Mars/Olympus"}}, "limits.timezone: 'Mars/Olympus' is no time zone"),
        ({"listen": {"workers": 2}, "keys": [key("free", rpm=5)]}, "listen.workers: 2 workers cannot keep limits together without Redis"),
        ({"redis": {"url": "localhost:6379"}}, "redis.url: must begin with redis://"),
        ({"redis": {"url": "redis://127.0.0.1:1", "on_store_failure": "panic"}}, "redis.on_store_failure"),
        ({"models": {"deepseek-v3": {"backend": "dsv3", "limits": {"rpm": -1}}}}, "models.deepseek-v3.limits.rpm: -1 is out of range"),
        ({"models": {"deepseek-v3": {"backend": "dsv3", "tokenizer": "/nonexistent"}}}, "models.deepseek-v3.tokenizer: cannot be read"),
        ({"security": {"require_keys": False}, "listen": {"host": "0.0.0.0"}, "keys": []}, "listen.host: without keys"),
    ],
)
def test_a_wrong_setting_is_refused_at_start_with_its_place(engine: Rehearsal, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    config = {**configuration(engine), **change}
    if "models" in change:
        config["keys"] = []
    elif "keys" in change:
        config["models"] = {"deepseek-v3": {"backend": "dsv3", "price": {"prompt": 1}}}
    (tmp_path / "penstock.yaml").write_text(json.dumps(config))
    done = penstock("check", "-c", "penstock.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr


def test_guessing_at_the_operators_key_gets_slow(limited: Gateway) -> None:
    """And nobody else waits for it: the right key from the same address passes at once meanwhile."""
    started = time.monotonic()
    wrong = [limited.admin("/admin/workers", headers={"authorization": f"Bearer wrong-{number}"}) for number in range(3)]
    assert {answer.status for answer in wrong} == {401}
    slow = threading.Thread(target=limited.admin, args=("/admin/workers",), kwargs={"headers": {"authorization": "Bearer wrong"}})
    begun = time.monotonic()
    slow.start()
    assert limited.admin("/admin/workers", headers={"authorization": f"Bearer {ADMIN}"}).status == 200
    assert slow.is_alive(), "the guess is still waiting"
    slow.join(20)
    assert time.monotonic() - begun >= 0.5
    assert begun - started < 10


def test_no_secret_is_anywhere(limited: Gateway, engine: Rehearsal, tmp_path: Path) -> None:
    """After all of the above: logs, metrics, the ledger, the configuration as it is shown, and what engines were sent."""
    headers = {"authorization": f"Bearer {ADMIN}"}
    places = {
        path: limited.admin(path, headers=headers).body.decode()
        for path in ("/metrics", "/admin/usage", "/admin/keys", "/admin/config", "/admin/hosts")
    }
    places["log"] = limited.output()
    places["engine"] = json.dumps(engine.seen())
    places["errors"] = ask(limited, "expired").body.decode() + ask(limited, "free", "x", model="nope").body.decode()
    (tmp_path / "penstock.yaml").write_text(
        json.dumps({**configuration(engine), "redis": {"url": "redis://user:sk-redis-password@127.0.0.1:1"}})
    )
    check = penstock("check", "-c", "penstock.yaml", folder=tmp_path)
    assert check.returncode == 0, check.stderr
    places["check"] = check.stdout + check.stderr
    assert "redis.url: does not answer now" in check.stdout
    for place, text in places.items():
        for secret in (*SECRETS.values(), ADMIN, "sk-redis-password"):
            assert secret not in text, place
        for entry in KEYS:
            assert entry["hash"].removeprefix("sha256:") not in text, place
