"""The backend: hosts that run SGLang, one attempt at a time, and nothing left generating for a client that is gone."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from backends.sglang_dsv3 import breaking, exact, resume, stream, translate
from backends.sglang_dsv3.config import Config
from backends.sglang_dsv3.place import ModelInfo, Place, small
from backends.sglang_dsv3.resolve import Resolver
from backends.sglang_dsv3.transport import ConnectFailed, ConnectionLost, Options, Response
from gateway.errors import BadGateway, Unavailable
from gateway.plugin import AttemptFailed, BackendEnv, Call, Endpoint, Reply, Target, Usage, Verdict

T = TypeVar("T")

# SGLang gives a generation 20 s to prove it alive (SGLANG_HEALTH_CHECK_TIMEOUT) before it answers 503.
VERIFY_TIMEOUT_S = 25.0
MAX_JSON_BYTES = 64 << 20
# A request may be unknown to the engine for a moment after it was sent, and an abort of an unknown id does nothing: it is repeated.
ABORT_AT_S = (0.0, 0.1, 0.3, 0.8)
# With n > 1 the engine makes up the ids that an abort needs; they are read from the stream for at most so long.
LEARN_IDS_S = 60.0
# After an abort the engine says what the answer came to; it is waited for so long.
LAST_USAGE_S = 1.0


class SGLangReply(Reply):
    """A reply whose closing stops the generation."""

    def __init__(self, backend: SGLang, place: Place, call: Call, source: stream.EventStream, response: Response) -> None:
        super().__init__(content_type=b"text/event-stream; charset=utf-8", events=source.events())
        self._backend, self._place, self._call, self._source, self._response = backend, place, call, source, response
        self._closed = False

    def close(self) -> None:
        """Hand the connection back when the answer is whole; else stop the engine in the background."""
        if self._closed:
            return
        self._closed = True
        self.usage, self.finishes = self._source.used(), self._source.reasons
        if not self._source.complete:
            self._backend.abandon(self._place, self._call, self._response, self._source)
        elif self._response.ended:
            self._response.close()
        else:
            self._backend.later(_finish(self._response))


def _key(file: str) -> str:
    """The engines' own key; read when the backend opens, so that no configuration ever holds it."""
    return Path(file).read_text(encoding="utf-8").strip()


def _reader(response: Response, place: Place) -> Callable[[], Awaitable[bytes]]:
    """Whatever bytes have come; the one border where a broken connection becomes a failed attempt."""

    async def read() -> bytes:
        try:
            return await response.read()
        except ConnectionLost as error:
            lost = BadGateway("The engine was lost in the middle of the answer.", detail=f"{place.id}: {error}")
            raise AttemptFailed("cut", lost) from error

    return read


async def _finish(response: Response) -> None:
    """Read the few closing bytes after `[DONE]`, so that the connection can be used again."""
    with contextlib.suppress(TimeoutError, ConnectionLost):
        async with asyncio.timeout(1.0):
            while await response.read():
                pass
    response.close()


def _beyond(before: Usage, after: Usage | None) -> Usage | None:
    """What an answer came to after it was given up: less than nothing where events had been taken for too many tokens."""
    if after is None:
        return None
    return Usage(after.prompt_tokens, after.completion_tokens - before.completion_tokens, estimated=after.estimated)


async def _post(place: Place, call: Call, path: str, payload: bytes) -> Response:
    return await place.transport().request("POST", path, payload, call.headers, call.connect_s)


