"""The backend contract as tests: what the core relies on, whatever stands behind it. Needs pytest, which the gateway itself does not.

A third party subclasses `BackendConformance` in a test file of its own:

    class TestMine(BackendConformance):
        kind = "mine"
        provoke = {"busy": "...", "client": "...", "sick": "...", "cut": "..."}

        @pytest.fixture
        def section(self):
            return {"hosts": ["http://127.0.0.1:9000"]}     # as under `backends.NAME`, without `kind`

`provoke` holds prompts that make the engine behind it refuse as busy, refuse as the client's fault, fail, and break off after some events.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from gateway import config
from gateway.errors import ConfigError, NotServed
from gateway.plugin import AttemptFailed, Backend, BackendEnv, Call, Endpoint, Plugin, Reply, Terms, Usage, Verdict
from gateway.serving import calls, registry

Work = Callable[[Backend, str], Awaitable[None]]
TERMS = Terms()


def chat(prompt: str, **more: Any) -> Call:
    """A chat completion as the core would hand it over."""
    body = {"model": "m", "messages": [{"role": "user", "content": prompt}], **more}
    return calls.parse(Endpoint.CHAT, json.dumps(body).encode())


async def begun(backend: Backend, target: str, call: Call, terms: Terms = TERMS) -> Reply:
    """A reply that has begun."""
    reply = backend.send(target, call, terms, {})
    try:
        await reply.begin()
    except BaseException:
        reply.close()
        raise
    return reply


async def drain(reply: Reply) -> bytes:
    """All of a stream."""
    assert reply.streams
    blocks = []
    try:
        while block := await reply.next():
            blocks.append(block)
    finally:
        reply.close()
    return b"".join(blocks)


class BackendConformance:
    """Every promise of `gateway.plugin`, tried on one backend."""

    kind: ClassVar[str]
    provoke: ClassVar[Mapping[str, str]]

    @pytest.fixture
    def section(self) -> dict[str, Any]:
        """The backend's configuration."""
        raise NotImplementedError("a subclass gives the configuration")

    @property
    def plugin(self) -> Plugin:
        """The plugin, found as the gateway finds it."""
        return registry.plugins()[self.kind]

    def drive(self, section: dict[str, Any], work: Work) -> None:
        """Run `work(backend, target)` within a backend's life."""

        @asynccontextmanager
        async def life() -> AsyncIterator[Backend]:
            backend = self.plugin.build("b", config.convert(section, self.plugin.config, ""), BackendEnv(Path("/nonexistent")))
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

    def test_the_plugin_is_what_its_entry_point_says(self, section: dict[str, Any]) -> None:
        """A strict configuration; services and commands, if only none."""
        assert self.plugin.kind == self.kind
        assert issubclass(self.plugin.config, msgspec.Struct)
        with pytest.raises(ConfigError):
            config.convert({**section, "no_such_key": 1}, self.plugin.config, "")
        converted = config.convert(section, self.plugin.config, "")
        assert list(self.plugin.services("b", converted, BackendEnv(Path("/nonexistent")))) is not None
        assert list(self.plugin.commands()) is not None

    def test_it_may_be_closed_without_having_been_opened(self, section: dict[str, Any]) -> None:
        """`aclose` is always called, also after an `open` that failed."""
        backend = self.plugin.build("b", config.convert(section, self.plugin.config, ""), BackendEnv(Path("/nonexistent")))
        asyncio.run(backend.aclose())

    def test_endpoints_targets_and_probe(self, section: dict[str, Any]) -> None:
        """Chat is served; targets are distinct and ready; a probe and a check find nothing wrong."""

        async def work(backend: Backend, target: str) -> None:
            assert Endpoint.CHAT in backend.endpoints()
            assert all(found.ready and found.weight > 0 for found in backend.targets())
            assert len({found.id for found in backend.targets()}) == len(backend.targets())
            assert await backend.probe(target) is True
            assert await backend.verify(target)
            assert await backend.check() == []

        self.drive(section, work)

    def test_an_answer_that_nobody_keeps_is_not_found(self, section: dict[str, Any]) -> None:
        """To who asks for it again, and to who would cancel it."""

        async def work(backend: Backend, target: str) -> None:
            for cancel in (False, True):
                with suppress(NotServed):
                    assert await backend.recall(f"resp_{'0' * 48}", "m", cancel) is None

        self.drive(section, work)

    def test_a_json_reply_is_whole_and_knows_its_usage(self, section: dict[str, Any]) -> None:
        """Under the public id and the client's model name; `close` may be called twice, and says what was used."""

        async def work(backend: Backend, target: str) -> None:
            call = chat("hello")
            reply = await begun(backend, target, call)
            assert (reply.status, reply.streams) == (200, False)
            answer = json.loads(reply.body)
            assert (answer["id"], answer["model"]) == (call.id, "m")
            usage = reply.close()
            assert usage is not None
            assert usage.completion_tokens > 0
            assert reply.close() == usage
            assert reply.late is None, "nothing was given up"

        self.drive(section, work)

    @pytest.mark.parametrize("n", [1, 3])
    def test_a_stream_is_whole_events_and_ends_in_done(self, section: dict[str, Any], n: int) -> None:
        """One finish a choice, one id, no usage that nobody asked for; after the end there is nothing."""

        async def work(backend: Backend, target: str) -> None:
            call = chat("hello there", stream=True, n=n)
            reply = await begun(backend, target, call)
            text = b""
            while block := await reply.next():
                assert block.startswith(b"data: ")
                assert block.endswith(b"\n\n")
                text += block
            assert await reply.next() == b""
            assert reply.close() is not None
            assert text.endswith(b"data: [DONE]\n\n")
            chunks = [json.loads(line[6:]) for line in text.decode().split("\n\n")[:-2]]
            assert {chunk["id"] for chunk in chunks} == {call.id}
            assert sorted(c["index"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]) == list(range(n))
            assert not any("usage" in chunk and chunk["usage"] for chunk in chunks)

        self.drive(section, work)

    def test_usage_is_shown_to_who_asked(self, section: dict[str, Any]) -> None:
        """Once, just before the end."""

        async def work(backend: Backend, target: str) -> None:
            text = await drain(await begun(backend, target, chat("hi", stream=True, stream_options={"include_usage": True})))
            assert text.count(b'"choices":[],') == 1
            assert text.rindex(b'"usage":{') < text.rindex(b"data: [DONE]")

        self.drive(section, work)

    def test_many_at_once_do_not_meet(self, section: dict[str, Any]) -> None:
        """Each of eight concurrent calls gets its own answer."""

        async def work(backend: Backend, target: str) -> None:
            several = [chat("hello", stream=index % 2 == 0) for index in range(8)]
            replies = await asyncio.gather(*(begun(backend, target, call) for call in several))
            for call, reply in zip(several, replies, strict=True):
                assert call.id.encode() in (await drain(reply) if reply.streams else reply.body)
                reply.close()

        self.drive(section, work)

    @pytest.mark.parametrize("metered", [False, True])
    @pytest.mark.parametrize("stream", [False, True])
    def test_an_answer_may_be_given_up_in_every_phase(self, section: dict[str, Any], stream: bool, metered: bool) -> None:
        """Before it was sent, in every turn of the loop while it begins, and after the first event; the backend serves on."""

        async def work(backend: Backend, target: str) -> None:
            call, terms = chat("hello there you", stream=stream), Terms(metered=metered)
            replies = [backend.send(target, call, terms, {})]
            for turns in range(20):
                reply = backend.send(target, call, terms, {})
                attempt = asyncio.create_task(reply.begin())
                for _ in range(turns):
                    await asyncio.sleep(0)
                if turns % 2:  # either of the two may come first
                    reply.close()
                attempt.cancel()
                with suppress(asyncio.CancelledError, AttemptFailed):
                    await attempt
                replies.append(reply)
            reply = await begun(backend, target, call, terms)
            if stream:
                assert await reply.next()
            replies.append(reply)
            for reply in replies:
                usage = reply.close()
                assert reply.close() == usage
                assert metered or reply.late is None
                if reply.late is not None:
                    with suppress(asyncio.CancelledError):
                        assert isinstance(await reply.late, Usage | None)
            assert (await begun(backend, target, chat("hello"))).status == 200

        self.drive(section, work)

    def test_going_on_elsewhere_is_a_call_the_end_or_nothing(self, section: dict[str, Any]) -> None:
        """Of a JSON answer never; of what has finished only the end may be missing; a call is still the same call."""

        async def work(backend: Backend, target: str) -> None:
            assert not backend.resumable(chat("hello"))
            call = chat("hello there you", stream=True)
            terms = Terms(keep="text" if backend.resumable(call) else "")
            reply = await begun(backend, target, call, terms)
            delivered = await reply.next()
            reply.close()
            again = backend.resume(call, terms, reply, delivered)
            if not terms.keep:
                assert again is None
            elif isinstance(again, Call):
                assert (again.id, again.model, again.stream, again.endpoint) == (call.id, call.model, True, call.endpoint)
                second = await begun(backend, target, again, terms)
                rest = await drain(second)
                assert rest.endswith(b"data: [DONE]\n\n")
                assert b'"role"' not in rest
                ended = backend.resume(call, terms, second, delivered + rest[: rest.index(b"data: [DONE]")])
                assert isinstance(ended, Reply)
                await ended.begin()
                assert await drain(ended) == b"data: [DONE]\n\n"

        self.drive(section, work)

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(("word", "verdict"), [("busy", Verdict.BUSY), ("client", Verdict.CLIENT_FAULT), ("sick", Verdict.SICK)])
    def test_a_refusal_is_raised_and_classified(self, section: dict[str, Any], stream: bool, word: str, verdict: Verdict) -> None:
        """Busy is not broken, and a client's fault is nobody else's."""

        async def work(backend: Backend, target: str) -> None:
            with pytest.raises(AttemptFailed) as refused:
                await begun(backend, target, chat(self.provoke[word], stream=stream))
            assert refused.value.verdict is verdict
            assert (refused.value.error.status < 500) is (verdict is Verdict.CLIENT_FAULT)

        self.drive(section, work)

    def test_a_stream_that_breaks_says_so_and_does_not_end_in_done(self, section: dict[str, Any]) -> None:
        """After the first event a failure is raised by `next`."""

        async def work(backend: Backend, target: str) -> None:
            reply = await begun(backend, target, chat(self.provoke["cut"], stream=True))
            got = b""
            with pytest.raises(AttemptFailed):
                while block := await reply.next():
                    got += block
            reply.close()
            assert got
            assert b"[DONE]" not in got

        self.drive(section, work)
