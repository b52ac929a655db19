"""The real engine with priorities: in SGLang's own queue the class of a request's key decides, and no word of its client's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from gateway.access.keys import hashed
from tests.support.engine import loads, sglang
from tests.support.processes import Gateway, command, gateway

MODEL = "deepseek-v3-tiny"
KEYS = [{"name": name, "hash": hashed(name), "priority": priority} for name, priority in (("first", 0), ("middle", 4), ("last", 9))]


@pytest.fixture(scope="module", params=["higher_first", "lower_first"])
def served_by_class(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """An engine that works on one request at a time, to which the gateway sends all it gets."""
    engine = {"priority_scheduling": request.param, "max_running_requests": 1, "max_total_tokens": 16384}
    host = {"launch": "local", "max_in_flight": 32}
    backend = {"kind": "sglang_dsv3", "hosts": [host], "engine": engine, "allow_parameters": ["priority"]}
    config = {"models": {MODEL: {"backend": "dsv3"}}, "backends": {"dsv3": backend}, "keys": KEYS}
    with gateway(tmp_path_factory.mktemp("classes"), config) as running:
        running.wait_ready(300)
        yield running


async def order(to: Gateway, asked: list[tuple[str, dict[str, Any]]]) -> list[int]:
    """In which order requests begin that were sent one after the other, while the engine was at work on another."""
    begun: list[int] = []
    clients = {key["name"]: openai.AsyncOpenAI(base_url=to.base_url, api_key=str(key["name"]), max_retries=0) for key in KEYS}

    async def ask(number: int, key: str, more: dict[str, Any]) -> None:
        stream = await clients[key].chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": f"Story {number}"}], max_tokens=4, stream=True, extra_body=more
        )
        begun.append(number)
        async for _ in stream:
            pass

    occupant = await clients["middle"].chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Long"}], max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    )
    tasks = []
    for number, (key, more) in enumerate(asked):
        tasks.append(asyncio.create_task(ask(number, key, more)))
        async with asyncio.timeout(60):
            while int((await asyncio.to_thread(loads, to))["num_waiting_reqs"]) <= number:
                await asyncio.sleep(0.05)
    await occupant.close()
    await asyncio.gather(*tasks)
    for client in clients.values():
        await client.close()
    return begun


def test_the_engines_queue_goes_by_class(served_by_class: Gateway) -> None:
    assert "--enable-priority-scheduling" in command(sglang(served_by_class))
    sent: list[tuple[str, dict[str, Any]]] = [("last", {}), ("last", {}), ("middle", {}), ("first", {}), ("first", {})]
    assert asyncio.run(order(served_by_class, sent)) == [3, 4, 2, 0, 1]


def test_a_client_may_put_itself_behind_and_never_before(served_by_class: Gateway) -> None:
    higher = "--schedule-low-priority-values-first" not in command(sglang(served_by_class))
    best, worst = (10**6, -(10**6)) if higher else (-(10**6), 10**6)
    sent: list[tuple[str, dict[str, Any]]] = [("first", {"priority": worst}), ("middle", {}), ("last", {"priority": best}), ("first", {})]
    assert asyncio.run(order(served_by_class, sent)) == [3, 1, 0, 2]
