"""Bad output is noticed: each rule at a real gateway whose hosts break it on command, and a host that breaks one more often than others."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from backends.sglang_dsv3.rehearsal.bad import RULES
from gateway.processes.sentinel import START_S
from tests.support import raw
from tests.support.processes import ROOT, Gateway, Rehearsal, gateway, rehearsal, until
from tests.support.receiver import receiver, verified
from tests.wire import test_command

CHAT = "/v1/chat/completions"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
TOOLS = {
    CHAT: [TOOL],
    "/v1/messages": [{"name": "get_weather", "input_schema": PARAMETERS}],
    "/v1/responses": [{"type": "function", "name": "get_weather", "parameters": PARAMETERS}],
}
# What raw text has to do with parsers: nothing.
RAW = frozenset(["empty", "loop", "utf8"])


def body(path: str, prompt: str, stream: bool) -> dict[str, Any]:
    said: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
    if path == "/v1/responses":
        said = {"input": prompt}
    elif path == "/v1/completions":
        said = {"prompt": prompt}
    tools = {"tools": TOOLS[path]} if path in TOOLS else {}
    return {"model": "deepseek-v3", "max_tokens": 900, **said, **tools, **({"stream": True} if stream else {})} | (
        {"max_output_tokens": 900} if path == "/v1/responses" else {}
    )


def ask(served: Gateway, prompt: str, path: str = CHAT, stream: bool = False) -> raw.Answer:
    asked = body(path, prompt, stream)
    if path == "/v1/responses":
        del asked["max_tokens"]
    return raw.call(served.port, "POST", path, asked)


def penstock(served: Gateway, *arguments: str) -> str:
    done = test_command.penstock(*arguments, "--admin", served.admin_url, folder=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def counted(served: Gateway) -> dict[tuple[str, str, str], float]:
    """(host, rule, result) -> answers."""
    found: dict[tuple[str, str, str], float] = {}
    for labels, value in re.findall(
        r"^penstock_sentinel_answers_total\{(.*)\} (\S+)$", served.admin("/metrics").body.decode(), re.MULTILINE
    ):
        of = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        found[of["host"], of["rule"], of["result"]] = float(value)
    return found


@pytest.fixture
def engine() -> Iterator[Rehearsal]:
    with rehearsal() as found:
        yield found


def settings(*engines: Rehearsal, **sentinel: Any) -> dict[str, Any]:
    found = engines[0].backend()
    found["backends"]["dsv3"]["hosts"] = [{"url": one.url} for one in engines]
    found["backends"]["dsv3"]["endpoints"] = [CHAT, "/v1/completions", "/v1/messages", "/v1/responses"]
    return {**found, "sentinel": {"per_second": 1000, "cpu_share": 1, **sentinel}}


def test_each_rule_on_each_endpoint(engine: Rehearsal, tmp_path: Path) -> None:
    with gateway(tmp_path, settings(engine)) as served:
        served.wait_all_hosts()
        asked = []
        for path in (CHAT, "/v1/messages", "/v1/responses", "/v1/completions"):
            for stream in (False, True):
                for rule in ("none", *RULES):
                    if path == "/v1/completions" and rule not in RAW and rule != "none":
                        continue
                    answer = ask(served, f"[[bad {rule}]] {path} {stream}", path, stream)
                    assert answer.status == 200, answer.body.decode()
                    asked.append((path, stream, rule, answer.headers["x-request-id"]))

        def judged() -> bool:
            every = counted(served)
            return sum(value for (_, rule, _), value in every.items() if rule == "utf8") == len(asked)

        until("all are judged", judged, 60)
        for path, stream, rule, request in asked:
            found = served.admin(f"/admin/requests/{request}").json().get("bad_output", {})
            assert list(found) == ([] if rule == "none" else [rule]), (path, stream, rule, found)
        text = served.admin("/metrics").body.decode()
        assert 'penstock_sentinel_finish_reasons_total{backend="dsv3"' in text


@pytest.fixture
def three() -> Iterator[list[Rehearsal]]:
    with rehearsal() as one, rehearsal() as two, rehearsal() as other:
        yield [one, two, other]


def host_of(engine: Rehearsal) -> str:
    return engine.url.removeprefix("http://")


def many(served: Gateway, count: int, stream: bool = True) -> None:
    """Conversations of their own, whose tools are called; so many at a time as wait to be judged, until all of them are."""

    def judged() -> float:
        return sum(value for (_, rule, _), value in counted(served).items() if rule == "utf8")

    for first in range(0, count, 200):
        asked, before = min(200, count - first), judged()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: ask(served, f"conversation {number} {random.random()}", stream=stream), range(asked)))
        deadline = time.monotonic() + 60
        while judged() < before + asked:
            assert time.monotonic() < deadline, "they are not judged"
            time.sleep(0.1)


def state(served: Gateway, engine: Rehearsal) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in served.admin("/admin/hosts").json()["hosts"] if row["id"] == host_of(engine))
    return found


def warnings(served: Gateway) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in served.output().splitlines() if line.startswith("{")]
    return [line for line in lines if line["logger"] == "penstock.sentinel" and line["level"] == "warning"]


GOOD, BAD = {"tool_arguments": 0.004}, {"tool_arguments": 0.12}


def test_a_bad_host_is_named_before_its_users_report_it(three: list[Rehearsal], tmp_path: Path) -> None:
    one, bad, other = three
    secret = b"a secret of some length"
    (tmp_path / "secret").write_bytes(secret)
    with receiver() as told:
        alerts = {"webhook": told.url, "secret_file": str(tmp_path / "secret")}
        configured = {**settings(*three), "alerts": alerts, "listen": {"workers": 2}}
        with gateway(tmp_path, configured) as served:
            for engine in three:
                engine.behave(bad=BAD if engine is bad else GOOD)
            served.wait_all_hosts()
            many(served, 1000)
            until("the host is under alert", lambda: state(served, bad)["doubt"], 60)
            row = state(served, bad)
            assert re.fullmatch(r"\d+% malformed tool calls \(\d+ of \d+\), the others [\d.]+% \(\d+ of \d+\)", row["doubt"]), row
            assert (row["state"], row["why"]) == ("ok", row["doubt"]), "it goes on answering: nobody has asked for more"
            assert not state(served, one)["doubt"]
            assert not state(served, other)["doubt"]
            # Said once, with its cause, its consequence, and a request to look at.
            (line,) = until("it is said", lambda: warnings(served))
            assert (line["host"], line["rule"]) == (host_of(bad), "tool_arguments")
            assert "malformed tool calls" in line["message"]
            assert "it goes on answering: drain it" in line["message"]
            example = re.findall(r"penstock explain (\S+)", line["message"])[0]
            shown = penstock(served, "explain", example)
            assert "bad output: tool_arguments (the arguments are no JSON)" in shown, shown
            assert "malformed tool calls" in penstock(served, "hosts")
            listed = penstock(served, "sentinel")
            assert re.search(rf"{re.escape(host_of(bad))} .*tool_arguments .*alert", listed), listed
            labels = f'{{backend="dsv3",host="{host_of(bad)}",rule="tool_arguments"}}'
            assert f"penstock_sentinel_alert{labels} 1" in served.admin("/metrics").body.decode()
            (sent,) = until("the webhook is told", told.taken)
            assert verified(secret, sent)
            assert (sent.json()["type"], sent.json()["state"], sent.json()["host"]) == ("sentinel.host", "begun", host_of(bad))
            many(served, 60)
            until("it is looked again", lambda: state(served, bad)["doubt"] != row["doubt"], 60)
            assert len(warnings(served)) == 1
            assert len(told.taken()) == 1


def test_a_host_under_alert_is_ejected_and_never_more_of_them_than_may_be(three: list[Rehearsal], tmp_path: Path) -> None:
    one, bad, worse = three
    configured = settings(*three, eject=True)
    configured["backends"]["dsv3"]["health"] = {"max_ejected_share": 0.4}
    with gateway(tmp_path, configured) as served:
        one.behave(bad=GOOD)
        bad.behave(bad={"tool_arguments": 0.12})
        worse.behave(bad={"tool_arguments": 0.6})
        served.wait_all_hosts()
        many(served, 900)
        until("the worst is ejected", lambda: state(served, worse)["state"] == "ejected", 60)
        assert "malformed tool calls" in state(served, worse)["why"]
        before = worse.seen()["requests"]
        many(served, 60)
        assert worse.seen()["requests"] == before
        # The other is as bad as the first was: no more than 40 % of the weight may be out.
        many(served, 900)
        until("the other is under alert", lambda: state(served, bad)["doubt"], 60)
        assert state(served, bad)["state"] == "ok"
        assert state(served, worse)["state"] == "ejected"
        # Bad output is better than none.
        one.process.terminate()
        bad.process.terminate()
        until("the others are down", lambda: state(served, one)["state"] == state(served, bad)["state"] == "down", 30)
        assert ask(served, "hello").status == 200
        assert worse.seen()["requests"] == before + 1


def reasked(served: Gateway) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = {}
    for labels, value in re.findall(
        r"^penstock_sentinel_reasked_total\{(.*)\} (\S+)$", served.admin("/metrics").body.decode(), re.MULTILINE
    ):
        of = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        found[of["wrong"], of["result"]] = float(value)
    return found


@pytest.fixture
def two() -> Iterator[list[Rehearsal]]:
    with rehearsal() as one, rehearsal() as other:
        yield [one, other]


def test_a_bad_answer_is_asked_for_once_more(two: list[Rehearsal], tmp_path: Path) -> None:
    bad, good = two
    cases = [(rule, False, "tool_calls") for rule in ("tool_arguments", "tool_markup")] + [
        ("empty", False, "empty"),
        ("empty", True, "empty"),
    ]
    with gateway(tmp_path, settings(*two, reask=["tool_calls", "empty"])) as served:
        served.wait_all_hosts()
        again: list[tuple[str, str]] = []
        for path in (CHAT, "/v1/messages", "/v1/responses"):
            for rule, stream, wrong in cases:
                bad.behave(bad={rule: 1})
                good.behave(bad={"none": 1})
                before = [engine.seen()["requests"] for engine in two]
                answers = [ask(served, f"conversation {rule} {stream} {number}", path, stream) for number in range(8)]
                assert {answer.status for answer in answers} == {200}
                asked = [answer.headers["x-request-id"] for answer in answers if "x-penstock-reasked" in answer.headers]
                assert {answer.headers.get("x-penstock-reasked", wrong) for answer in answers} == {wrong}
                again += [(wrong, request) for request in asked]
                assert all(b"Paris" in answer.body for answer in answers), "nobody has seen a bad one"
                assert all("tool▁calls".encode() not in answer.body for answer in answers)
                assert [engine.seen()["requests"] - one for engine, one in zip(two, before, strict=True)] == [len(asked), 8]
        good.behave(bad={"empty": 1})
        bad.behave(bad={"empty": 1})
        before = [engine.seen()["requests"] for engine in two]
        both = ask(served, "both are bad")
        assert both.headers["x-penstock-reasked"] == "empty"
        assert [engine.seen()["requests"] - one for engine, one in zip(two, before, strict=True)] == [1, 1], "once, and no more"
        by_kind = {wrong: sum(kind == wrong for kind, _ in again) for wrong in ("tool_calls", "empty")}
        mended = {(wrong, "mended"): float(count) for wrong, count in by_kind.items()}
        until("they are counted", lambda: reasked(served) == {**mended, ("empty", "still_bad"): 1.0})
        wrong, request = again[0]
        told = served.admin(f"/admin/requests/{request}").json()
        assert told["reasked"] == [wrong, "mended"]
        tried = [(attempt["host"], attempt["result"]) for attempt in told["attempts"]]
        assert tried == [(host_of(bad), "bad_output"), (host_of(good), "ok")]
        assert "to be asked for once more: mended" in penstock(served, "explain", request)
        (line,) = [line for line in served.requests() if line["request_id"] == request]
        assert line["reasked"] == f"{wrong}: mended"
        # Eight tokens each: what reached nobody is wasted, and nobody pays for it.
        used = next(row for row in served.admin("/admin/usage?by=key").json()["usage"] if row["requests"])
        assert used["wasted_host_tokens"] == 8 * (len(again) + 1)
        assert used["delivered_tokens"] == 8 * (len(cases) * 3 * 8 + 1)


def test_without_another_host_or_budget_the_answer_is_given_as_it_is(two: list[Rehearsal], tmp_path: Path) -> None:
    one, other = two
    with gateway(tmp_path / "alone", settings(one, reask=["empty"])) as served:
        served.wait_all_hosts()
        answer = ask(served, "[[bad empty]]")
        assert answer.status == 200
        assert "x-penstock-reasked" not in answer.headers
        assert answer.json()["choices"][0]["message"]["content"] == ""
        until("it is counted", lambda: reasked(served) == {("empty", "no_host"): 1.0})
    budget = {"retry": {"budget_share": 0, "reserve_tokens": 0}}
    with gateway(tmp_path / "poor", {**settings(one, other, reask=["empty"]), **budget}) as served:
        served.wait_all_hosts()
        before = sum(engine.seen()["requests"] for engine in two)
        # One retry is always allowed, and then there is no more.
        for number in range(4):
            assert ask(served, f"[[bad empty]] {number}", stream=bool(number % 2)).status == 200
        assert sum(engine.seen()["requests"] for engine in two) == before + 5
        until("they are counted", lambda: reasked(served) == {("empty", "still_bad"): 1.0, ("empty", "no_budget"): 3.0})


def test_a_stream_that_has_begun_to_speak_is_never_asked_for_again(two: list[Rehearsal], tmp_path: Path) -> None:
    with gateway(tmp_path, settings(*two, reask=["tool_calls", "empty"])) as served:
        served.wait_all_hosts()
        for rule in ("tool_arguments", "tool_markup", "loop", "none"):
            answer = ask(served, f"[[bad {rule}]]", stream=True)
            assert "x-penstock-reasked" not in answer.headers
        assert sum(engine.seen()["requests"] for engine in two) == 4
        assert reasked(served) == {}
        # And what is not asked for is not done.
    with gateway(tmp_path / "off", settings(*two)) as served:
        served.wait_all_hosts()
        assert ask(served, "[[bad empty]]").status == 200
        assert sum(engine.seen()["requests"] for engine in two) == 5


def test_examples_hold_no_prompt_and_no_key_unless_they_may(engine: Rehearsal, tmp_path: Path) -> None:
    for allowed in (False, True):
        folder = tmp_path / str(allowed)
        with gateway(folder, settings(engine, examples=3, keep_prompts=allowed)) as served:
            served.wait_all_hosts()
            for number in range(5):
                sent = body(CHAT, f"[[bad reasoning_markup]] the house's affair {number}", False)
                raw.call(served.port, "POST", CHAT, sent, {"authorization": "Bearer sk-very-secret-of-mine"})
            until("they are judged", lambda: sum(counted(served).values()) >= 5 * 5, 30)
            kept = served.admin("/admin/sentinel").body.decode()
            assert len(json.loads(kept)["examples"]) == 3
            assert "so I should look it up first" in kept
            assert ("the house's affair 4" in kept) is allowed
            assert "sk-very-secret-of-mine" not in kept
            assert ("the house's affair 4" in penstock(served, "sentinel", "--examples")) is allowed
            assert "look it up" not in served.output(), "no answer is in the log"


def test_off_means_off(engine: Rehearsal, tmp_path: Path) -> None:
    with gateway(tmp_path, settings(engine, share=0)) as served:
        served.wait_all_hosts()
        for number in range(20):
            ask(served, f"[[bad empty]] {number}")
        # What was to be judged would be by now.
        limit = time.monotonic() + 3 * START_S
        until("it would have begun", lambda: time.monotonic() > limit)
        assert not [child for child in served.family() if "gateway.sentinel.judge" in " ".join(child.cmdline())]
        assert counted(served) == {}


def test_a_judge_that_dies_is_replaced(engine: Rehearsal, tmp_path: Path) -> None:
    with gateway(tmp_path, settings(engine)) as served:
        served.wait_all_hosts()

        def judges() -> list[psutil.Process]:
            return [child for child in served.family() if "gateway.sentinel.judge" in " ".join(child.cmdline())]

        ask(served, "[[bad empty]]")
        until("there is one", judges)[0].kill()
        until("it is judged by another", lambda: ask(served, "hello") and sum(counted(served).values()), 30, 0.5)
        assert "judge of answers" in served.output()
        assert ask(served, "hello").status == 200
