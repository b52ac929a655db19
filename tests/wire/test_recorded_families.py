"""Streams of V3.2 and V4, as SGLang's own serving code and parsers write them (tests/engine/record_families.py), through a gateway and
read by openai-python: thoughts, tool calls, why it ended and what it used, however the bytes are cut."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest

from tests.support.processes import GOLDEN, Gateway, Rehearsal, gateway, until

NAMES = sorted(path.stem for path in GOLDEN.glob("v[34]*.sse"))
THOUGHT = "The user asks for two things.\nI call two tools."
CALLED = [("get_weather", {"city": 'Berlin "Mitte"\nñ', "days": 3}), ("get_news", {"city": "Paris"})]


class Read(NamedTuple):
    thoughts: str
    words: str
    calls: list[tuple[str, Any]]
    finish: str | None
    usage: tuple[int, int]


@pytest.fixture(scope="module")
def kept(scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that would continue its answers, and so looks at each event more closely."""
    config = scripted_sglang.backend()
    config["models"]["deepseek-v3"]["continuation"] = "text"
    with gateway(tmp_path_factory.mktemp("kept"), config) as running:
        running.wait_all_hosts()
        yield running


def read(to: Gateway, name: str, split: int, **more: Any) -> Read:
    thoughts, words, finish, usage = "", "", None, (0, 0)
    calls: dict[int, tuple[str, str]] = {}
    with openai.OpenAI(base_url=to.base_url, api_key="none", max_retries=0) as client:
        messages: Any = [{"role": "user", "content": f"[[golden {name}]] [[split {split}]]"}]
        with client.chat.completions.create(model="deepseek-v3", messages=messages, stream=True, **more) as stream:
            for chunk in stream:
                if chunk.usage is not None:
                    usage = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
                for choice in chunk.choices:
                    thoughts += getattr(choice.delta, "reasoning_content", None) or ""
                    words += choice.delta.content or ""
                    finish = choice.finish_reason or finish
                    for call in choice.delta.tool_calls or ():
                        assert call.function is not None
                        before = calls.get(call.index, ("", ""))
                        calls[call.index] = before[0] + (call.function.name or ""), before[1] + (call.function.arguments or "")
    return Read(thoughts, words, [(name, json.loads(arguments)) for name, arguments in calls.values()], finish, usage)


def expected(name: str) -> Read:
    if name == "v4-in-pieces":
        return Read(THOUGHT, "I look. ñ 雨", [("get_weather", {"city": "Berlin", "days": 3}), CALLED[1]], "tool_calls", (42, 63))
    called = "calls" in name
    words = ("" if "thinks" in name else "I look.") if called else "It rains, ñ 雨." if "thinks" in name else "It rains."
    used = next(json.loads(line[6:])["usage"] for line in reversed(_lines(name)) if '"usage":{' in line)
    counts = used["prompt_tokens"], used["completion_tokens"]
    return Read(THOUGHT if "thinks" in name else "", words, CALLED if called else [], "tool_calls" if called else "stop", counts)


def _lines(name: str) -> list[str]:
    return (Path(GOLDEN) / f"{name}.sse").read_text().splitlines()


def test_each_family_is_recorded() -> None:
    assert {name.partition("-")[2] for name in NAMES if name.startswith("v32")} == {"thinks", "plain", "calls", "thinks-and-calls"}
    assert {name.partition("-")[2] for name in NAMES if name.startswith("v4-")} == {
        "thinks", "plain", "calls", "thinks-and-calls", "in-pieces",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", [7, 4096])
def test_a_client_reads_what_the_model_has_written(wired: Gateway, kept: Gateway, name: str, split: int) -> None:
    for to in (wired, kept):
        found = read(to, name, split, stream_options={"include_usage": True})
        assert found._replace(words=found.words.strip()) == expected(name)
        assert read(to, name, split) == found._replace(usage=(0, 0))  # nobody asked, and nobody is told


@pytest.mark.parametrize("name", [name for name in NAMES if "calls" in name])
def test_the_log_knows_what_it_used(wired: Gateway, name: str) -> None:
    read(wired, name, 4096)

    def last() -> tuple[int, int]:
        line = wired.requests()[-1]
        return line.get("prompt_tokens", 0), line.get("completion_tokens", 0)

    until("it is in the log", lambda: last() == expected(name).usage)
