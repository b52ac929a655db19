"""Hosts that are killed again and again under two hundred streams: with continuation nobody notices, without it nobody is deceived.

The streams are what people send: words, words with tools on offer, thoughts and words, calls after words, thoughts and a call.

PENSTOCK_KILL_S=600 make test ARGS="-k kill_hosts -s"      for as long as you like; prints the counts
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support import raw
from tests.support.processes import Gateway, Rehearsal, gateway, rehearsal

pytestmark = pytest.mark.storm

CHAT = "/v1/chat/completions"
STREAMS, TOKENS, PACE_S, KILL_EVERY_S = 200, 100, 0.04, 2.0
ON_S = float(os.environ.get("PENSTOCK_KILL_S", "20"))
OFF_S = 10.0
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
# What a client has of an answer: thoughts, words, and arguments of a call.
Said = tuple[str, str, str]


def kind(thoughts: int = 0, words: int = 0, numbers: int = 0, offered: bool = False) -> tuple[dict[str, Any], Said]:
    """A request, and what its answer has to be."""
    prompt = f"[[thinks {thoughts}]] [[tokens {words}]] [[calls {numbers}]] [[pace {PACE_S}]]"
    body = raw.chat(prompt, max_tokens=2 * TOKENS, stream=True)
    if thoughts:
        body["chat_template_kwargs"] = {"thinking": True}
    if numbers or offered:
        body["tools"] = TOOLS
    arguments = '{"days":[' + "".join(f"{number}," for number in range(numbers)) + "31]}" if numbers else ""
    thought, said = ("".join(f"{name} {number} " for number in range(count)) for name, count in (("thought", thoughts), ("token", words)))
    return body, (thought, said, arguments)


KINDS = {
    "words": kind(words=TOKENS),
    "tools on offer": kind(words=TOKENS, offered=True),
    "thoughts, words": kind(TOKENS // 2, TOKENS // 2),
    "words, a call": kind(words=TOKENS // 2, numbers=TOKENS // 2),
    "thoughts, a call": kind(TOKENS // 2, 0, TOKENS // 2),
}


class Hosts:
    """Three scripted servers on ports of their own; one after the other is killed and comes back at once."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.running: list[tuple[contextlib.ExitStack, Rehearsal]] = [self._start(0) for _ in range(3)]
        self.kills = 0

    def _start(self, port: int) -> tuple[contextlib.ExitStack, Rehearsal]:
        own = contextlib.ExitStack()
        host = own.enter_context(rehearsal(port, "--speaks"))
        self._stack.callback(own.close)
        return own, host

    def kill(self, index: int) -> None:
        own, host = self.running[index]
        host.process.send_signal(signal.SIGKILL)
        host.process.wait()
        own.close()
        self.kills += 1
        self.running[index] = self._start(int(host.url.rsplit(":", 1)[1]))


def added(chunks: list[dict[str, Any]]) -> Said:
    deltas = [choice["delta"] for chunk in chunks for choice in chunk.get("choices", ())]
    calls = [call for delta in deltas for call in delta.get("tool_calls") or ()]
    assert all(call["index"] == 0 for call in calls), calls
    assert sum(bool(call.get("id")) for call in calls) == bool(calls), "a call begins once"
    thoughts, words = ("".join(delta.get(name) or "" for delta in deltas) for name in ("reasoning_content", "content"))
    return thoughts, words, "".join(call["function"].get("arguments") or "" for call in calls)


