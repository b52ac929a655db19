"""Whatever an answer is made of, it goes on at another engine: thoughts, words, calls, forms; cut before, in and between them.

Two real SGLang engines with the reasoning and tool call parsers of DeepSeek-V3.1. Their checkpoint is the tiny one with other weights
(`scripted.py`): it thinks, speaks and calls in an order that a request can choose, which an untrained model never would; the tokens are
generated, sampled, detokenised and parsed by SGLang as any are. One engine is cut off by a proxy, and at last one is killed.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.support import raw
from tests.support.cutting import Cutting, cutting
from tests.support.engine import engine_urls
from tests.support.processes import ROOT, Gateway, command, gateway

# Of an engine that is kept busy several tokens come in one event: then what SGLang's parsers tell apart, and when, is not the same twice.
pytestmark = pytest.mark.storm

CHAT = "/v1/chat/completions"
MODELS = {mode: {"backend": "dsv3", "continuation": mode, "balance": "weighted_round_robin"} for mode in ("exact", "text", "off")}
HEALTH = {"max_ejected_share": 0, "slow_start_s": 0}
PYTHON = ROOT / ".venv-engine" / "bin" / "python"
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "", "parameters": {"type": "object", "properties": {}}}}]
THINKING: dict[str, Any] = {"chat_template_kwargs": {"thinking": True}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripted") / "scripted"
    subprocess.run([PYTHON, Path(__file__).with_name("scripted.py"), folder], check=True, timeout=120)
    return folder


@pytest.fixture(scope="module")
def calling(checkpoint: Path) -> dict[str, Any]:
    """What makes the script take the way to its call."""
    vocabulary = {token["content"]: token["id"] for token in json.loads((checkpoint / "tokenizer.json").read_text())["added_tokens"]}
    return {"tools": TOOLS, "logit_bias": {str(vocabulary["<｜tool▁calls▁begin｜>"]): 2}}


def at_once(calling: dict[str, Any]) -> dict[str, Any]:
    """The same, in place of the words."""
    return {**calling, "logit_bias": dict.fromkeys(calling["logit_bias"], 3)}


@pytest.fixture(scope="module")
def two(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with two engines of its own."""
    engine = {
        "dtype": "float32", "model_path": str(checkpoint), "reasoning_parser": "deepseek-v3", "tool_call_parser": "deepseekv31",
    }  # fmt: skip
    section = {"kind": "sglang_dsv3", "hosts": [{"launch": "local"}, {"launch": "local"}], "engine": engine, "health": HEALTH}
    with gateway(tmp_path_factory.mktemp("two"), {"models": MODELS, "backends": {"dsv3": section}}) as running:
        running.wait_ready(300)
        running.wait_all_hosts(300)
        yield running


