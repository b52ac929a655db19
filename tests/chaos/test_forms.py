"""Anthropic's and Responses' streams whose host dies, by the parsers of their own SDKs: one answer, whole, as if one host had given it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.support import raw
from tests.support.processes import Gateway, Rehearsal, gateway, rehearsal, until

TEXT = "".join(f"token {number} " for number in range(8))
TIMEOUTS = {"connect_s": 0.5, "first_token_s": 2, "between_tokens_s": 0.7, "request_s": 10}
# Events before the tokens, all tokens, and those after them but the last, without which there is no answer.
FAULTS = [
    f"{fault} {at}" for fault, several in (("die", range(3, 14)), ("cut", (4, 7)), ("stall", (6,)), ("mid-error", (5,))) for at in several
]


class Pair:
    """Two hosts behind a gateway: the first one is asked first, and obeys; the second one is told not to."""

    def __init__(self, running: Gateway, first: Rehearsal, second: Rehearsal) -> None:
        self.running = running
        self.first = first
        self.second = second
        self._names = itertools.count()

    def ask(self, command: str) -> tuple[str, dict[str, str]]:
        """A prompt, and headers by which the record of its request is found."""
        until("nobody is avoided for having been busy", lambda: not any(
            "busy" in host["why"] for host in self.running.admin("/admin/hosts").json()["hosts"]
        ))  # fmt: skip
        return f"Hello [[{command}]]", {"x-request-id": f"asked-{next(self._names)}"}

    def line(self, headers: dict[str, str]) -> dict[str, Any]:
        name = headers["x-request-id"]
        (found,) = until("it is logged", lambda: [line for line in self.running.requests() if line["request_id"] == name])
        return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with rehearsal() as first, rehearsal() as second:
        second.behave(deaf=True)
        hosts = [{"url": first.url, "weight": 100_000}, {"url": second.url, "weight": 1}]
        section = {"kind": "sglang_dsv3", "hosts": hosts, "health": {"max_ejected_share": 0, "slow_start_s": 0, "wedged_s": 60}}
        models = {mode: {"backend": "dsv3", "continuation": mode, "balance": "weighted_round_robin"} for mode in ("text", "off")}
        with gateway(tmp_path_factory.mktemp("forms"), {"models": models, "backends": {"dsv3": section}, "timeouts": TIMEOUTS}) as running:
            running.wait_ready()
            running.wait_all_hosts()
            yield Pair(running, first, second)


@pytest.fixture
def claude(pair: Pair) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=pair.running.root, api_key="none", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture
def client(pair: Pair) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=pair.running.base_url, api_key="none", max_retries=0, timeout=20) as found:
        yield found


def message(claude: anthropic.Anthropic, prompt: str, headers: dict[str, str], **more: Any) -> tuple[Any, list[Any]]:
    asked: Any = {"model": "text", "max_tokens": 100, "messages": [{"role": "user", "content": prompt}], **more}
    with claude.messages.stream(**asked, extra_headers=headers) as stream:
        events = [event for event in stream if event.type not in ("text", "content_block_snapshot")]
        return stream.get_final_message(), events


def response(client: openai.OpenAI, prompt: str, headers: dict[str, str], **more: Any) -> tuple[Any, list[Any]]:
    asked: Any = {"model": "text", "input": prompt, **more}
    with client.responses.stream(**asked, extra_headers=headers) as stream:
        events = list(stream)
        return stream.get_final_response(), events


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "die 13"])  # whose last event is the twelfth
def test_messages_go_on(pair: Pair, claude: anthropic.Anthropic, fault: str) -> None:
    at = int(fault.split()[1])
    prompt, headers = pair.ask(fault)
    found, events = message(claude, prompt, headers)
    undisturbed, as_ever = message(claude, "Hello", {})
    assert [event.type for event in events] == [event.type for event in as_ever]
    assert (found.content, found.stop_reason, found.usage) == (undisturbed.content, undisturbed.stop_reason, undisturbed.usage)
    assert found.content[0].text == TEXT
    line = pair.line(headers)
    assert (line["prompt_tokens"], line["completion_tokens"], line["outcome"]) == (12, 8, "ok")
    # Where only closing words are missing no other host is asked.
    assert (line["attempts"], line.get("continuations", 0)) == ((2, 1) if at < 11 else (1, 0))


@pytest.mark.parametrize("fault", FAULTS)
def test_responses_go_on(pair: Pair, client: openai.OpenAI, fault: str) -> None:
    prompt, headers = pair.ask(fault)
    found, events = response(client, prompt, headers)
    undisturbed, as_ever = response(client, "Hello", {})
    assert [event.type for event in events] == [event.type for event in as_ever]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (found.output_text, found.status, found.model) == (TEXT, "completed", "text")
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {found.output[0].id}
    assert found.id == events[0].response.id
    assert (
        (found.usage.input_tokens, found.usage.output_tokens)
        == (undisturbed.usage.input_tokens, undisturbed.usage.output_tokens)
        == (12, 8)
    )
    line = pair.line(headers)
    assert (line["prompt_tokens"], line["completion_tokens"], line["outcome"]) == (12, 8, "ok")
    assert (line["attempts"], line.get("continuations", 0)) == (2, 1)


def test_bounds_hold_over_both_hosts(pair: Pair, claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    prompt, headers = pair.ask("die 7")
    found, _ = message(claude, prompt, headers, max_tokens=6)
    assert (found.content[0].text, found.stop_reason, found.usage.output_tokens) == (TEXT[: len("token 0 ") * 6], "max_tokens", 6)
    prompt, headers = pair.ask("die 7")
    # Whose helper for streams takes an answer that is not complete for none.
    asked: Any = {"model": "text", "input": prompt, "max_output_tokens": 7, "stream": True}
    *_, last = client.responses.create(**asked, extra_headers=headers)
    assert (last.type, last.response.status, last.response.incomplete_details.reason) == (
        "response.incomplete", "incomplete", "max_output_tokens",
    )  # fmt: skip
    assert last.response.output_text == TEXT[: len("token 0 ") * 5], "two less, as SGLang counts"


def test_what_cannot_go_on_ends_in_an_event_of_its_own_grammar(pair: Pair, claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    prompt, headers = pair.ask("die 5")
    with pytest.raises(anthropic.APIStatusError):
        message(claude, prompt, headers, model="off")
    thinks = {"role": "assistant", "content": [{"type": "thinking", "thinking": "y", "signature": ""}]}
    prompt, headers = pair.ask("die 5")
    with pytest.raises(anthropic.APIStatusError):
        message(claude, "", headers, messages=[{"role": "user", "content": "x"}, thinks, {"role": "user", "content": prompt}])
    body = {"model": "off", "input": pair.ask("die 6")[0], "stream": True}
    answer = raw.call(pair.running.port, "POST", "/v1/responses", body).body
    numbers = [json.loads(event.partition(b"data: ")[2])["sequence_number"] for event in answer.split(b"\n\n") if b"data: " in event]
    assert numbers == list(range(7))
    assert b"event: error" in answer
    assert b"response.completed" not in answer


def test_a_host_that_is_killed_in_the_middle_is_not_noticed(tmp_path: Any) -> None:
    """SIGKILL, with streams of both kinds under way."""
    with rehearsal() as first, rehearsal() as second:
        hosts = [{"url": first.url, "weight": 100_000}, {"url": second.url, "weight": 1}]
        section = {"kind": "sglang_dsv3", "hosts": hosts, "health": {"max_ejected_share": 0, "slow_start_s": 0}}
        models = {"m": {"backend": "dsv3", "balance": "weighted_round_robin"}}
        with gateway(tmp_path, {"models": models, "backends": {"dsv3": section}, "timeouts": {"first_token_s": 10}}) as running:
            running.wait_ready()
            running.wait_all_hosts()
            prompt = "[[pace 0.05]] [[tokens 40]]"
            whole = "".join(f"token {number} " for number in range(40))
            with (
                anthropic.Anthropic(base_url=running.root, api_key="none", max_retries=0) as claude,
                openai.OpenAI(base_url=running.base_url, api_key="none", max_retries=0) as client,
                claude.messages.stream(model="m", max_tokens=100, messages=[{"role": "user", "content": prompt}]) as one,
                client.responses.stream(model="m", input=prompt) as other,
            ):
                said = ""
                events: list[Any] = []
                texts = iter(one.text_stream)
                while len(said) < 60:
                    said += next(texts)
                while len(events) < 8:
                    events.append(next(other))
                first.process.kill()
                said += "".join(texts)
                events += list(other)
                assert (said, other.get_final_response().output_text) == (whole, whole)
                assert [event.sequence_number for event in events] == list(range(len(events)))
                usage = one.get_final_message().usage
                assert (usage.input_tokens + (usage.cache_read_input_tokens or 0), usage.output_tokens) == (12, 40)
            until("both are logged", lambda: len(running.requests()) == 2)
            lines = running.requests()
            assert [(line["continuations"], line["completion_tokens"], line["outcome"]) for line in lines] == [(1, 40, "ok")] * 2


@pytest.mark.parametrize("at", [2, 5, 8, 17, 18, 19])
@pytest.mark.parametrize("kind", ["chat", "prompts"])
def test_several_choices_go_on_each_by_itself(pair: Pair, kind: str, at: int) -> None:
    """Two choices of 8 tokens: two roles (or nothing), 16 tokens, two finishes, the usage."""
    prompt, headers = pair.ask(f"cut {at}")
    asked: dict[str, Any] = {"model": "text", "stream": True, "stream_options": {"include_usage": True}, "n": 2}
    path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
    asked |= {"messages": [{"role": "user", "content": prompt}]} if kind == "chat" else {"prompt": [prompt]}
    answer = raw.call(pair.running.port, "POST", path, asked, headers)
    assert answer.body.endswith(b"data: [DONE]\n\n"), answer.body[-300:]
    chunks = [json.loads(event[6:]) for event in answer.body.split(b"\n\n") if event.startswith(b"data: {")]
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    for index in range(2):
        parts = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        said = [(part["delta"].get("content") if kind == "chat" else part["text"]) or "" for part in parts]
        assert "".join(said) == TEXT
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["stop"]
        if kind == "chat":
            assert sum("role" in part["delta"] for part in parts) == 1
    (usage,) = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    assert usage["completion_tokens"] == 16
    line = pair.line(headers)
    assert (line["completion_tokens"], line["outcome"]) == (16, "ok")