async def one(port: int, body: dict[str, Any], expected: Said) -> str:
    """One stream of a thin client, and what became of it."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(raw.request("POST", CHAT, json.dumps(body).encode()))
        got = await reader.read()
        writer.close()
    except OSError as error:
        return f"lost: {type(error).__name__}"
    head, _, chunked = got.partition(b"\r\n\r\n")
    answer = raw.unchunk(chunked) if b"chunked" in head else chunked
    if not head.startswith(b"HTTP/1.1 200"):
        return f"refused: {head[:12].decode()}"
    said = added([json.loads(event[6:]) for event in answer.split(b"\n\n") if event.startswith(b"data: {")])
    if b'data: {"error"' in answer:
        right = b"[DONE]" not in answer and all(whole.startswith(part) for part, whole in zip(said, expected, strict=True))
        return "told of an error" if right else "told, and wrong"
    if not answer.endswith(b"data: [DONE]\n\n"):
        return "silently cut"
    if said != expected:
        return "whole, and wrong"
    return "continued" if b": continued" in answer else "undisturbed"


async def by_sdk(base_url: str, body: dict[str, Any], expected: Said) -> str:
    """One stream of the SDK, put together by its own parser, and what became of it."""
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        more = {"extra_body": {"chat_template_kwargs": body["chat_template_kwargs"]}} if "chat_template_kwargs" in body else {}
        asked: Any = {name: value for name, value in body.items() if name not in ("stream", "chat_template_kwargs")} | more
        thoughts = ""
        try:
            async with client.chat.completions.stream(**asked) as stream:
                async for event in stream:
                    if event.type == "chunk":
                        for choice in event.chunk.choices:
                            thoughts += getattr(choice.delta, "reasoning_content", None) or ""
                message = (await stream.get_final_completion()).choices[0].message
        except openai.APIError as error:
            return f"sdk: {type(error).__name__}"
    said = thoughts, message.content or "", "".join(call.function.arguments for call in message.tool_calls or ())
    return "sdk: whole" if said == expected else "sdk: wrong"


async def storm(running: Gateway, hosts: Hosts, seconds: float) -> Counter[str]:
    """`STREAMS` streams at any time, a kill every two seconds."""
    found: Counter[str] = Counter()
    over = asyncio.Event()

    async def client(number: int) -> None:
        await asyncio.sleep(number * PACE_S * TOKENS / STREAMS)  # not all in step
        body, expected = list(KINDS.values())[number % len(KINDS)]
        while not over.is_set():
            if number % 20 < len(KINDS):  # a quarter, of every kind
                found[await by_sdk(running.base_url, body, expected)] += 1
            else:
                found[await one(running.port, body, expected)] += 1

    async def killer() -> None:
        for index in itertools.cycle(range(3)):
            await asyncio.sleep(KILL_EVERY_S)
            if over.is_set():
                return
            await asyncio.to_thread(hosts.kill, index)

    clients = [asyncio.create_task(client(number)) for number in range(STREAMS)]
    killing = asyncio.create_task(killer())
    await asyncio.sleep(seconds)
    over.set()
    await asyncio.gather(*clients, killing)
    return found


def run(folder: Path, mode: str, seconds: float) -> tuple[Counter[str], int]:
    with contextlib.ExitStack() as stack:
        hosts = Hosts(stack)
        config = hosts.running[0][1].backend()
        config["models"]["deepseek-v3"]["continuation"] = mode
        config["backends"]["dsv3"]["hosts"] = [{"url": host.url} for _, host in hosts.running]
        # Who is answered for as long as this is hit more often than the usual two times.
        config |= {"retry": {"max_continuations": 10}, "log": {"level": "error"}}
        running = stack.enter_context(gateway(folder, config))
        running.wait_ready()
        running.wait_all_hosts()
        found = asyncio.run(storm(running, hosts, seconds))
        print(f"\ncontinuation {mode}: {hosts.kills} kills in {seconds:.0f} s: {dict(found)}")
        return found, hosts.kills


def test_with_continuation_nobody_notices(tmp_path: Path) -> None:
    found, kills = run(tmp_path, "text", ON_S)
    assert kills >= ON_S / KILL_EVERY_S * 0.6
    assert found["continued"] > 100
    assert set(found) <= {"continued", "undisturbed", "sdk: whole"}, found


def test_without_it_nobody_is_deceived(tmp_path: Path) -> None:
    found, _ = run(tmp_path, "off", OFF_S)
    assert found["told of an error"] > 50
    assert set(found) <= {"undisturbed", "told of an error", "sdk: whole", "sdk: APIError"}, found
