"""JSON answers that are asked for as streams: whatever becomes of the host in the middle, one answer, one line in the ledger."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.access.keys import hashed
from tests.support import raw
from tests.support.processes import Gateway, Rehearsal, gateway, rehearsal, until

CHAT, COMPLETIONS, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"
TEXT = "".join(f"token {number} " for number in range(8))
TIMEOUTS = {"connect_s": 0.5, "first_token_s": 5, "between_tokens_s": 0.7, "request_s": 30}
FAULTS = ("die 5", "cut 7", "stall 6", "abort 5", "mid-error 6")
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


def body(path: str, prompt: str, **more: Any) -> dict[str, Any]:
    said: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
    if path == COMPLETIONS:
        said = {"prompt": prompt}
    elif path == RESPONSES:
        said = {"input": prompt}
    elif path == MESSAGES:
        said["max_tokens"] = 100
    return {"model": "m", **said, **more}


class Two:
    """Two hosts behind a gateway: the first one is asked first, and obeys; the second one is told not to."""

    def __init__(self, running: Gateway, first: Rehearsal, second: Rehearsal) -> None:
        self.running = running
        self.first = first
        self.second = second
        self._names = itertools.count()

    def ask(self, path: str, command: str, **more: Any) -> tuple[raw.Answer, str]:
        """Its answer, and the id of the request."""
        until("nobody is avoided for having been busy", lambda: not any(
            "busy" in host["why"] for host in self.running.admin("/admin/hosts").json()["hosts"]
        ))  # fmt: skip
        name = f"asked-{next(self._names)}"
        headers = {"x-request-id": name, "authorization": "Bearer sk-hedged"}
        return raw.call(self.running.port, "POST", path, body(path, f"Hello [[{command}]]", **more), headers), name

    def line(self, name: str) -> dict[str, Any]:
        (found,) = until("it is logged", lambda: [line for line in self.running.requests() if line["request_id"] == name])
        return found

    def used(self, key: str = "hedged") -> dict[str, int]:
        names = ("requests", "prompt_tokens", "generated_tokens", "delivered_tokens")
        rows = [row for row in self.running.admin("/admin/usage").json()["usage"] if row["key"] == key]
        return {name: sum(row.get(name, 0) for row in rows) for name in names}

    def counted(self, before: dict[str, int], key: str = "hedged") -> dict[str, int]:
        """The same, once one more request is in it."""
        return until("it is in the ledger", lambda: found if (found := self.used(key))["requests"] > before["requests"] else {})

    @contextlib.contextmanager
    def one_row_more(self, **counts: int) -> Iterator[None]:
        """What the ledger has more afterwards."""
        before = self.used()
        yield
        wanted = {name: before[name] + value for name, value in counts.items()}
        until(f"{counts} more than {before}", lambda: {name: self.used()[name] for name in counts} == wanted)


@contextlib.contextmanager
def behind(folder: Any, first: Rehearsal, second: Rehearsal, **retry: Any) -> Iterator[Two]:
    hosts = [{"url": first.url, "weight": 100_000}, {"url": second.url, "weight": 1}]
    section = {"kind": "sglang_dsv3", "hosts": hosts, "health": {"max_ejected_share": 0, "slow_start_s": 0, "wedged_s": 60}}
    config = {
        "models": {"m": {"backend": "dsv3", "balance": "weighted_round_robin"}}, "backends": {"dsv3": section},
        "timeouts": TIMEOUTS, "retry": {"hedge_json": True, "reserve_tokens": 10**9, **retry},
        "keys": [{"name": name, "hash": hashed(f"sk-{name}"), "tpm": 10**9} for name in ("hedged", "leaving")],
    }  # fmt: skip
    with gateway(folder, config, PENSTOCK_HOME=str(folder)) as running:
        running.wait_ready()
        running.wait_all_hosts()
        yield Two(running, first, second)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    with rehearsal() as first, rehearsal() as second:
        second.behave(deaf=True)
        with behind(tmp_path_factory.mktemp("hedge"), first, second) as found:
            yield found


def text_of(path: str, answer: dict[str, Any]) -> str:
    said: str
    if path == CHAT:
        said = answer["choices"][0]["message"]["content"]
    elif path == COMPLETIONS:
        said = answer["choices"][0]["text"]
    else:
        (item,) = answer["content"] if path == MESSAGES else answer["output"][0]["content"]
        said = item["text"]
    return said


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES, RESPONSES])
def test_the_answer_is_the_one_that_json_would_have_been(two: Two, path: str) -> None:
    """Against the host's own JSON, but for what is said beside an answer and not in streams."""
    answer, name = two.ask(path, "tokens 8")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert json.loads(two.first.seen()["last_body"])["stream"] is True
    asked = body(path, "Hello [[tokens 8]]", **({"model": "rehearsed"} if path == RESPONSES else {}))
    own = raw.call(int(two.first.url.rsplit(":", 1)[1]), "POST", path, asked).json()
    found = answer.json()
    for only_here in ("x_unknown", "metadata"):
        own.pop(only_here, None) if path != RESPONSES else None
    varying = {"id", "created", "created_at", "model", "usage", "choices"}
    assert set(found) == set(own)
    assert {key: value for key, value in found.items() if key not in varying} == {key: own[key] for key in own if key not in varying}
    if "choices" in own:
        (choice,), (its_own,) = found["choices"], own["choices"]
        assert {**its_own, "logprobs": None, "matched_stop": None} == choice
        assert found["usage"] == own["usage"]
        assert found["id"] == two.line(name)["id"]
    assert two.line(name)["stream"] is False


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES, RESPONSES])
def test_a_host_that_fails_in_the_middle_is_not_noticed(two: Two, path: str, fault: str) -> None:
    with two.one_row_more(requests=1, prompt_tokens=12, generated_tokens=8, delivered_tokens=8):
        answer, name = two.ask(path, fault)
        assert answer.status == 200, answer.body
        assert text_of(path, answer.json()) == TEXT
    line = two.line(name)
    assert (line["attempts"], line.get("continuations"), line["outcome"], line["completion_tokens"]) == (2, 1, "ok", 8)