class SGLang:
    """SGLang servers behind one configuration section."""

    def __init__(self, name: str, config: Config, env: BackendEnv) -> None:
        self._config = config
        fixed = [
            Place(name, index, host, env.services.get, config.canary) for index, host in enumerate(config.hosts) if host.resolve is None
        ]
        self._fixed = {place.id: place for place in fixed}
        self._places = dict(self._fixed)
        self._resolvers = [Resolver(host, config.dns_server) for host in config.hosts if host.resolve is not None]
        self._resolving: asyncio.Task[None] | None = None
        self._options = Options()
        self._tails: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        """Read the engines' key and the certificates; no host is contacted."""
        headers = {"content-type": "application/json"}
        if self._config.api_key_file is not None:
            headers["authorization"] = f"Bearer {_key(self._config.api_key_file)}"
        self._options = Options(headers, self._config.ca_file, self._config.proxy)
        for place in self._places.values():
            place.options = self._options
        if self._resolvers:
            self._resolving = asyncio.create_task(self._resolve_forever())

    async def _resolve_forever(self) -> None:
        while True:
            await asyncio.gather(*(resolver.ask() for resolver in self._resolvers))
            before, self._places = self._places, dict(self._fixed)
            for host in (host for resolver in self._resolvers for host in resolver.hosts):
                place = Place("", 0, host, lambda name: None, self._config.canary)
                known = before.pop(place.id, None)
                if known is None or known.host != host:
                    known, place.options = place, self._options
                self._places.setdefault(place.id, known)
            for gone in before.values():
                if gone.id not in self._places:
                    await gone.aclose()  # what is under way on it goes on
            await asyncio.sleep(self._config.dns_refresh_s)

    async def aclose(self) -> None:
        """Finish what was begun for clients that left (a second or so), then close every connection."""
        if self._tails:
            await asyncio.wait(self._tails, timeout=2.0)
        for tail in self._tails:
            tail.cancel()
        if self._resolving is not None:
            self._resolving.cancel()
            await asyncio.gather(self._resolving, return_exceptions=True)
        for place in self._places.values():
            await place.aclose()

    async def check(self) -> list[str]:
        """Hosts that cannot be reached or serve another architecture."""
        findings: list[str] = []
        for place in self._places.values():
            if not place.url:
                continue
            try:
                info = await self._model_info(place)
            except (ConnectFailed, ConnectionLost, TimeoutError, msgspec.DecodeError) as error:
                findings.append(f"{place.id} does not answer /model_info: {error or type(error).__name__}")
                continue
            if "DeepseekV3ForCausalLM" not in (info.architectures or []):
                findings.append(f"{place.id} serves {info.architectures}, not DeepseekV3ForCausalLM")
        return findings

    async def _model_info(self, place: Place) -> ModelInfo:
        status, content = await place.get("/model_info")
        if status != 200:
            raise ConnectionLost(f"status {status}")
        return msgspec.json.decode(content, type=ModelInfo)

    def endpoints(self) -> frozenset[Endpoint]:
        """As configured: what the hosts' model can do is the operator's knowledge."""
        return frozenset(self._config.endpoints)

    def targets(self) -> Sequence[Target]:
        """Every host, launched, named or resolved; a name that stands for nobody is one that is not ready."""
        found = [place.target() for place in self._places.values()]
        return found or [Target("unresolved", ready=False, reason=resolver.problem) for resolver in self._resolvers]

    async def probe(self, target: str) -> bool:
        """`GET /ready`: flags only, costs no token; 503 while starting or draining."""
        place = self._places.get(target)
        if place is None:
            return False
        try:
            up = await place.ready()
        except (ConnectFailed, ConnectionLost, TimeoutError, msgspec.DecodeError):
            place.lost()
            return False
        with contextlib.suppress(ConnectFailed, ConnectionLost, TimeoutError, msgspec.DecodeError):
            await place.look(self._model_info)
        return up

    async def verify(self, target: str) -> bool:
        """`GET /health_generate`: generates a token, and is the only question that a hung scheduler does not answer."""
        try:
            return (await self._places[target].get("/health_generate", VERIFY_TIMEOUT_S))[0] == 200
        except (ConnectFailed, ConnectionLost, TimeoutError):
            return False

    def resumable(self, call: Call) -> bool:
        """See `resume`."""
        return resume.resumable(call)

    def resume(self, call: Call, delivered: bytes, usage: Usage | None) -> Call | Reply | None:
        """Over its token ids where it was answered so, else with the delivered text as the beginning of the assistant's message."""
        progress = call.continues
        if isinstance(progress, exact.Progress):
            limit = resume.limit_of(call)
            if resume.read(delivered).finished or (limit is not None and len(progress.output_ids) >= limit):
                return resume.closing(call, delivered, Usage(len(progress.prompt_ids), len(progress.output_ids)))
            return call
        return resume.resume(call, delivered, usage)

    def classify(self, outcome: Reply | BaseException) -> Verdict:
        """As the attempt itself says; what it did not foresee is the host's fault."""
        if isinstance(outcome, Reply):
            return Verdict.OK
        return outcome.verdict if isinstance(outcome, AttemptFailed) else Verdict.SICK

    async def send(self, target: str, call: Call) -> Reply:
        """One attempt. Cancelling it stops the generation, in whatever phase it is."""
        place = self._places.get(target)
        if place is None:
            gone = Unavailable("The engine is gone.", code="engine_unavailable", retry_after_s=1, detail=target)
            raise AttemptFailed("connect", gone)
        translate.refuse_internal(call, self._config.allow_parameters)
        if not breaking.SUSPECTS.isdisjoint(call.fields):
            breaking.refuse(call)
        served_name = await self._served_name(place) if translate.needs_served_name(call) else None
        path, payload = call.endpoint.value, translate.engine_body(call, served_name)
        posting: asyncio.Task[Response] | None = None
        source: stream.EventStream | None = None
        response: Response | None = None
        try:
            if call.keep == "exact" and exact.takes(call):
                if call.continues is None:
                    call.continues = exact.Progress(await self._prompt_ids(place, call))
                path, payload = "/generate", exact.generate_body(call, call.continues)
            if call.choices > call.prompts if call.stream else call.metered:
                # The ids that an abort needs, or the usage of what was made, come with the answer: the request outlives its caller for a
                # moment.
                posting = asyncio.create_task(_post(place, call, path, payload))
                response = await asyncio.shield(posting)
            else:
                response = await _post(place, call, path, payload)
            if response.status != 200:
                content = await small(response)
                response.close()
                raise translate.failure(response.status, content, call.endpoint)
            if not call.stream:
                return await self._whole(response, call, served_name)
            if path == "/generate":
                source = exact.Generated(call, _reader(response, place), call.continues)
            else:
                source = stream.reader_of(call)(call, _reader(response, place), served_name)
            await source.begin()
            reply = SGLangReply(self, place, call, source, response)
            reply.connected_at = response.connected_at
            return reply
        except asyncio.CancelledError:
            if response is None and posting is not None:
                learn = self._learn_then_abort if call.stream else self._abort_then_learn
                self._tail(call, learn(place, call, posting))
            else:
                self.abandon(place, call, response, source)
            raise
        except AttemptFailed:
            if response is not None and source is not None:
                self.abandon(place, call, response, source)
            raise
        except ConnectFailed as error:
            unreachable = Unavailable(
                "The engine cannot be reached.", code="engine_unavailable", retry_after_s=5, detail=f"{place.id}: {error}"
            )
            raise AttemptFailed("connect", unreachable) from error
        except ConnectionLost as error:
            if response is not None:
                response.close()
            ended = BadGateway("The engine ended in the middle of the request.", detail=f"{place.id}: {error}")
            raise AttemptFailed("broken", ended) from error

    async def _prompt_ids(self, place: Place, call: Call) -> list[int]:
        """The prompt as the chat template and the tokenizer make it; raises AttemptFailed for what chat would refuse too."""
        response = await _post(place, call, "/tokenize", exact.tokenize_body(call))
        try:
            content = b""
            while part := await response.read():
                content += part
        finally:
            response.close()
        if response.status != 200:
            raise translate.failure(response.status, content, call.endpoint)
        try:
            return exact.prompt_ids(content)
        except msgspec.DecodeError as error:
            nonsense = BadGateway("The engine sent nonsense.", detail=f"{place.id}: /tokenize: {error}")
            raise AttemptFailed("broken", nonsense) from None

    async def _served_name(self, place: Place) -> str:
        """What the engine itself calls its model; asked once a host."""
        if place.served_name is None:
            try:
                place.served_name = (await self._model_info(place)).served_model_name or ""
            except (ConnectFailed, ConnectionLost, TimeoutError, msgspec.DecodeError) as error:
                unknown = BadGateway("The engine does not say what it serves.", detail=f"{place.id}: {error!r}")
                raise AttemptFailed("broken", unknown) from error
        return place.served_name

    async def _whole(self, response: Response, call: Call, served_name: str | None) -> Reply:
        parts: list[bytes] = []
        size = 0
        while part := await response.read():
            parts.append(part)
            size += len(part)
            if size > MAX_JSON_BYTES:
                response.close()
                raise AttemptFailed("broken", BadGateway("The engine's answer is too large."))
        response.close()
        whole, usage = stream.whole(b"".join(parts), call, served_name)
        reply = Reply(content_type=response.content_type.encode("latin-1"), body=whole, usage=usage)
        reply.connected_at, reply.finishes = response.connected_at, stream.reasons_of(whole)
        return reply

    def later(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a tail in the background; `aclose` waits for it."""
        task = asyncio.ensure_future(work)
        self._tails.add(task)
        task.add_done_callback(self._tails.discard)
        return task

    def _tail(self, call: Call, work: Coroutine[Any, Any, Usage | None]) -> None:
        """The same, and what it learns is told to whoever counts."""
        task = self.later(work)
        if call.metered:
            call.tails.append(task)

    def abandon(self, place: Place, call: Call, response: Response | None, source: stream.EventStream | None) -> None:
        """Nobody waits for this answer any more: close the connection and have the engine stop generating."""
        if source is not None and call.choices > call.prompts:
            assert response is not None
            self._tail(call, self._abort_all_choices(place, call, response, source))
            return
        if source is not None and response is not None and call.metered:
            self._tail(call, self._stop(place, call, response, source))
            return
        if response is not None:
            response.close()
        rids = translate.abort_ids(call)
        # Once its 200 has come the engine knows the id, and asking once is enough.
        self.later(self._abort(place, rids, ABORT_AT_S[:1] if source is not None else ABORT_AT_S))

    async def _stop(self, place: Place, call: Call, response: Response, source: stream.EventStream) -> Usage | None:
        """Abort, and hear what the answer came to beyond what is known."""
        self.later(self._abort(place, translate.abort_ids(call), ABORT_AT_S[:1]))
        before = source.used() or Usage()
        try:
            async with asyncio.timeout(LAST_USAGE_S):
                after = await source.rest()
        except (TimeoutError, AttemptFailed):
            after = source.used()
        finally:
            response.close()
        return _beyond(before, after)

    async def _abort_then_learn(self, place: Place, call: Call, posting: asyncio.Task[Response]) -> Usage | None:
        """The client of a JSON answer left: an aborted answer still says what it came to."""
        self.later(self._abort(place, translate.abort_ids(call), ABORT_AT_S))
        response: Response | None = None
        try:
            async with asyncio.timeout(LAST_USAGE_S + ABORT_AT_S[-1]):
                response = await posting
                content = b""
                while part := await response.read():
                    content += part
            return stream.usage_of(content)
        except (TimeoutError, ConnectFailed, ConnectionLost):
            return None
        finally:
            if response is not None:
                response.close()

    async def _abort(self, place: Place, rids: Sequence[str], at_s: Sequence[float]) -> None:
        started = time.monotonic()
        for moment in at_s:
            await asyncio.sleep(max(0.0, moment - (time.monotonic() - started)))
            for rid in rids:
                await self._abort_one(place, rid)

    async def _abort_one(self, place: Place, rid: str) -> None:
        with contextlib.suppress(ConnectFailed, ConnectionLost, TimeoutError):
            async with asyncio.timeout(1.0):
                response = await place.transport().request("POST", "/abort_request", msgspec.json.encode({"rid": rid}), connect_s=1.0)
                try:
                    await small(response)
                finally:
                    response.close()

    async def _learn_then_abort(self, place: Place, call: Call, posting: asyncio.Task[Response]) -> Usage | None:
        """The client left before the engine answered, and only the answer says which ids to abort."""
        try:
            async with asyncio.timeout(LEARN_IDS_S):
                response = await posting
        except (TimeoutError, ConnectFailed, ConnectionLost):
            return None
        return await self._abort_all_choices(place, call, response, stream.Chunks(call, _reader(response, place)))

    async def _abort_all_choices(self, place: Place, call: Call, response: Response, source: stream.EventStream) -> Usage | None:
        """Abort each choice as its id shows up in the stream: SGLang 0.5.23 does not stop n > 1 streams of clients that left."""
        aborted: set[str] = set()
        before = source.used() or Usage()
        try:
            async with asyncio.timeout(LEARN_IDS_S):
                for rid in source.ids:
                    await self._abort_one(place, rid)
                aborted |= source.ids
                async for _ in source.events():
                    for rid in source.ids - aborted:
                        await self._abort_one(place, rid)
                    aborted |= source.ids
                    if len(aborted) >= call.choices:
                        break
            if call.metered:
                async with asyncio.timeout(LAST_USAGE_S):
                    await source.rest()
        except (TimeoutError, AttemptFailed):
            pass
        finally:
            response.close()
        return _beyond(before, source.used())
