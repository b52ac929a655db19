"""What the sentinel holds and looks at is bounded, whoever sends how much: docs/security.md names these."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from gateway import config, exchange
from gateway.config import Settings
from gateway.plugin import Endpoint, Reply
from gateway.processes import sentinel, webhook
from gateway.sentinel import reask, sample, schemas
from gateway.sentinel.judge import Verdict
from gateway.sentinel.rules import Found
from gateway.sentinel.sample import Sample
from gateway.sentinel.statistics import Alert, Share
from gateway.serving import relay
from gateway.serving.kept import Kept
from gateway.telemetry.metrics import UNJUDGED, Metrics
from tests.support.memory_net import Gateway, Loop
from tests.unit.test_budget import FINISH, STREAM_HEAD, TOKEN, chunk, request
from tests.unit.test_sentinel_rules import of, streamed


def an(id: str, answer: bytes = b"{}") -> Sample:
    return Sample(id, f"req-{id}", "dsv3", "host", "weights", Endpoint.CHAT, False, answer)


def parent(count: Metrics, settings: Settings | None = None) -> sentinel.Sentinel:
    chosen = settings if settings is not None else config.load(environment={}).settings
    return sentinel.Sentinel(lambda: chosen, count, lambda doubted: None)


def left_out(count: Metrics, why: str) -> float:
    return count.snapshot()[UNJUDGED.name].get(why, [0.0])[0]


def test_so_many_answers_wait_to_be_judged() -> None:
    count = Metrics()
    judging = parent(count)
    for number in range(sentinel.MAX_QUEUED + 10):
        judging.take(an(str(number)))
    assert left_out(count, "full") == 10


def test_and_so_many_bytes_of_them() -> None:
    count = Metrics()
    judging, half = parent(count), b"x" * (sentinel.MAX_QUEUED_BYTES // 2)
    for number in range(3):
        judging.take(an(str(number), half))
    assert left_out(count, "full") == 1


def test_so_many_bad_answers_are_remembered_and_fewer_kept() -> None:
    judging = parent(Metrics())
    for number in range(sentinel.MAX_REMEMBERED + 10):
        judging.heard(an(str(number)), Verdict(Found(["empty"], {"empty": "it says nothing"}, ["stop"]), 0.0), 1.0)
    assert judging.of("9") == {}
    assert judging.of("10") == {"empty": "it says nothing"}
    assert len(judging.shown()["examples"]) == config.load(environment={}).settings.sentinel.examples


def test_so_many_alerts_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    under_way = 0

    async def hang(settings: Any, body: bytes) -> str:
        nonlocal under_way
        under_way += 1
        await asyncio.sleep(3600)
        return ""

    async def look() -> None:
        alerts = {"webhook": "https://hooks.example.com/x", "secret_file": "/none"}
        settings = msgspec.structs.replace(config.load(environment={}).settings, alerts=msgspec.convert(alerts, config.Alerts))
        judging = parent(Metrics(), settings)
        alert = Alert(("dsv3", "w", "h"), "empty", Share(9, 10), Share(0, 10), 1e-9)
        for number in range(sentinel.MAX_SENDING + 20):
            judging._send(float(number), alert, "begun")
        await asyncio.sleep(0)
        await judging.aclose()

    monkeypatch.setattr(webhook, "post", hang)
    asyncio.run(look())
    assert under_way == sentinel.MAX_SENDING


def test_of_a_prompt_and_of_tools_so_much_is_looked_at() -> None:
    tools = [{"type": "function", "function": {"name": "do", "description": "x" * sample.MAX_TOOLS_BYTES}}]
    found = of(
        {"messages": [{"role": "user", "content": "y" * (2 * sample.MAX_PROMPT_BYTES)}], "tools": tools}, streamed(""), True, prompts=True
    )
    assert isinstance(found, Sample)
    assert (found.offered, found.tools) == (True, b"")
    assert len(found.prompt) == sample.MAX_PROMPT_BYTES
    assert of({"messages": [{"role": "user", "content": "y" * sample.MAX_SAID_BYTES}]}, streamed(""), True) == "large"


def test_what_breaks_a_schema_is_said_shortly() -> None:
    schema = {"properties": {"x" * 1000: {"type": "string"}}}
    assert 0 < len(schemas.broken(schema, {"x" * 1000: 1})) <= schemas._MAX_ERROR


class Prelude(Reply):
    """Says nothing, for ever."""

    async def next(self) -> bytes:
        return b": nothing\n\n" * 1000


def test_a_stream_that_says_nothing_is_relayed_after_so_much_of_it() -> None:
    held, ended = asyncio.run(reask.prelude(Prelude()))
    assert not ended
    assert reask._MAX_PRELUDE < len(held) < 2 * reask._MAX_PRELUDE


def sampled() -> list[int]:
    """Of streams of a hundred events, none of which could go on elsewhere, how many bytes were kept when each had ended."""
    loop, seen = Loop(), list[int]()
    backend = {"kind": "sglang_dsv3", "hosts": [{"url": "http://10.0.0.1:30000"}]}
    served = Gateway(loop, {"models": {"deepseek-v3": {"backend": "dsv3", "continuation": "off"}}, "backends": {"dsv3": backend}})
    served._app.observer.judge = lambda record: seen.append(record.answer.size if isinstance(record.answer, Kept) else 0)
    loop.answer = lambda sent: [STREAM_HEAD, *[TOKEN] * 100, FINISH + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"]
    try:
        served.exchange(request(stream=True), b"0\r\n\r\n")
    finally:
        served.close()
    return seen


@pytest.mark.pure
def test_of_a_stream_that_is_only_looked_at_so_much_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    (size,) = sampled()
    assert size > 5000
    monkeypatch.setattr(relay, "MAX_HELD_BYTES", 5000)
    assert sampled() == [0]


def test_and_so_many_of_them_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "MAX_HELD", 0)
    assert sampled() == []
