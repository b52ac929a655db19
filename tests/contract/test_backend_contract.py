"""The backend contract, held by both backends: what the core relies on, whatever stands behind it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway import calls, config, registry
from gateway.plugin import AttemptFailed, Backend, BackendEnv, Call, Endpoint, Reply, Verdict
from tests.support.processes import Rehearsal

pytestmark = pytest.mark.wire

# For each backend, how its own script language says: refuse as busy, refuse as the client's fault, break after some events.
COMMANDS = {
    "scripted": {"busy": "[[fail busy]]", "client": "[[fail client]]", "sick": "[[fail sick]]", "cut": "[[cut 1]] a b"},
    "sglang_dsv3": {"busy": "[[refuse 503]]", "client": "[[refuse 400]]", "sick": "[[refuse 500]]", "cut": "[[die 2]]"},
}


@pytest.fixture(params=sorted(COMMANDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def section(kind: str, scripted_sglang: Rehearsal) -> dict[str, Any]:
    return {"targets": 2} if kind == "scripted" else {"hosts": [{"url": scripted_sglang.url}]}


def chat(prompt: str, **more: Any) -> Call:
    return calls.parse(Endpoint.CHAT, json.dumps({"model": "m", "messages": [{"role": "user", "content": prompt}], **more}).encode())


def drive(kind: str, section: dict[str, Any], work: Callable[[Backend, str], Awaitable[None]]) -> None:
    """Run `work(backend, target)` within the backend's life."""

    @asynccontextmanager
    async def life() -> AsyncIterator[Backend]:
        plugin = registry.plugins()[kind]
        backend = plugin.build("b", config.convert(section, plugin.Config, ""), BackendEnv(Path("/nonexistent")))
        try:
            await backend.open()
            yield backend
        finally:
            await backend.aclose()

    async def run() -> None:
        async with life() as backend:
            assert isinstance(backend, Backend)
            await work(backend, backend.targets()[0].id)

    asyncio.run(run())


async def drain(reply: Reply) -> bytes:
    assert reply.events is not None
    try:
        return b"".join([block async for block in reply.events])
    finally:
        reply.close()


def test_a_json_reply_is_whole_and_knows_its_usage(kind: str, section: dict[str, Any]) -> None:
    async def work(backend: Backend, target: str) -> None:
        call = chat("hello")
        reply = await backend.send(target, call)
        assert (reply.status, reply.events) == (200, None)
        answer = json.loads(reply.body)
        assert answer["id"] == call.id
        assert answer["model"] == "m"
        assert reply.usage is not None
        assert reply.usage.completion_tokens > 0
        assert backend.classify(reply) is Verdict.OK
        reply.close()
        reply.close()  # idempotent

    drive(kind, section, work)


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_is_whole_events_and_ends_in_done(kind: str, section: dict[str, Any], n: int) -> None:
    async def work(backend: Backend, target: str) -> None:
        call = chat("hello there", stream=True, n=n)
        reply = await backend.send(target, call)
        assert reply.events is not None
        text = b""
        async for block in reply.events:
            assert block.startswith(b"data: ")
            assert block.endswith(b"\n\n")
            text += block
        reply.close()
        assert text.endswith(b"data: [DONE]\n\n")
        chunks = [json.loads(line[6:]) for line in text.decode().split("\n\n")[:-2]]
        assert {chunk["id"] for chunk in chunks} == {call.id}
        assert sorted(c["index"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]) == list(range(n))
        assert not any("usage" in chunk and chunk["usage"] for chunk in chunks), "nobody asked for usage"
        assert reply.usage is not None

    drive(kind, section, work)


def test_usage_is_shown_to_who_asked(kind: str, section: dict[str, Any]) -> None:
    async def work(backend: Backend, target: str) -> None:
        text = await drain(await backend.send(target, chat("hi", stream=True, stream_options={"include_usage": True})))
        assert text.count(b'"choices":[],') == 1
        assert text.rindex(b'"usage":{') < text.rindex(b"data: [DONE]")

    drive(kind, section, work)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("word", "verdict"), [("busy", Verdict.BUSY), ("client", Verdict.CLIENT_FAULT), ("sick", Verdict.SICK)])
def test_a_refusal_is_raised_and_classified(kind: str, section: dict[str, Any], stream: bool, word: str, verdict: Verdict) -> None:
    async def work(backend: Backend, target: str) -> None:
        with pytest.raises(AttemptFailed) as refused:
            await backend.send(target, chat(COMMANDS[kind][word], stream=stream))
        assert backend.classify(refused.value) is verdict
        assert backend.classify(RuntimeError()) is Verdict.SICK

    drive(kind, section, work)


def test_a_stream_that_breaks_says_so_and_does_not_end_in_done(kind: str, section: dict[str, Any]) -> None:
    async def work(backend: Backend, target: str) -> None:
        reply = await backend.send(target, chat(COMMANDS[kind]["cut"], stream=True))
        assert reply.events is not None
        got = b""
        with pytest.raises(AttemptFailed):
            async for block in reply.events:
                got += block
        reply.close()
        assert got
        assert b"[DONE]" not in got

    drive(kind, section, work)


def test_targets_and_probe(kind: str, section: dict[str, Any]) -> None:
    async def work(backend: Backend, target: str) -> None:
        assert all(found.ready and found.weight > 0 for found in backend.targets())
        assert len({found.id for found in backend.targets()}) == len(backend.targets())
        assert await backend.probe(target)
        assert await backend.check() == []

    drive(kind, section, work)


def test_open_succeeds_and_send_fails_honestly_with_every_host_down() -> None:
    async def work(backend: Backend, target: str) -> None:
        assert not await backend.probe(target)
        assert "does not answer" in (await backend.check())[0]
        with pytest.raises(AttemptFailed) as failed:
            await backend.send(target, chat("hi"))
        assert (failed.value.cause, failed.value.error.status) == ("connect", 503)

    drive("sglang_dsv3", {"hosts": [{"url": "http://127.0.0.1:9"}]}, work)
