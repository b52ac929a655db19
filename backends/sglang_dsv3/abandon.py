"""The stopping of generations that nobody waits for any more, and hearing from the engine what they came to.

SGLang stops what it is asked to abort by its id, and what it answers on a connection that closes; of several choices (n > 1) it stops
neither, unless each is aborted by an id of the engine's own making, which comes with the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import msgspec

from backends.sglang_dsv3 import answer, stream, translate
from backends.sglang_dsv3.host import EngineHost, small
from backends.sglang_dsv3.stream import EventStream
from backends.sglang_dsv3.transport import ConnectFailed, ConnectionLost, Response, request
from gateway.plugin import Call, Terms, Usage
from gateway.supervision import Failed, once

T = TypeVar("T")
Late = asyncio.Future[Usage | None]

# A request may be unknown to the engine for a moment after it was sent, and an abort of an unknown id does nothing: it is repeated.
ABORT_AT_S = (0.0, 0.1, 0.3, 0.8)
# With n > 1 the engine makes up the ids that an abort needs; they are read from the stream for at most so long.
LEARN_IDS_S = 60.0
# After an abort the engine says what the answer came to; it is waited for so long.
LAST_USAGE_S = 1.0
# An aborted JSON answer larger than this is not read for its usage.
MAX_JSON_BYTES = 64 << 20


class Abandoned:
    """Everything that goes on in the background after a reply was closed."""

    def __init__(self, failed: Failed) -> None:
        self._failed = failed
        self._tasks: set[asyncio.Task[Any]] = set()

    async def aclose(self) -> None:
        """Wait a moment for what was begun, then let go of it."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2.0)
        for task in self._tasks:
            task.cancel()

    def stop(self, host: EngineHost, call: Call, terms: Terms, response: Response, source: EventStream | None, begun: bytes) -> Late | None:
        """Stop what is generated for a request that was sent, in whatever phase it is: without `source` its answer has not begun, and of a
        JSON answer `begun` was read. What it came to beyond what is known, where somebody counts and the engine will tell."""
        if call.stream and call.choices > call.prompts:
            learning = self._later(self._stop_choices(host, call, terms, response, source))
            return learning if terms.metered else None
        ids = translate.abort_ids(call)
        # Once its first event has come the engine knows the id, and asking once is enough.
        at_s = ABORT_AT_S if source is None else ABORT_AT_S[:1]
        if ids:
            self._later(self._abort(host, ids, at_s))
        if not ids or not terms.metered:
            response.close()
            return None
        limit_s = at_s[-1] + LAST_USAGE_S
        if call.stream:
            return self._later(self._hear(call, terms, response, source, limit_s))
        return self._later(self._hear_whole(response, bytearray(begun), limit_s))

    def _later(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = once("stopping a generation", work, self._failed)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _hear(self, call: Call, terms: Terms, response: Response, source: EventStream | None, limit_s: float) -> Usage | None:
        """The end of a stream that was aborted."""
        before = source.used() if source is not None else None
        try:
            async with asyncio.timeout(limit_s):
                if source is None:
                    await response.head()
                    if response.status != 200:
                        return None
                    source = stream.stream_of(call, terms)
                await _to_the_usage(source, response)
        except (TimeoutError, ConnectFailed, ConnectionLost):
            pass
        finally:
            response.close()
        return _beyond(before, source.used() if source is not None else None)

    async def _hear_whole(self, response: Response, content: bytearray, limit_s: float) -> Usage | None:
        """A JSON answer that was aborted still says what it came to."""
        try:
            async with asyncio.timeout(limit_s):
                await response.head()
                while len(content) < MAX_JSON_BYTES and (part := await response.read()):
                    content += part
        except (TimeoutError, ConnectFailed, ConnectionLost):
            return None
        finally:
            response.close()
        return answer.usage_of(bytes(content))

    async def _stop_choices(
        self, host: EngineHost, call: Call, terms: Terms, response: Response, source: EventStream | None
    ) -> Usage | None:
        """Abort each choice as its id shows up in the stream: SGLang 0.5.23 does not stop n > 1 streams of clients that left."""
        before = source.used() if source is not None else None
        aborted: set[str] = set()
        try:
            async with asyncio.timeout(LEARN_IDS_S):
                if source is None:
                    await response.head()
                    if response.status != 200:
                        return None
                    source = stream.Chunks(call, terms)
                while True:
                    for rid in source.ids - aborted:
                        await self._abort_one(host, rid)
                    aborted |= source.ids
                    if len(aborted) >= call.choices or source.complete or source.failure is not None:
                        break
                    data = await response.read()
                    if not data:
                        break
                    source.feed(data)
            if terms.metered:
                async with asyncio.timeout(LAST_USAGE_S):
                    await _to_the_usage(source, response)
        except (TimeoutError, ConnectFailed, ConnectionLost):
            pass
        finally:
            response.close()
        return _beyond(before, source.used() if source is not None else None)

    async def _abort(self, host: EngineHost, rids: Sequence[str], at_s: Sequence[float]) -> None:
        started = time.monotonic()
        for moment in at_s:
            await asyncio.sleep(max(0.0, moment - (time.monotonic() - started)))
            for rid in rids:
                await self._abort_one(host, rid)

    async def _abort_one(self, host: EngineHost, rid: str) -> None:
        with contextlib.suppress(ConnectFailed, ConnectionLost, TimeoutError):
            async with asyncio.timeout(1.0):
                response = await request(host.transport(), "POST", "/abort_request", msgspec.json.encode({"rid": rid}), connect_s=1.0)
                try:
                    await small(response)
                finally:
                    response.close()


async def _to_the_usage(source: EventStream, response: Response) -> None:
    """Read on until the engine has said what the answer came to, or has no more to say."""
    while source.usage is None:
        data = await response.read()
        if not data or source.hear(data):
            return


def _beyond(before: Usage | None, after: Usage | None) -> Usage | None:
    """What an answer came to after it was given up: less than nothing where events had been taken for too many tokens."""
    if before is None or after is None:
        return after
    return Usage(
        after.prompt_tokens - before.prompt_tokens,
        after.completion_tokens - before.completion_tokens,
        cached_tokens=after.cached_tokens - (before.cached_tokens or 0) if after.cached_tokens is not None else None,
        estimated=after.estimated,
    )