@pytest.fixture(scope="module")
def dying(two: Gateway) -> Iterator[Cutting]:
    with cutting(engine_urls(two)[0]) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def cut(two: Gateway, dying: Cutting, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway in front of the same two engines, the first one behind the proxy that cuts; nearly every request goes there first."""
    hosts = [{"url": dying.url, "weight": 1000}, {"url": engine_urls(two)[1], "weight": 1}]
    section = {"kind": "sglang_dsv3", "hosts": hosts, "health": HEALTH}
    with gateway(tmp_path_factory.mktemp("cut"), {"models": MODELS, "backends": {"dsv3": section}}) as running:
        running.wait_ready()
        running.wait_all_hosts()
        yield running


def body(model: str, more: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hello"}]
    options = {"include_usage": True}
    return {"model": model, "messages": messages, "max_tokens": 120, "temperature": 0, "stream": True, "stream_options": options, **more}


class Heard:
    """A stream as a client has it, and which of its events brings what."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.continued = b": continued on another host\n\n" in content
        self.chunks = [json.loads(event[6:]) for event in content.split(b"\n\n") if event.startswith(b"data: {")]
        self.thoughts, self.words, self.finish, self.probable = "", "", "", list[Any]()
        self.calls: list[dict[str, str]] = []
        # Of every event: "role", "thoughts", "words", "calls", "finish" or "usage".
        self.kinds: list[str] = []
        self.usage: dict[str, Any] = {}
        for chunk in self.chunks:
            self._add(chunk)

    def _add(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self.kinds.append("error")
            return
        if not chunk["choices"]:
            self.usage = chunk["usage"]
            self.kinds.append("usage")
            return
        choice = chunk["choices"][0]
        delta = choice["delta"]
        self.finish = choice["finish_reason"] or self.finish
        self.probable += (choice.get("logprobs") or {}).get("content", ())
        for piece in delta.get("tool_calls") or ():
            if piece["index"] == len(self.calls):
                self.calls.append({"id": piece["id"], "name": piece["function"]["name"], "arguments": ""})
            self.calls[piece["index"]]["arguments"] += piece["function"].get("arguments") or ""
        self.thoughts += delta.get("reasoning_content") or ""
        self.words += delta.get("content") or ""
        kind = "role" if delta.get("role") else "finish" if choice["finish_reason"] else "calls" if delta.get("tool_calls") else ""
        self.kinds.append(kind or ("thoughts" if delta.get("reasoning_content") else "words"))

    def said(self) -> tuple[Any, ...]:
        """Everything that two answers must have in common."""
        calls = [(call["name"], call["arguments"]) for call in self.calls]
        return self.thoughts, self.words, calls, self.finish, self.usage.get("prompt_tokens")

    def assert_seamless(self) -> None:
        assert self.content.endswith(b"data: [DONE]\n\n")
        assert {len({chunk[name] for chunk in self.chunks}) for name in ("id", "created", "model")} == {1}
        assert (self.kinds.count("role"), self.kinds.count("finish"), self.kinds.count("usage")) == (1, 1, 1)
        for call in self.calls:
            json.loads(call["arguments"])

    def places(self) -> list[int]:
        """How many events to let pass: after the first one, after the first of each kind, before the last of it, after it, and between."""
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for number, kind in enumerate(self.kinds, 1):
            first.setdefault(kind, number)
            last[kind] = number
        found = {1}
        for kind in first.keys() - {"usage"}:
            middle = (first[kind] + last[kind]) // 2
            found |= {first[kind], middle, last[kind] - 1, last[kind]}
        return sorted(place for place in found if 0 < place < len(self.kinds))


def ask(running: Gateway, model: str, more: dict[str, Any]) -> Heard:
    answer = raw.call(running.port, "POST", CHAT, body(model, more))
    assert answer.status == 200, answer.body
    return Heard(answer.body)


def everywhere(cut: Gateway, dying: Cutting, mode: str, more: dict[str, Any]) -> Heard:
    """The answer undisturbed, and the same wherever it is cut."""
    dying.after = None
    undisturbed = ask(cut, mode, more)
    undisturbed.assert_seamless()
    assert not undisturbed.continued
    for after in undisturbed.places():
        if mode == "exact" and undisturbed.kinds[after - 1] in ("calls", "finish"):
            continue  # the engine tells of these in its last event, behind which there is nothing to cut
        disturbed = dying.cut_after(after, partial(ask, cut, mode, more))
        where = (after, undisturbed.kinds[after - 1 : after + 1], disturbed.content[-900:])
        if mode == "text" and undisturbed.calls:
            # SGLang's detector loses the word that a busy engine puts into one event with the mark of a call.
            assert undisturbed.words.startswith(disturbed.words), where
            assert len(undisturbed.words) - len(disturbed.words) < 10, where
            disturbed.words = undisturbed.words
        assert disturbed.said() == undisturbed.said(), where
        disturbed.assert_seamless()
        # What ends a call or a form is shown in no event: a host that dies behind it may not have told of these tokens.
        at_the_end = mode == "text" and ("finish" in undisturbed.kinds[after - 1 : after + 1] or "response_format" in more)
        unshown = undisturbed.usage["completion_tokens"] - disturbed.usage["completion_tokens"]
        assert 0 <= unshown <= (2 if at_the_end else 0), where
        assert disturbed.usage["reasoning_tokens"] == undisturbed.usage["reasoning_tokens"] or at_the_end, where
    dying.after = None
    return undisturbed


@pytest.mark.parametrize("mode", ["text", "exact"])
def test_tools_that_are_offered_and_not_called(cut: Gateway, dying: Cutting, mode: str) -> None:
    heard = everywhere(cut, dying, mode, {"tools": TOOLS})
    assert heard.said() == (ask(cut, "off", {"tools": TOOLS})).said()
    assert heard.words.startswith("\nThe result")
    assert heard.finish == "stop"


@pytest.mark.parametrize("mode", ["text", "exact"])
def test_thoughts_and_the_words_after_them(cut: Gateway, dying: Cutting, mode: str) -> None:
    heard = everywhere(cut, dying, mode, THINKING)
    plain = ask(cut, "off", THINKING)
    assert heard.said() == plain.said(), "and the same that chat itself gives"
    assert heard.usage["reasoning_tokens"] == plain.usage["reasoning_tokens"] > 20
    assert heard.thoughts.startswith(" First")
    assert heard.words.startswith("\nThe result")


@pytest.mark.parametrize("mode", ["text", "exact"])
def test_a_call_after_words(cut: Gateway, dying: Cutting, mode: str, calling: dict[str, Any]) -> None:
    heard = everywhere(cut, dying, mode, calling)
    assert [call["name"] for call in heard.calls] == ["get_weather"]
    assert heard.finish == "tool_calls"


@pytest.mark.parametrize("mode", ["text", "exact"])
def test_a_call_right_after_thoughts(cut: Gateway, dying: Cutting, mode: str, calling: dict[str, Any]) -> None:
    heard = everywhere(cut, dying, mode, {**THINKING, **at_once(calling)})
    assert (bool(heard.thoughts), heard.words, len(heard.calls), heard.finish) == (True, "", 1, "tool_calls")


@pytest.mark.parametrize("mode", ["text", "exact"])
def test_thoughts_words_and_a_call(cut: Gateway, dying: Cutting, mode: str, calling: dict[str, Any]) -> None:
    heard = everywhere(cut, dying, mode, {**THINKING, **calling})
    assert heard.thoughts
    assert heard.words
    assert json.loads(heard.calls[0]["arguments"]) == {"days": 315287}
    plain = ask(cut, "off", {**THINKING, **calling})
    assert (heard.thoughts, heard.words, heard.finish) == (plain.thoughts, plain.words, plain.finish)
    assert json.loads(heard.calls[0]["arguments"]) == json.loads(plain.calls[0]["arguments"])


def test_thoughts_that_are_not_told_apart(cut: Gateway, dying: Cutting) -> None:
    heard = everywhere(cut, dying, "text", {**THINKING, "separate_reasoning": False})
    assert heard.thoughts == ""
    assert "</think>\nThe result" in heard.words


def test_an_object_goes_on_under_a_grammar_of_its_rest(cut: Gateway, dying: Cutting) -> None:
    more = {"response_format": {"type": "json_object"}}
    heard = everywhere(cut, dying, "text", more)
    assert json.loads(heard.words) == {"days": 315287}


def test_a_form_that_has_not_begun_goes_on_and_one_that_has_ends_honestly(cut: Gateway, dying: Cutting) -> None:
    """SGLang holds the text to the form once the thoughts are over, which they are not yet; it cannot begin in the middle of a form."""
    schema = {"type": "object", "properties": {"days": {"type": "number"}}, "required": ["days"]}
    form = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    for more in (form, {"ebnf": 'root ::= "{\\"days\\": " [0-9e.]+ "}"'}):
        dying.after = None
        undisturbed = ask(cut, "text", {**THINKING, **more})
        assert json.loads(undisturbed.words) == {"days": 315287}
        for after in (1, 5, undisturbed.kinds.index("words")):
            disturbed = dying.cut_after(after, partial(ask, cut, "text", {**THINKING, **more}))
            if disturbed.kinds[-1] == "error":  # a busy engine puts several tokens into one event, and its form had begun
                assert after > 5
                assert disturbed.words
                continue
            assert disturbed.continued
            assert disturbed.said() == undisturbed.said(), (after, disturbed.content)
        ended = dying.cut_after(undisturbed.kinds.index("words") + 2, partial(ask, cut, "text", {**THINKING, **more}))
        assert ended.kinds[-1] == "error"
        assert not ended.continued
        assert undisturbed.words.startswith(ended.words)
    dying.after = None


def test_what_a_grammar_does_behind_a_beginning(two: Gateway) -> None:
    """Why: the engine's grammar begins with what it generates, whatever the prompt ends in. This is what `unfinished` is for."""
    beginning = {"role": "assistant", "content": '{"days":'}
    asked = {"messages": [{"role": "user", "content": "Hello"}, beginning], "continue_final_message": True, "max_tokens": 40}
    answer = raw.call(two.port, "POST", CHAT, {"model": "off", **asked, "temperature": 0, "regex": r"\{\"days\": [0-9.e]{1,9}\}"})
    assert answer.json()["choices"][0]["message"]["content"].startswith('{"days": '), "and not just a number"


def test_probabilities_go_on_where_ids_are_exact(cut: Gateway, dying: Cutting) -> None:
    more = {"logprobs": True, "top_logprobs": 2}
    dying.after = None
    plain, undisturbed = ask(cut, "off", more), ask(cut, "exact", more)
    tokens = [item["token"] for item in plain.probable]
    assert [item["token"] for item in undisturbed.probable] == tokens
    assert {len(item["top_logprobs"]) for item in undisturbed.probable} == {2}
    for after in (1, 2, 9, 20):
        disturbed = dying.cut_after(after, partial(ask, cut, "exact", more))
        assert disturbed.continued
        assert disturbed.said() == undisturbed.said()
        assert [item["token"] for item in disturbed.probable] == tokens
        pairs = zip(disturbed.probable, plain.probable, strict=True)
        assert all(abs(one["logprob"] - other["logprob"]) < 1e-3 and one["bytes"] == other["bytes"] for one, other in pairs)
    assert dying.cut_after(9, partial(ask, cut, "text", more)).kinds[-1] == "error"


def test_a_killed_engine_is_not_noticed_in_thoughts_or_calls(two: Gateway, cut: Gateway, dying: Cutting, calling: dict[str, Any]) -> None:
    """kill -9 of the engine that is answering, in the middle of it, as openai-python puts the answer together."""
    more = {**THINKING, **calling}
    dying.after = None
    undisturbed = ask(cut, "off", more)
    victim = next(
        child for supervisor in two.supervisors() if "dsv3/local-0" in " ".join(command(supervisor))
        for child in supervisor.children() if "sglang.launch_server" in " ".join(command(child))
    )  # fmt: skip
    client = openai.OpenAI(base_url=cut.base_url, api_key="none", max_retries=0)
    asked: dict[str, Any] = {name: value for name, value in body("text", more).items() if name not in ("stream", "chat_template_kwargs")}
    asked["extra_body"] = {"chat_template_kwargs": more["chat_template_kwargs"]}
    with client, client.chat.completions.stream(**asked) as stream:
        thoughts, killed = "", False
        for event in stream:
            if event.type != "chunk":
                continue
            for choice in event.chunk.choices:
                thoughts += getattr(choice.delta, "reasoning_content", None) or ""
            if thoughts and not killed:
                victim.kill()
                killed = True
        message = stream.get_final_completion().choices[0].message
    psutil.wait_procs([victim], timeout=10)
    assert b'penstock_continuations_total{model="text"}' in cut.admin("/metrics").body
    assert thoughts == undisturbed.thoughts
    assert message.content == undisturbed.words
    assert message.tool_calls is not None
    assert [(call.function.name, call.function.arguments) for call in message.tool_calls] == [
        (call["name"], call["arguments"]) for call in undisturbed.calls
    ]
