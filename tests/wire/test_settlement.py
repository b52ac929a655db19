"""What a request reserves, what it is charged in the end, and how it is said to have ended: one word for all who look."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gateway.access.keys import hashed
from gateway.telemetry.record import MAX_MODEL, MAX_URL, OUTCOMES
from tests.support import raw, redis
from tests.support.processes import Gateway, Rehearsal, gateway, rehearsal, until

CHAT = "/v1/chat/completions"
KEYS = [
    {"name": "bounded", "hash": hashed("sk-bounded"), "max_tokens": 10, "tpm": 1_000_000},
    {"name": "plain", "hash": hashed("sk-plain"), "tpm": 1_000_000},
    {"name": "once", "hash": hashed("sk-once"), "rpm": 1},
]


def configuration(engine: Rehearsal, **more: Any) -> dict[str, Any]:
    found = engine.backend()
    found["models"]["deepseek-v3"]["price"] = {"prompt": 1.0, "completion": 10.0}
    return {**found, "keys": KEYS, "limits": {"burst_s": 60}, **more}


@pytest.fixture(scope="module")
def keyed(scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("keyed")
    with gateway(folder, configuration(scripted_sglang), PENSTOCK_HOME=str(folder)) as running:
        running.wait_ready()
        running.wait_all_hosts()
        yield running


def ask(to: Gateway, key: str, prompt: str = "hi", headers: dict[str, str] | None = None, **more: Any) -> raw.Answer:
    return raw.call(to.port, "POST", CHAT, raw.chat(prompt, **more), {"authorization": f"Bearer sk-{key}", **(headers or {})})


def explained(by: Gateway, request_id: str) -> dict[str, Any]:
    answer = by.admin(f"/admin/requests/{request_id}")
    return dict(answer.json()) if answer.status == 200 else {}


def has_more(engine: Rehearsal, than: int) -> bool:
    return int(engine.seen()["requests"]) > than


def line_of(gateway: Gateway, request_id: str) -> dict[str, Any]:
    """Its line in the log, once it is there."""
    return until(f"the line of {request_id}", lambda: next((row for row in gateway.requests() if row["request_id"] == request_id), {}))


def usage(of: Gateway, key: str) -> dict[str, Any]:
    rows = [row for row in of.admin("/admin/usage").json()["usage"] if row["key"] == key]
    return dict(rows[0]) if rows else {}


def test_a_bound_reserves_the_same_whoever_says_it(keyed: Gateway) -> None:
    ids = {"by its key": "reserve-key", "by the client": "reserve-client"}
    assert ask(keyed, "bounded", headers={"x-request-id": ids["by its key"]}).status == 200
    assert ask(keyed, "plain", headers={"x-request-id": ids["by the client"]}, max_tokens=10).status == 200
    took = {who: [row["reserved"] for row in explained(keyed, name)["limits"] if row["limit"].endswith("tpm")] for who, name in ids.items()}
    (by_key,), (by_client,) = took.values()
    assert abs(by_key - by_client) <= 2, "the prompt's estimate learns in between"
    assert by_key < 40, "not what answers usually take"


def test_a_prompt_counts_from_the_moment_that_an_engine_has_it(keyed: Gateway, scripted_sglang: Rehearsal) -> None:
    """A client that leaves before the first token has made an engine read its prompt, and again and again would be free."""
    before = usage(keyed, "plain").get("prompt_tokens", 0)
    prompt = "[[stall 0]] " + "word " * 4000
    content = json.dumps(raw.chat(prompt, stream=True)).encode()
    left = usage(keyed, "plain").get("client_gone", 0)
    for _ in range(2):
        asked = scripted_sglang.seen()["requests"]
        with raw.connect(keyed.port) as peer:
            peer.sendall(raw.request("POST", CHAT, content, {"authorization": "Bearer sk-plain"}))
            until("the engine has it", partial(has_more, scripted_sglang, asked))
    until("both are settled", lambda: usage(keyed, "plain").get("client_gone", 0) == left + 2)
    found = usage(keyed, "plain")
    assert found["prompt_tokens"] - before >= 2 * 4000, found
    assert found["cost"] > 0


def test_what_no_engine_has_begun_costs_nothing(keyed: Gateway) -> None:
    before = usage(keyed, "bounded").get("prompt_tokens", 0)
    assert ask(keyed, "bounded", "[[refuse 503]] " + "word " * 1000).status == 503
    assert ask(keyed, "bounded", "[[refuse 400]] " + "word " * 1000).status == 400
    until("both are settled", lambda: usage(keyed, "bounded").get("failed", 0) >= 2)
    assert usage(keyed, "bounded")["prompt_tokens"] == before


CASES: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "whole": ("hi", {}, 200, "ok"),
    "refused by the engine": ("[[refuse 400]]", {}, 400, "refused"),
    "no such model": ("hi", {"model": "nobody"}, 404, "refused"),
    "busy": ("[[refuse 503]]", {}, 503, "overloaded"),
    "failed": ("[[refuse 500]]", {}, 502, "engine_error"),
    "broken off": ("[[tokens 9]] [[die 3]]", {"stream": True, "n": 2}, 200, "cut"),
}


@pytest.mark.parametrize("name", CASES)
def test_everybody_says_the_same_word(keyed: Gateway, name: str) -> None:
    prompt, more, status, outcome = CASES[name]
    request_id = f"word-{name.replace(' ', '-')}"
    answer = ask(keyed, "plain", prompt, {"x-request-id": request_id}, **more)
    assert answer.status == status
    assert outcome in OUTCOMES
    line = line_of(keyed, request_id)
    assert line["outcome"] == outcome
    assert explained(keyed, request_id)["outcome"] == outcome
    counted = keyed.admin("/metrics").body.decode().splitlines()
    model = "" if more.get("model") else "deepseek-v3"
    assert any(
        row.startswith(f'penstock_requests_total{{route="{CHAT}",model="{model}",status="{status}",outcome="{outcome}"}}')
        for row in counted
    )


def test_strangers_and_the_limited_are_told_apart(keyed: Gateway) -> None:
    assert ask(keyed, "unknown", headers={"x-request-id": "word-stranger"}).status == 401
    assert [ask(keyed, "once", headers={"x-request-id": f"word-once-{n}"}).status for n in range(2)] == [200, 429]
    assert [line_of(keyed, name)["outcome"] for name in ("word-stranger", "word-once-1")] == ["unauthorized", "limited"]


def test_the_longest_that_a_client_may_say_weighs_little_wherever_it_is_kept(keyed: Gateway) -> None:
    long = "m" * 1_000_000
    answer = ask(keyed, "plain", headers={"x-request-id": "i" * 128}, model=long)
    assert answer.status == 404
    assert len(answer.body) < 2000
    line = line_of(keyed, "i" * 128)
    assert len(line["model"]) == MAX_MODEL
    assert len(json.dumps(line)) < 2000
    assert len(json.dumps(explained(keyed, "i" * 128))) < 3000
    until("the path's line", lambda: raw.call(keyed.port, "GET", "/" + "p" * 30_000, headers={"x-request-id": "long-path"}).status == 401)
    line = line_of(keyed, "long-path")
    assert len(json.dumps(line)) < MAX_URL + 1000


def test_control_characters_of_a_client_are_shown_and_not_obeyed(keyed: Gateway) -> None:
    name = "\x1b[2J\x1b]0;owned\x07deepseek"
    assert ask(keyed, "plain", headers={"x-request-id": "escape"}, model=name).status == 404
    shown = until("it is kept", lambda: keyed.admin("/admin/requests/escape?format=text").body)
    assert b"\x1b" not in shown
    assert b"\\x1b[2J" in shown


def test_one_clients_request_id_does_not_hide_anothers(keyed: Gateway) -> None:
    ids = [ask(keyed, key, headers={"x-request-id": "the-same"}).json()["id"] for key in ("plain", "bounded")]
    until("both are kept", lambda: explained(keyed, "the-same").get("also"))
    found = explained(keyed, "the-same")
    assert [found["id"], *found["also"]] == list(reversed(ids)), "the newest first, and the other named"
    assert [explained(keyed, one)["key"] for one in ids] == ["plain", "bounded"]


def test_a_stream_that_the_shutdown_ends_is_said_so_and_no_fault(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    config = configuration(scripted_sglang, timeouts={"drain_s": 0.2})
    with gateway(tmp_path, config, PENSTOCK_HOME=str(tmp_path)) as running:
        running.wait_ready()
        content = json.dumps(raw.chat("[[tokens 5000]] [[pace 0.01]]", stream=True)).encode()
        with raw.connect(running.port) as peer:
            peer.sendall(raw.request("POST", CHAT, content, {"authorization": "Bearer sk-plain", "x-request-id": "ended"}))
            got = peer.recv(65536)
            running.process.send_signal(signal.SIGTERM)
            got += raw.rest(peer)
        assert b'"code":"shutting_down"' in got
        assert running.process.wait(30) == 0
        (line,) = [row for row in running.requests() if row["request_id"] == "ended"]
        assert line["outcome"] == "shutdown"
        assert "Traceback" not in running.output()
        assert "GatewayError" not in running.output()


def test_an_answer_that_is_settled_late_is_explained_with_its_cost_at_every_gateway(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with redis.server(tmp_path / "redis") as server:
        config = configuration(scripted_sglang, redis={"url": server.url})
        with gateway(tmp_path / "one", config) as one, gateway(tmp_path / "two", config) as two:
            one.wait_ready()
            two.wait_ready()
            content = json.dumps(raw.chat("[[tokens 500]] [[pace 0.01]]", stream=True)).encode()
            with raw.connect(one.port) as peer:
                peer.sendall(raw.request("POST", CHAT, content, {"authorization": "Bearer sk-plain", "x-request-id": "late"}))
                peer.recv(4096)
            for at in (one, two):
                found = until("it is explained", partial(explained, at, "late"))
                assert found["outcome"] == "client_gone"
                assert found["cost"] > 0


def test_an_answer_that_broke_before_its_first_word_has_the_prompt_that_the_next_host_counts(tmp_path: Path) -> None:
    """What was reserved for the prompt is an estimate, which a client is not told where an engine can be asked."""
    with rehearsal() as one, rehearsal() as other:
        other.behave(deaf=True)
        hosts = {"kind": "sglang_dsv3", "hosts": [{"url": one.url}, {"url": other.url, "priority": 1}]}
        config = {"models": {"deepseek-v3": {"backend": "d"}}, "backends": {"d": hosts}}
        with gateway(tmp_path, config) as running:
            running.wait_all_hosts()
            whole = raw.call(running.port, "POST", CHAT, raw.chat("a prompt of some length " * 20)).json()["usage"]
            body = raw.chat("[[die 1]] " + "a prompt of some length " * 20, stream=True, stream_options={"include_usage": True})
            answer = raw.call(running.port, "POST", CHAT, body).body
            assert answer.endswith(b"data: [DONE]\n\n")
            (usage,) = [event["usage"] for event in map(json.loads, re.findall(rb"data: (\{.*)", answer)) if event.get("usage")]
            assert usage == whole | {"prompt_tokens_details": usage["prompt_tokens_details"]}
