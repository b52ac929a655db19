"""One attempt at one host: a request and its answer, and nothing left generating for a client that is gone."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import NamedTuple

import msgspec

from backends.sglang_dsv3 import answer, breaking, failures, stream, translate
from backends.sglang_dsv3.abandon import MAX_JSON_BYTES, Abandoned
from backends.sglang_dsv3.continuation import exact, joint, placing
from backends.sglang_dsv3.host import EngineHost, small
from backends.sglang_dsv3.ranks import HEADER
from backends.sglang_dsv3.shapes import Continuation, Parsers
from backends.sglang_dsv3.stream import EventStream
from backends.sglang_dsv3.transport import ConnectFailed, ConnectionLost, Response, Unanswered, request
from gateway.errors import BadGateway, Unavailable
from gateway.plugin import AttemptFailed, Call, Reply, Role, Terms, Usage, Verdict


class Asked(NamedTuple):
    """What an engine is asked."""

    path: str
    payload: bytes
    served_name: str | None
    progress: exact.Progress | None


class SGLangReply(Reply):
    """See `gateway.plugin.Reply`."""

    def __init__(
        self,
        host: EngineHost,
        call: Call,
        terms: Terms,
        trace: Mapping[str, str],
        abandoned: Abandoned,
        allowed: Container[str],
        connect_s: float,
        order: str | None = None,
    ) -> None:
        self._host = host
        self._call = call
        self._terms = terms
        self._trace = trace
        self._abandoned = abandoned
        self._allowed = allowed
        self._connect_s = connect_s
        # Which priorities go first in the engine's queue, where it has any.
        self._order = order
        self._response: Response | None = None
        self._source: EventStream | None = None
        # What was read of a JSON answer.
        self._begun: bytes | bytearray = b""
        # Whether the engine may be at work for this attempt.
        self._working = False
        self._closed = False
        # How its engine reads the model's text.
        self.parsers = host.parsers
        # The data-parallel rank that it is sent to, where that is ours to say.
        self.rank: int | None = None
        # The first block, which was there when the answer began.
        self._first = b""
        # Where an answer over token ids stands; None of any other.
        self.progress: exact.Progress | None = None
        # Of a pair (see `pair`): what its body says of it, and who is told what was asked; or what the other half has asked.
        self.bound = b""
        self.asking: Callable[[Asked], None] | None = None
        self.asked: Asked | None = None

    async def begin(self) -> None:
        """See `Reply`. Whatever goes wrong here, nothing is left open or generating."""
        try:
            await self._ask()
        except ConnectFailed as error:
            self._working = False
            self.close()
            unreachable = Unavailable(
                "The engine cannot be reached.", code="engine_unavailable", retry_after_s=5, detail=f"{self._host.id}: {error}"
            )
            raise AttemptFailed("connect", unreachable) from error
        except ConnectionLost as error:
            self._working = False
            self.close()
            ended = BadGateway("The engine ended in the middle of the request.", detail=f"{self._host.id}: {error}")
            raise AttemptFailed("broken", ended) from error
        except BaseException:
            self.close()
            raise

    async def _ask(self) -> None:
        call, terms = self._call, self._terms
        if self.asked is not None:
            path, payload, served_name, self.progress = self.asked
        else:
            translate.refuse_internal(call, self._allowed)
            if terms.metered and "background" in call.fields:
                translate.refuse_background(call)
            if not breaking.SUSPECTS.isdisjoint(call.fields):
                breaking.refuse(call)
            served_name = await self._host.served_name() if translate.needs_served_name(call) else None
            parsers = self._host.parsers
            if call.continues is not None:
                call = await self._going_on(call)
            elif terms.keep == "exact" and exact.takes(call, terms, parsers):
                self.progress = await self._exactly(call, parsers)
            if "routed_dp_rank" not in call.fields and not self.bound:
                self.rank = self._host.ranks.take(terms.affinity)
            if self.progress is not None:
                path, payload = "/generate", exact.generate_body(call, terms, self.progress, self.rank, self._order)
            else:
                path, payload = str(call.endpoint), translate.engine_body(call, terms, served_name, self._allowed, self._order)
            if self.asking is not None:
                payload = payload[:-1] + self.bound
                self.asking(Asked(path, payload, served_name, self.progress))
        response = await self._send(path, payload)
        self._working = True
        try:
            await response.head()
        except Unanswered as error:
            response = await self._anew(path, payload, error)
        if response.status != 200:
            self._working = False
            raise failures.failure(response.status, await small(response), call)
        if not call.stream:
            await self._read_whole(response, served_name)
            return
        if self.progress is not None:
            self._source = exact.Generated(call, terms, self.progress)
        elif self._call.continues is not None and placing.amid_a_call(self._call):
            self._source = joint.Joint(self._call, terms, served_name)
        else:
            self._source = stream.stream_of(self._call, terms, served_name)
        self.streams = True
        self.content_type = b"text/event-stream; charset=utf-8"
        self._first = await self.next()

    async def _send(self, path: str, payload: bytes, fresh: bool = False) -> Response:
        headers = self._trace if self.rank is None else {**self._trace, HEADER: str(self.rank)}
        response = self._response = await self._host.transport().send("POST", path, payload, headers, self._connect_s, fresh)
        self.connected_at = response.connected_at
        return response

    async def _anew(self, path: str, payload: bytes, lost: Unanswered) -> Response:
        """The same on a fresh connection, once: the first one had been closed. Where there is no other to be had the first loss is the
        failure: nobody can say then that nothing was done."""
        assert self._response is not None
        self._working = False
        self._release(self._response)
        try:
            response = await self._send(path, payload, fresh=True)
            self._working = True
            await response.head()
        except ConnectFailed:
            raise lost from None
        return response

    async def _asks(self, path: str, asked: bytes) -> bytes:
        """One more question to the host; raises AttemptFailed for what chat would refuse too."""
        response = await request(self._host.transport(), "POST", path, asked, self._trace, self._connect_s)
        try:
            content = bytearray()
            while part := await response.read():
                content += part
                if len(content) > MAX_JSON_BYTES:
                    raise AttemptFailed("broken", BadGateway("The engine's answer is too large."))
        finally:
            response.close()
        if response.status != 200:
            raise failures.failure(response.status, bytes(content), self._call)
        return bytes(content)

    async def _openings(self) -> list[list[int]]:
        host = self._host
        if host.openings is None:
            host.openings = await placing.openings(self._asks)
        return host.openings

    async def _exactly(self, call: Call, parsers: Parsers) -> exact.Progress:
        """The prompt as the chat template and the tokenizer make it."""
        try:
            ids = placing.prompt_ids(await self._asks("/tokenize", placing.tokenize_body(call)))
            thinking = bool(parsers.reasoning) and placing.opens(ids, await self._openings())
        except msgspec.DecodeError as error:
            raise self._nonsense("/tokenize", error) from None
        return exact.Progress(ids, exact.splitter(call, parsers, thinking))

    async def _going_on(self, call: Call) -> Call:
        """A call that goes on, in this host's words."""
        continues = call.continues
        if isinstance(continues, exact.Progress):
            self.progress = continues.copy()
            return call
        assert isinstance(continues, Continuation)
        if continues.parsers is None:
            return call
        if self._host.parsers != continues.parsers:
            other = Unavailable("The engine reads its model's text in another way.", code="engine_unavailable", detail=self._host.id)
            raise AttemptFailed("refused", other, Verdict.OK)
        try:
            return await placing.placed(call, self._asks, self._openings)
        except msgspec.DecodeError as error:
            raise self._nonsense("/tokenize", error) from None

    def _nonsense(self, path: str, error: Exception) -> AttemptFailed:
        return AttemptFailed("broken", BadGateway("The engine sent nonsense.", detail=f"{self._host.id}: {path}: {error}"))

    async def _answer(self, source: EventStream) -> bytes:
        """What the client lacks, once the engine has read the calls in its model's text."""
        try:
            return source.answered(await self._asks("/parse_function_call", source.asks))
        except (ConnectFailed, ConnectionLost) as error:
            lost = BadGateway("The engine was lost in the middle of the answer.", detail=f"{self._host.id}: {error}")
            raise AttemptFailed("cut", lost) from error
        except msgspec.DecodeError as error:
            raise self._nonsense("/parse_function_call", error) from None

    async def _read_whole(self, response: Response, served_name: str | None) -> None:
        content = await self._content(response)
        self._working = False
        self._release(response)
        self.body, self.usage, self.finishes = answer.whole(content, self._call, served_name)

    def _release(self, response: Response) -> None:
        """Hand the connection back; from here on it may be another request's."""
        self._response = None
        response.close()

    async def _content(self, response: Response) -> bytes:
        content: bytes | bytearray = await response.read()
        self._begun = content
        while part := await response.read():
            if isinstance(content, bytes):
                content = self._begun = bytearray(content)
            content += part
            if len(content) > MAX_JSON_BYTES:
                raise AttemptFailed("broken", BadGateway("The engine's answer is too large."))
        return bytes(content)

    async def next(self) -> bytes:
        """See `Reply`."""
        block = self._first
        if block:
            self._first = b""
            return block
        source, response = self._source, self._response
        assert source is not None, "it has not begun"
        assert response is not None, "it is closed"
        while True:
            if source.failure is not None:
                raise source.failure
            if source.asks:
                block = await self._answer(source)
                if block:
                    return block
                continue
            if source.complete:
                return b""
            try:
                data = await response.read()
            except ConnectionLost as error:
                lost = BadGateway("The engine was lost in the middle of the answer.", detail=f"{self._host.id}: {error}")
                raise AttemptFailed("cut", lost) from error
            block = source.feed(data) if data else source.end()
            if block:
                return block

    def close(self) -> Usage | None:
        """See `Reply`."""
        if self._closed:
            return self.usage
        self._closed = True
        if self.rank is not None:
            self._host.ranks.give_back(self.rank)
        source, response, self._response = self._source, self._response, None
        if source is not None:
            self.usage, self.finishes = source.used(), source.reasons
        if response is None:
            return self.usage
        if source is not None and source.complete:
            response.finish()
        elif self._working:
            self.late = self._abandoned.stop(self._host, self._call, self._terms, response, source, bytes(self._begun))
        else:
            response.close()
        return self.usage


class Nowhere(Reply):
    """An attempt at a target that is gone."""

    def __init__(self, target: str, role: Role = "") -> None:
        self._target = target
        self._role = role

    async def begin(self) -> None:
        """Raises AttemptFailed."""
        gone = Unavailable("The engine is gone.", code="engine_unavailable", retry_after_s=1, detail=self._target)
        raise AttemptFailed("connect", gone, role=self._role)
