"""Messages, responses, completions and JSON answers of the real engine that go on elsewhere: two SGLang engines in float32, greedy, the
first behind a proxy that cuts; at last one of them is killed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import openai
import psutil
import pytest

from tests.support import raw
from tests.support.cutting import Cutting, cutting
from tests.support.engine import engine_urls
from tests.support.processes import Gateway, command, gateway, until

MODELS = {mode: {"backend": "dsv3", "continuation": mode, "balance": "weighted_round_robin"} for mode in ("text", "exact")}
HEALTH = {"max_ejected_share": 0, "slow_start_s": 0}
TOKENS = 40
RETRY = {"hedge_json": True, "reserve_tokens": 10**9}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with two engines of its own."""
    section = {"kind": "sglang_dsv3", "hosts": [{"launch": "local"}, {"launch": "local"}], "engine": {"dtype": "float32"}, "health": HEALTH}
    with gateway(tmp_path_factory.mktemp("two"), {"models": MODELS, "backends": {"dsv3": section}, "retry": RETRY}) as running:
        running.wait_ready(300)
        running.wait_all_hosts(300)
        yield running


@pytest.fixture(scope="module")
def dying(two: Gateway) -> Iterator[Cutting]:
    with cutting(engine_urls(two)[0]) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def cut(two: Gateway, dying: Cutting, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """In front of the same two engines; nearly every request goes to the proxy first."""
    hosts = [{"url": dying.url, "weight": 1000}, {"url": engine_urls(two)[1], "weight": 1}]
    section = {"kind": "sglang_dsv3", "hosts": hosts, "health": HEALTH}
    with gateway(tmp_path_factory.mktemp("cut"), {"models": MODELS, "backends": {"dsv3": section}, "retry": RETRY}) as running:
        running.wait_ready()
        running.wait_all_hosts()
        yield running


def message(to: Gateway, prompt: str) -> tuple[Any, list[Any]]:
    """By Anthropic's SDK: the message, and the events."""
    said: Any = [{"role": "user", "content": prompt}]
    with (
        anthropic.Anthropic(base_url=to.root, api_key="none", max_retries=0) as client,
        client.messages.stream(model="text", max_tokens=TOKENS, system="Be brief.", messages=said, extra_body={"temperature": 0}) as stream,
    ):
        events = [event for event in stream if event.type != "text"]
        return stream.get_final_message(), events


def response(to: Gateway, prompt: str) -> tuple[Any, list[Any]]:
    """By OpenAI's: the response, and the events."""
    with openai.OpenAI(base_url=to.base_url, api_key="none", max_retries=0) as client:
        asked: Any = {"model": "text", "input": prompt, "instructions": "Be brief.", "temperature": 0, "max_output_tokens": TOKENS + 2}
        events: list[Any] = list(client.responses.create(**asked, stream=True))
        return events[-1].response, events


def to_the_bound(ask: Callable[[Gateway, str], tuple[Any, list[Any]]], to: Gateway) -> tuple[str, Any, list[Any]]:
    """A prompt whose answer does not end by itself before its bound, and that answer: neither endpoint has `ignore_eos`."""
    for number in range(50):
        prompt = f"Tell me a story of {number} words"
        whole, events = ask(to, prompt)
        if whole.usage.output_tokens == TOKENS:
            return prompt, whole, events
    raise AssertionError("every answer ends by itself")


def test_a_message_goes_on_in_the_middle(cut: Gateway, dying: Cutting) -> None:
    dying.after = None
    prompt, whole, as_ever = to_the_bound(message, cut)
    assert whole.stop_reason == "max_tokens"
    for after in (4, 9, 25, len(as_ever) - 2, len(as_ever) - 1):
        found, events = dying.cut_after(after, lambda: message(cut, prompt))
        kinds = [event.type for event in events]
        deltas = kinds.count("content_block_delta")
        assert kinds == ["message_start", "content_block_start", *["content_block_delta"] * deltas, *[event.type for event in as_ever][-3:]]
        assert found.usage.output_tokens <= TOKENS
        assert (found.stop_reason == "max_tokens") == (found.usage.output_tokens == TOKENS)
        prompts = [one.usage.input_tokens + (one.usage.cache_read_input_tokens or 0) for one in (found, whole)]
        assert prompts[0] == prompts[1]
        before = "".join(event.delta.text for event in events[2:after] if event.type == "content_block_delta")
        assert whole.content[0].text.startswith(before)
        assert found.content[0].text.startswith(before)
        assert found.id == events[0].message.id


def test_a_response_goes_on_in_the_middle(cut: Gateway, dying: Cutting) -> None:
    dying.after = None
    prompt, whole, as_ever = to_the_bound(response, cut)
    assert whole.status == "incomplete"
    for after in (5, 9, 25, len(as_ever) - 3, len(as_ever) - 1):
        found, events = dying.cut_after(after, lambda: response(cut, prompt))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        deltas = sum(event.type == "response.output_text.delta" for event in events)
        kinds = [event.type for event in events]
        closing = [*[event.type for event in as_ever][-4:-1], f"response.{found.status}"]
        assert kinds == [*[event.type for event in as_ever][:4], *["response.output_text.delta"] * deltas, *closing]
        assert found.usage.output_tokens <= TOKENS
        assert (found.status == "incomplete") == (found.usage.output_tokens == TOKENS)
        assert found.usage.input_tokens == whole.usage.input_tokens
        assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert (found.output_text, found.output[0].content[0].text) == (text, text)
        assert found.id == events[0].response.id
        assert set(found.model_dump()) == set(whole.model_dump())


@pytest.mark.parametrize("prompt", ["Once upon a time", ["Once upon a time"], [271, 78, 300], [[271, 78, 300]]])
def test_a_completion_goes_on_whatever_its_prompt_is(cut: Gateway, dying: Cutting, prompt: Any) -> None:
    asked = {
        "model": "text", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    found = []
    for after in (None, 9):
        dying.after = after
        answer = raw.call(cut.port, "POST", "/v1/completions", asked).body
        assert answer.endswith(b"data: [DONE]\n\n"), answer[-500:]
        assert answer.count(b": continued") == (after is not None)
        found.append([json.loads(event[6:]) for event in answer.split(b"\n\n") if event.startswith(b"data: {")])
    dying.after = None
    usages = [chunks[-1]["usage"] for chunks in found]
    assert [(usage["prompt_tokens"], usage["completion_tokens"]) for usage in usages] == [(usages[0]["prompt_tokens"], TOKENS)] * 2
    texts = ["".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) for chunks in found]
    assert texts[1].startswith("".join(choice["text"] for chunk in found[1][:7] for choice in chunk["choices"]))


def shown(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice with the tokens of its log-probabilities alone: two engines add up in their own order."""
    logprobs = choice["logprobs"]
    tokens = logprobs and (logprobs.get("tokens") or [token["token"] for token in logprobs["content"]])
    return {**choice, "logprobs": tokens}


@pytest.mark.parametrize(
    ("kind", "more"),
    [("chat/completions", {}), ("chat/completions", {"n": 2}), ("chat/completions", {"logprobs": True}), ("completions", {"logprobs": 2})],
)
def test_json_is_the_same_whether_hedged_or_not(two: Gateway, cut: Gateway, dying: Cutting, kind: str, more: dict[str, Any]) -> None:
    """Against what the engine itself answers, undisturbed and with the host cut off in the middle: over token ids, anew, or as JSON."""
    said: dict[str, Any] = {"prompt": "Hello"} if kind == "completions" else {"messages": [{"role": "user", "content": "Hello"}]}
    asked: dict[str, Any] = {"model": "exact", **said, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **more}
    own = raw.call(int(engine_urls(two)[1].rsplit(":", 1)[1]), "POST", f"/v1/{kind}", asked).json()
    as_json = kind == "chat/completions" and "logprobs" in more
    for after in (None, 12):
        dying.after, cuts = after, dying.cuts
        answer = raw.call(cut.port, "POST", f"/v1/{kind}", asked)
        dying.after = None
        assert answer.status == 200, answer.body
        assert dying.cuts == cuts + (after is not None and not as_json)
        found = answer.json()
        for choice, its_own in zip(found["choices"], own["choices"], strict=True):
            if "n" in more and after is not None:  # which goes on by its text
                choice["message"] = its_own["message"]
            assert shown(choice) == shown(its_own)
        assert {name: found["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
            name: own["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")
        }
        assert as_json or set(own) - set(found) <= {"metadata"}


def test_a_killed_engine_is_not_noticed(two: Gateway) -> None:
    """kill -9 of the engine that is answering: a message, a response and a JSON answer at once."""
    results: dict[str, Any] = {}

    def chat() -> None:
        said = [{"role": "user", "content": "Hello"}]
        asked = {"model": "exact", "messages": said, "max_tokens": 200, "temperature": 0, "ignore_eos": True}
        results["json"] = raw.call(two.port, "POST", "/v1/chat/completions", asked, {"x-request-id": "json"})

    def claude() -> None:
        said: Any = [{"role": "user", "content": "Hello"}]
        with (
            anthropic.Anthropic(base_url=two.root, api_key="none", max_retries=0) as client,
            client.messages.stream(model="text", max_tokens=200, messages=said, extra_headers={"x-request-id": "message"}) as stream,
        ):
            results["message"] = stream.get_final_message()

    def responses() -> None:
        with openai.OpenAI(base_url=two.base_url, api_key="none", max_retries=0) as client:
            asked: Any = {"model": "text", "input": "Hello", "max_output_tokens": 202, "stream": True}
            results["response"] = list(client.responses.create(**asked, extra_headers={"x-request-id": "response"}))

    # All of them at one host: the other is drained until they are there.
    (_, other) = [row["id"] for row in two.admin("/admin/hosts").json()["hosts"]]
    assert two.admin(f"/admin/hosts/{other}/drain", "POST").status < 300
    threads = [threading.Thread(target=work) for work in (chat, claude, responses)]
    for thread in threads:
        thread.start()
    until("all are under way", lambda: sum(row["in_flight"] for row in two.admin("/admin/hosts").json()["hosts"]) == 3)
    assert two.admin(f"/admin/hosts/{other}/undrain", "POST").status < 300
    victim = next(
        child for supervisor in two.supervisors() if "dsv3/local-0" in " ".join(command(supervisor))
        for child in supervisor.children() if "sglang.launch_server" in " ".join(command(child))
    )  # fmt: skip
    victim.kill()
    for thread in threads:
        thread.join(120)
    assert set(results) == {"json", "message", "response"}
    whole = results["json"].json()
    assert (whole["choices"][0]["finish_reason"], whole["usage"]["completion_tokens"]) == ("length", 200)
    assert results["message"].stop_reason in ("max_tokens", "end_turn")
    numbers = [event.sequence_number for event in results["response"]]
    assert numbers == list(range(len(numbers)))
    assert results["response"][-1].type in ("response.incomplete", "response.completed")

    def logged() -> dict[str, Any]:
        found = {line["request_id"]: line for line in two.requests() if line["request_id"] in results}
        return found if len(found) == 3 else {}

    lines = until("all are logged", logged)
    assert lines["json"]["completion_tokens"] == 200
    assert {lines[name]["outcome"] for name in results} == {"ok"}
    psutil.wait_procs([victim], timeout=10)