@pytest.mark.parametrize(
    ("more", "texts"), [({"tools": TOOLS, "tool_choice": "required"}, 1), ({"tools": TOOLS, "tool_choice": "required", "n": 2}, 2)]
)
def test_what_cannot_go_on_is_begun_anew(two: Two, more: dict[str, Any], texts: int) -> None:
    """Nothing has reached the client; what the first host has made counts, and is not delivered."""
    before = two.used()
    answer, name = two.ask(CHAT, "cut 9", **more)
    assert [choice["message"]["content"] for choice in answer.json()["choices"]] == [TEXT] * texts
    assert answer.json()["usage"]["completion_tokens"] == 8 * texts
    line = two.line(name)
    assert (line["attempts"], line.get("continuations", 0), line["outcome"]) == (2, 0, "ok")
    after = two.counted(before)
    assert after["delivered_tokens"] - before["delivered_tokens"] == 8 * texts
    assert after["generated_tokens"] - before["generated_tokens"] > 8 * texts


def test_silence_is_noticed_long_before_the_requests_own_limit(two: Two) -> None:
    began = time.monotonic()
    answer, _ = two.ask(CHAT, "stall 6")
    assert text_of(CHAT, answer.json()) == TEXT
    assert time.monotonic() - began < TIMEOUTS["request_s"]


def test_a_client_that_leaves_stops_the_engine_and_has_got_nothing(two: Two) -> None:
    prompt = "I leave [[tokens 100000]] [[pace 0.05]]"
    with raw.connect(two.running.port) as peer:
        asked = json.dumps(body(CHAT, prompt)).encode()
        peer.sendall(raw.request("POST", CHAT, asked, {"authorization": "Bearer sk-leaving"}))
        sent = two.first.seen()["events_sent"]
        until("it is in the middle", lambda: two.first.seen()["events_sent"] > sent + 5)
    until("the engine has stopped", lambda: two.first.seen()["open"] == 0)
    assert two.first.seen()["made"][prompt] < 100_000
    used = two.counted({"requests": 0}, "leaving")
    assert used["delivered_tokens"] == 0
    assert used["generated_tokens"] >= 5


def test_when_nobody_is_left_there_is_one_error_and_no_half_answer(tmp_path: Any) -> None:
    with rehearsal() as first, rehearsal() as second, behind(tmp_path, first, second) as both:
        before = both.used()
        answer, name = both.ask(CHAT, "cut 5", tools=TOOLS, tool_choice="required")
        assert answer.status == 502
        assert answer.error()["code"] == "engine_error"
        assert answer.headers["x-should-retry"] == "false"
        assert both.line(name)["outcome"] == "engine_error"
        after = both.counted(before)
        assert after["delivered_tokens"] == before["delivered_tokens"]
        assert after["generated_tokens"] > before["generated_tokens"]


def test_a_killed_host_is_not_noticed_and_off_means_json(tmp_path: Any) -> None:
    with rehearsal() as first, rehearsal() as second, behind(tmp_path / "off", first, second, hedge_json=False) as off:
        answer, _ = off.ask(CHAT, "tokens 8")
        assert answer.json()["x_unknown"], "as the engine wrote it"
        assert "stream" not in json.loads(first.seen()["last_body"])
    with rehearsal() as first, rehearsal() as second, behind(tmp_path / "on", first, second) as on:
        with raw.connect(on.running.port) as peer:
            asked = json.dumps(body(CHAT, "[[tokens 40]] [[pace 0.05]]")).encode()
            peer.sendall(raw.request("POST", CHAT, asked, {"authorization": "Bearer sk-hedged", "x-request-id": "killed"}))
            until("it is in the middle", lambda: first.seen()["events_sent"] > 10)
            first.process.kill()
            answer = raw.read(peer)
        assert text_of(CHAT, answer.json()) == "".join(f"token {number} " for number in range(40))
        assert answer.json()["usage"]["completion_tokens"] == 40
        line = on.line("killed")
        assert (line["attempts"], line["continuations"], line["completion_tokens"]) == (2, 1, 40)
