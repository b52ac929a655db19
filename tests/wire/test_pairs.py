"""Prefill and decode apart: a gateway before scripted servers that hold to SGLang's contract of it, and refuse whoever does not."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support import raw
from tests.support.otlp import Collector, collector
from tests.support.processes import Gateway, Rehearsal, gateway, rehearsal, until

CHAT = "/v1/chat/completions"


class Four:
    """Two that prefill, two that decode."""

    def __init__(self, prefills: Sequence[Rehearsal], decodes: Sequence[Rehearsal]) -> None:
        self.prefills = list(prefills)
        self.decodes = list(decodes)

    def hosts(self) -> list[dict[str, Any]]:
        prefills = [{"url": engine.url, "role": "prefill", "bootstrap_port": port(engine)} for engine in self.prefills]
        return [*prefills, *({"url": engine.url, "role": "decode"} for engine in self.decodes)]

    def seen(self, name: str) -> list[Any]:
        return [engine.seen()[name] for engine in (*self.prefills, *self.decodes)]


def port(engine: Rehearsal) -> int:
    return int(engine.url.rsplit(":", 1)[1])


def configured(four: Four, sink: Collector | None = None) -> dict[str, Any]:
    return {
        "models": {"deepseek-v3": {"backend": "dsv3", "continuation": "text"}},
        "backends": {
            "dsv3": {
                "kind": "sglang_dsv3",
                "hosts": four.hosts(),
                "health": {"slow_start_s": 0, "probe_s": 0.1, "ejection_s": 0.5, "min_sample": 1000},
            }
        },
        "retry": {"reserve_tokens": 1_000_000},
        **({"tracing": {"otlp_endpoint": sink.endpoint}} if sink is not None else {}),
    }


@pytest.fixture(scope="module")
def four() -> Iterator[Four]:
    with rehearsal() as one, rehearsal() as two, rehearsal() as three, rehearsal() as four:
        for engine, role in ((one, "prefill"), (two, "prefill"), (three, "decode"), (four, "decode")):
            engine.behave(role=role)
        yield Four([one, two], [three, four])


@pytest.fixture(scope="module")
def sink() -> Iterator[Collector]:
    with collector() as running:
        yield running


@pytest.fixture(scope="module")
def paired(four: Four, sink: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("paired"), configured(four, sink), OTEL_BSP_SCHEDULE_DELAY="100") as running:
        running.wait_all_hosts()
        yield running


def ask(to: Gateway, content: str, **more: Any) -> raw.Answer:
    return raw.call(to.port, "POST", CHAT, {"model": "deepseek-v3", "messages": [{"role": "user", "content": content}], **more})


def explained(to: Gateway, answer: raw.Answer) -> dict[str, Any]:
    def kept() -> dict[str, Any]:
        found = to.admin(f"/admin/requests/{answer.headers['x-request-id']}")
        return found.json() if found.status == 200 else {}

    return until("it is observed", kept)


def idle(four: Four) -> None:
    until("nobody works on anything", lambda: not any(four.seen("open")))


def bodies(four: Four) -> list[dict[str, Any]]:
    """The last body at each that has had one."""
    return [json.loads(body) for body in four.seen("last_body") if body]


@pytest.mark.parametrize("stream", [False, True])
def test_one_of_each_answers_and_the_client_gets_what_the_decode_host_says(paired: Gateway, four: Four, stream: bool) -> None:
    client = openai.OpenAI(base_url=paired.base_url, api_key="-", max_retries=0)
    messages: Any = [{"role": "user", "content": f"hello {stream}"}]
    if stream:
        chunks = list(client.chat.completions.create(model="deepseek-v3", messages=messages, stream=True))
        text, id = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), chunks[0].id
    else:
        whole = client.chat.completions.create(model="deepseek-v3", messages=messages)
        text, id = whole.choices[0].message.content or "", whole.id
    assert text == "".join(f"token {number} " for number in range(8))
    idle(four)
    asked = [engine for engine in (*four.prefills, *four.decodes) if f"hello {stream}" in engine.seen()["asked"]]
    assert len(asked) == 2
    assert asked[0] in four.prefills
    assert asked[1] in four.decodes
    first, second = (json.loads(engine.seen()["last_body"]) for engine in asked)
    bound = [first[f"bootstrap_{name}"] for name in ("host", "port", "room")]
    assert bound == [second[f"bootstrap_{name}"] for name in ("host", "port", "room")]
    assert bound[:2] == ["127.0.0.1", port(asked[0])]
    assert 0 <= bound[2] < 1 << 63
    assert second["rid"] == id
    assert first["rid"] != id
    assert {**first, "rid": ""} == {**second, "rid": ""}


def test_two_requests_never_share_a_room(paired: Gateway, four: Four) -> None:
    rooms = set()
    for number in range(8):
        assert ask(paired, f"room {number}").status == 200
        rooms |= {body["bootstrap_room"] for body in bodies(four) if f"room {number}" in json.dumps(body)}
    assert len(rooms) == 8


def test_several_prompts_have_a_room_each_and_several_choices_are_refused(paired: Gateway, four: Four) -> None:
    prompts = ["one", "two", "three"]
    body = {"model": "deepseek-v3", "prompt": prompts}
    raw.call(paired.port, "POST", "/v1/completions", body)
    (sent, *_) = [body for body in bodies(four) if body.get("prompt") == prompts]
    assert [len(sent[f"bootstrap_{name}"]) for name in ("host", "port", "room")] == [3, 3, 3]
    assert len(set(sent["bootstrap_room"])) == 3
    before = sum(four.seen("requests"))
    refused = ask(paired, "several", n=2)
    assert (refused.status, refused.json()["error"]["param"]) == (400, "n")
    assert "prefill and decode apart" in refused.json()["error"]["message"]
    assert sum(four.seen("requests")) == before


@pytest.mark.parametrize("status", [500, 503])
@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_half_that_fails_is_changed_and_the_other_one_is_not_blamed(
    paired: Gateway, four: Four, role: str, status: int, stream: bool
) -> None:
    sick = (four.prefills if role == "prefill" else four.decodes)[0]
    try:
        sick.behave(failing=status)
        numbers = itertools.count()

        def changed() -> dict[str, Any]:
            answer = ask(paired, f"failing {role} {status} {stream} {next(numbers)}", stream=stream)
            assert answer.status == 200, answer.body
            found = explained(paired, answer)
            assert found["id"] in answer.body.decode()
            return found if len(found["attempts"]) > 1 else {}

        # One that said a moment ago that it is busy, or is ejected, is not asked for a while.
        failed, last = until("it was asked first", changed, 30)["attempts"][:2]
        assert last["result"] == last["prefill"]["result"] == "ok"
        half, other = (failed["prefill"], failed) if role == "prefill" else (failed, failed["prefill"])
        assert half["result"] == ("broken" if status == 500 else "busy")
        assert half["host"] == f"127.0.0.1:{port(sick)}"
        assert other["result"] in ("given up", "ok")
    finally:
        sick.behave(failing=False)
    idle(four)
    until("it is back", lambda: all(row["state"] == "ok" for row in paired.admin("/admin/hosts").json()["hosts"]))


def test_the_same_decode_host_is_asked_again_under_another_id(four: Four, tmp_path: Path) -> None:
    """Its first half may still be on its way out when the second comes."""
    one = Four(four.prefills, four.decodes[:1])
    with gateway(tmp_path, configured(one)) as running:
        running.wait_all_hosts()
        answer = _after_a_failed_prefill(running, four)
        assert answer.status == 200, answer.body
        found = explained(running, answer)
        assert [attempt["host"] for attempt in found["attempts"]] == [found["attempts"][0]["host"]] * 2
        sent = json.loads(four.decodes[0].seen()["last_body"])["rid"]
        assert sent != found["id"]
        assert len(sent) == len(found["id"])
        assert sent not in answer.body.decode()
        assert answer.body.decode().count(f'"id":"{found["id"]}"') >= 8


def _after_a_failed_prefill(running: Gateway, four: Four) -> raw.Answer:
    try:
        four.prefills[0].behave(failing=True)
        for number in range(20):
            answer = ask(running, f"again {number}", stream=True)
            if len(explained(running, answer)["attempts"]) > 1:
                return answer
    finally:
        four.prefills[0].behave(failing=False)
    raise AssertionError("nobody was sent to the host that fails")


def test_a_client_that_leaves_ends_both_halves(paired: Gateway, four: Four) -> None:
    before = len([id for ids in four.seen("aborted") for id in ids])
    body = {"model": "deepseek-v3", "messages": [{"role": "user", "content": "[[decode-stall 0]] leaving"}], "stream": True}
    with raw.connect(paired.port) as connection:
        connection.sendall(raw.request("POST", CHAT, json.dumps(body).encode(), {"content-type": "application/json"}))
        until("both are at it", lambda: sum("leaving" in json.dumps(seen) for seen in four.seen("asked")) == 2)
    until("the decode half is aborted", lambda: len([id for ids in four.seen("aborted") for id in ids]) > before)
    idle(four)


def test_a_prefill_that_waits_for_a_lost_decode_is_aborted(paired: Gateway, four: Four) -> None:
    for engine in four.decodes:
        engine.behave(failing=True)
    try:
        assert ask(paired, "lost").status == 502
    finally:
        for engine in four.decodes:
            engine.behave(failing=False)
    (sent, *_) = [json.loads(engine.seen()["last_body"])["rid"] for engine in four.prefills if "lost" in engine.seen()["asked"]]
    until("its prefill was told to stop", lambda: any(sent in engine.seen()["aborted"] for engine in four.prefills))
    idle(four)
    until("they are back", lambda: all(row["state"] == "ok" for row in paired.admin("/admin/hosts").json()["hosts"]))


def test_an_answer_whose_decode_host_dies_goes_on_at_another_pair(paired: Gateway, four: Four) -> None:
    answer = ask(paired, "[[decode-die 5]] dying", stream=True)
    assert answer.status == 200
    text = answer.body.decode()
    assert "continued on another host" in text
    assert [f"token {number} " in text for number in range(8)] == [True] * 8
    assert text.rstrip().endswith("[DONE]")


def test_each_half_has_a_span_in_one_tree_and_the_engines_are_told_their_own(paired: Gateway, four: Four, sink: Collector) -> None:
    answer = ask(paired, "traced")
    found = explained(paired, answer)
    _, below = sink.tree(found["trace_id"])
    halves = {span.attributes["penstock.role"]: span for span in below if "penstock.role" in span.attributes}
    assert set(halves) == {"prefill", "decode"}
    attempt = found["attempts"][0]
    assert halves["prefill"].attributes["penstock.host"] == attempt["prefill"]["host"]
    assert halves["decode"].attributes["penstock.host"] == attempt["host"]
    for role, engines in (("prefill", four.prefills), ("decode", four.decodes)):
        (engine,) = [engine for engine in engines if "traced" in engine.seen()["asked"]]
        assert halves[role].id in {name.lower(): value for name, value in engine.seen()["last_headers"].items()}["traceparent"]


def test_people_are_told_who_does_what(paired: Gateway, four: Four) -> None:
    rows = {row["id"]: row for row in paired.admin("/admin/hosts").json()["hosts"]}
    assert [row["role"] for row in rows.values()].count("prefill") == 2
    assert [row["role"] for row in rows.values()].count("decode") == 2
    found = explained(paired, ask(paired, "told"))
    considered = dict(found["attempts"][0]["considered"])
    assert all(considered[row].startswith(f"{rows[row]['role']}: ok") for row in considered)
    assert sum("picked" in why for why in considered.values()) == 2
    metrics = paired.admin("/metrics").body.decode()
    for engine, role in ((four.prefills[0], "prefill"), (four.decodes[0], "decode")):
        assert f'penstock_host_role{{backend="dsv3",host="127.0.0.1:{port(engine)}",role="{role}"}} 1' in metrics
    assert f'penstock_attempts_total{{target="{found["attempts"][0]["prefill"]["host"]}",result="ok"}}' in metrics


def test_conversations_come_back_to_where_they_were_prefilled(paired: Gateway, four: Four) -> None:
    places: dict[str, set[str]] = {}
    for _, number in ((turn, number) for turn in range(3) for number in range(12)):
        answer = raw.call(
            paired.port, "POST", CHAT, {"model": "deepseek-v3", "messages": [{"role": "user", "content": f"conversation {number}"}]}
        )
        places.setdefault(str(number), set()).add(explained(paired, answer)["attempts"][-1]["prefill"]["host"])
    assert all(len(where) == 1 for where in places.values()), places
    assert len(set().union(*places.values())) == 2


def test_either_role_can_be_drained_and_neither_does_without_the_other(paired: Gateway, four: Four) -> None:
    names = {role: [f"127.0.0.1:{port(engine)}" for engine in engines] for role, engines in
             (("prefill", four.prefills), ("decode", four.decodes))}  # fmt: skip
    for role, (one, two) in names.items():
        try:
            assert paired.admin(f"/admin/hosts/{one}/drain", "POST").status == 200
            for number in range(4):
                attempt = explained(paired, ask(paired, f"drained {role} {number}"))["attempts"][-1]
                assert (attempt["prefill"]["host"] if role == "prefill" else attempt["host"]) == two
            paired.admin(f"/admin/hosts/{two}/drain", "POST")
            refused = ask(paired, "nobody")
            assert refused.status == 503
            assert f"All {role} hosts are drained" in refused.json()["error"]["message"]
            assert raw.call(paired.port, "GET", "/readyz").status == 503
        finally:
            for host in (one, two):
                paired.admin(f"/admin/hosts/{host}/undrain", "POST")
    assert ask(paired, "back").status == 200


def test_an_engine_that_was_started_for_something_else_is_not_asked(four: Four, tmp_path: Path) -> None:
    with rehearsal() as odd:
        odd.behave(role="decode")
        mixed = Four([*four.prefills, odd], four.decodes)
        with gateway(tmp_path, configured(mixed)) as running:

            def row() -> dict[str, Any]:
                rows = running.admin("/admin/hosts").json()["hosts"]
                (found,) = [row for row in rows if row["id"] == f"127.0.0.1:{port(odd)}"]
                return dict(found) if found["state"] == "down" else {}

            why = until("it is noticed", row)["why"]
            assert "was started to decode (--disaggregation-mode decode), and it is here to prefill" in why


def test_what_a_pair_cannot_answer_is_not_served(paired: Gateway) -> None:
    refused = raw.call(paired.port, "POST", "/v1/messages", {"model": "deepseek-v3", "max_tokens": 5, "messages": []})
    assert refused.status == 404
    tokens = raw.call(paired.port, "POST", "/tokenize", {"model": "deepseek-v3", "prompt": "a"})
    assert tokens.status == 200


def test_a_stopped_prefill_host_costs_no_answer(tmp_path: Path) -> None:
    with rehearsal() as one, rehearsal() as two, rehearsal() as three:
        for engine, role in ((one, "prefill"), (two, "prefill"), (three, "decode")):
            engine.behave(role=role)
        config = configured(Four([one, two], [three]))
        with gateway(tmp_path, config) as running:
            running.wait_all_hosts()
            one.process.send_signal(signal.SIGKILL)
            one.process.wait(10)
            for number in range(8):
                answer = ask(running, f"after {number}", stream=bool(number % 2))
                assert answer.status == 200, answer.body
