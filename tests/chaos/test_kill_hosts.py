"""Hosts that are killed again and again under two hundred streams: with continuation nobody notices, without it nobody is deceived.

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
ON_S = float(os.environ.get("PENSTOCK_KILL_S", "60"))
OFF_S = 10.0
TEXT = "".join(f"token {number} " for number in range(TOKENS))
BODY = raw.chat(f"[[tokens {TOKENS}]] [[pace {PACE_S}]]", max_tokens=TOKENS, stream=True)


class Hosts:
    """Three scripted servers on ports of their own; one after the other is killed and comes back at once."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.running: list[tuple[contextlib.ExitStack, Rehearsal]] = [self._start(0) for _ in range(3)]
        self.kills = 0

    def _start(self, port: int) -> tuple[contextlib.ExitStack, Rehearsal]:
        own = contextlib.ExitStack()
        host = own.enter_context(rehearsal(port))
        self._stack.callback(own.close)
        return own, host

    def kill(self, index: int) -> None:
        own, host = self.running[index]
        host.process.send_signal(signal.SIGKILL)
        host.process.wait()
        own.close()
        self.kills += 1
        self.running[index] = self._start(int(host.url.rsplit(":", 1)[1]))


async def one(port: int) -> str:
    """One stream of a thin client, and what became of it."""
    content = json.dumps(BODY).encode()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(raw.request("POST", CHAT, content))
        got = await reader.read()
        writer.close()
    except OSError as error:
        return f"lost: {type(error).__name__}"
    head, _, chunked = got.partition(b"\r\n\r\n")
    body = raw.unchunk(chunked) if b"chunked" in head else chunked
    if not head.startswith(b"HTTP/1.1 200"):
        return f"refused: {head[:12].decode()}"
    chunks = [json.loads(event[6:]) for event in body.split(b"\n\n") if event.startswith(b"data: {")]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk.get("choices", ()))
    if b'data: {"error"' in body:
        return "told of an error" if b"[DONE]" not in body and TEXT.startswith(text) else "told, and wrong"
    if not body.endswith(b"data: [DONE]\n\n"):
        return "silently cut"
    if text != TEXT:
        return "whole, and wrong"
    return "continued" if b": continued" in body else "undisturbed"


async def by_sdk(base_url: str) -> str:
    """One stream of the SDK, and what became of it."""
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        try:
            body: Any = BODY
            text = ""
            async for chunk in await client.chat.completions.create(**body):
                text += chunk.choices[0].delta.content or ""
        except openai.APIError as error:
            return f"sdk: {type(error).__name__}"
    return "sdk: whole" if text == TEXT else "sdk: silently cut"


async def storm(running: Gateway, hosts: Hosts, seconds: float) -> Counter[str]:
    """`STREAMS` streams at any time, a kill every two seconds."""
    found: Counter[str] = Counter()
    over = asyncio.Event()

    async def client(number: int) -> None:
        await asyncio.sleep(number * PACE_S * TOKENS / STREAMS)  # not all in step
        while not over.is_set():
            found[await (by_sdk(running.base_url) if number % 50 == 0 else one(running.port))] += 1

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
