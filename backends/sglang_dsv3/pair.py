"""One attempt at a pair of hosts: one prefills, the other decodes, and the client gets what the second one answers.

SGLang's disaggregated serving wants a request at both at once, with the same three members in either body: where the prefill host's
bootstrap server is, and a room, a number that only these two use, in which the decode host is given what the prefill host has computed
(PDRoutingFields of entrypoints/openai/protocol.py in SGLang 0.5.23; its own router does the same). Of several prompts each has a room.
Several choices (n > 1) SGLang sends all into the same one, where the decode host waits for ever (tried with two engines, 2026-11-28): they
are refused.

Neither is of any use without the other: when one fails the other is aborted. Ids are an attempt's own at the prefill host, and at a decode
host that this call has asked before, since the abort of that may still be under way; what comes back then gets the public one.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Container, Mapping
from urllib.parse import urlsplit

import msgspec

from backends.sglang_dsv3.abandon import Abandoned
from backends.sglang_dsv3.host import EngineHost
from backends.sglang_dsv3.reply import Asked, SGLangReply
from gateway.errors import InvalidRequest
from gateway.plugin import AttemptFailed, Call, Reply, Terms, Usage
from gateway.supervision import Failed, once

# Where SGLang's bootstrap server listens if nothing else is said (--disaggregation-bootstrap-port).
BOOTSTRAP_PORT = 8998
# A room is a signed 64-bit number there.
_ROOM_BITS = 62
# When the decode host says that it has failed it may be because the prefill host is gone, which shows within a moment.
BLAME_S = 0.2
_ANYBODYS = frozenset(["broken", "cut", "aborted"])


class PairReply(Reply):
    """See `gateway.plugin.Reply`."""

    def __init__(
        self,
        hosts: tuple[EngineHost, EngineHost],
        call: Call,
        terms: Terms,
        traces: tuple[Mapping[str, str], Mapping[str, str]],
        abandoned: Abandoned,
        allowed: Container[str],
        connect_s: float,
        again: bool,
        failed: Failed,
        order: str | None = None,
    ) -> None:
        prefill, decode = hosts
        inner = msgspec.structs.replace(call, id=_like(call.id)) if again else call
        # Ids of ours in what the decode host sends, and what the client knows instead.
        self._renamed = (inner.id.encode(), call.id.encode()) if again else None
        self._prompts, self._several = call.prompts, call.choices > call.prompts
        self._prefill_host = prefill
        self._affinity = terms.affinity
        self._ids = inner.id, _like(call.id)
        self.decode = SGLangReply(decode, inner, terms, traces[1], abandoned, allowed, connect_s, order)
        # Nobody counts what it used: the decode host tells of the whole.
        other = msgspec.structs.replace(call, id=self._ids[1])
        alone = msgspec.structs.replace(terms, metered=False)
        self._prefill = SGLangReply(prefill, other, alone, traces[0], abandoned, allowed, connect_s)
        self._failed = failed
        self._lost: asyncio.Future[AttemptFailed] | None = None
        self._prefilling: asyncio.Task[None] | None = None
        self._decoding: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """See `Reply`. Raises AttemptFailed with the role of the half that failed."""
        if self._several:
            message = "Unsupported value: 'n' is served up to 1 by engines that prefill and decode apart: ask several times."
            raise InvalidRequest(message, param="n", code="unsupported_value")
        loop = asyncio.get_running_loop()
        lost = self._lost = loop.create_future()
        rank = self._prefill.rank = self._prefill_host.ranks.take(self._affinity)
        self.decode.bound = bootstrap(self._prefill_host, self._prompts, rank)
        self.decode.asking = self._also
        decoding = self._decoding = loop.create_task(self.decode.begin())
        decoding.add_done_callback(_seen)
        try:
            await asyncio.wait((decoding, lost), return_when=asyncio.FIRST_COMPLETED)
            if not decoding.done():
                raise lost.result()
            decoding.result()
        except AttemptFailed as failure:
            if failure.cause in _ANYBODYS and not failure.role:
                await asyncio.wait((lost,), timeout=BLAME_S)
            self.close()
            if lost.done() and failure.cause in _ANYBODYS:
                raise lost.result() from failure
            raise
        except BaseException:
            self.close()
            raise
        decode = self.decode
        self.status, self.content_type, self.streams, self.connected_at = (
            decode.status,
            decode.content_type,
            decode.streams,
            decode.connected_at,
        )
        self.body = self._given(decode.body)

    def _also(self, asked: Asked) -> None:
        """The decode half asks this; the prefill half asks the same, under an id of its own."""
        ours, others = self._ids
        payload = asked.payload.replace(ours.encode(), others.encode(), 1)
        progress = None if asked.progress is None else asked.progress.copy()
        self._prefill.asked = asked._replace(payload=payload, progress=progress)
        self._prefilling = once("prefill of a pair", self._run_prefill(), self._failed)

    async def _run_prefill(self) -> None:
        half = self._prefill
        try:
            await half.begin()
            while half.streams and await half.next():
                pass
        except AttemptFailed as failure:
            failure.role = "prefill"
            if self._lost is not None and not self._lost.done():
                self._lost.set_result(failure)
            return
        finally:
            half.close()
        if self.prefilled is not None:
            self.prefilled()

    async def next(self) -> bytes:
        """See `Reply`."""
        return self._given(await self.decode.next())

    def _given(self, content: bytes) -> bytes:
        return content if self._renamed is None else content.replace(*self._renamed)

    def close(self) -> Usage | None:
        """See `Reply`: both halves."""
        for task in (self._decoding, self._prefilling):
            if task is not None:
                task.cancel()
        self._prefill.close()
        self.usage = self.decode.close()
        self.finishes, self.late = self.decode.finishes, self.decode.late
        return self.usage


def bootstrap(prefill: EngineHost, prompts: int, rank: int | None = None) -> bytes:
    """The end of a JSON body: where the prefill host hands over what it has computed, and a room for each prompt. With data-parallel ranks
    SGLang takes the one that a room's number leads to (its `follow_bootstrap_room`), at either host."""
    ranks = len(prefill.ranks)
    rooms = [secrets.randbits(_ROOM_BITS) for _ in range(prompts)]
    if rank is not None:
        rooms = [room - room % ranks + rank for room in rooms]
    host, port = urlsplit(prefill.url).hostname or "", prefill.config.bootstrap_port
    host = f"[{host}]" if ":" in host else host
    where = {"bootstrap_host": host, "bootstrap_port": port if port is not None else BOOTSTRAP_PORT, "bootstrap_room": rooms[0]}
    if prompts > 1:
        where = {"bootstrap_host": [host] * prompts, "bootstrap_port": [where["bootstrap_port"]] * prompts, "bootstrap_room": rooms}
    return b"," + msgspec.json.encode(where)[1:]


def _like(id: str) -> str:
    """A new id that looks like that one, down to its length."""
    digits = 32
    return f"{id[:-digits]}{secrets.token_hex(digits // 2)}"


def _seen(task: asyncio.Task[None]) -> None:
    """Its failure was looked at, or is of no interest any more."""
    if not task.cancelled():
        task.exception()
