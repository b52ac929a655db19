"""One SGLang event stream, watched while it passes: errors inside it, usage nobody asked for, and whether it really finished.

What is looked for are byte patterns that cannot occur inside a JSON string (a quote there is escaped), so no event is decoded but the
one with the usage. SGLang writes compact JSON; errors start with `data: {"error"`.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec

from backends.sglang_dsv3 import translate
from gateway.errors import BadGateway, Unavailable
from gateway.plugin import AttemptFailed, Call, Usage, Verdict
from gateway.wire.sse import DONE, EventTooLarge, Splitter

_FINISH = b'"finish_reason":"'
_ABORT = b'"finish_reason":"abort"'
JSON_ABORT = re.compile(rb'"finish_reason"\s*:\s*"abort"')
_ERROR = re.compile(rb'\s*data:\s*\{\s*"error"\s*:\s*[^n\s]')
_ID = re.compile(rb'^data: \{"id":"([^"]*)"')
_JSON_ID = re.compile(rb'^\{"id":"([^"]*)"')


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _EngineUsage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _WithUsage(msgspec.Struct):
    usage: _EngineUsage | None = None


class _ErrorCode(msgspec.Struct):
    code: int | str | None = None


class _WithError(msgspec.Struct):
    error: _ErrorCode


def usage_of(content: bytes) -> Usage | None:
    """The usage in a JSON answer or event, if it holds one."""
    try:
        found = msgspec.json.decode(content, type=_WithUsage).usage
    except msgspec.DecodeError:
        return None
    if found is None:
        return None
    details = found.prompt_tokens_details
    return Usage(found.prompt_tokens, found.completion_tokens, details.cached_tokens if details else None)


def with_id(content: bytes, public_id: str) -> bytes:
    """A JSON answer under our id: SGLang gives several choices ids of its own making."""
    return _JSON_ID.sub(b'{"id":"%s"' % public_id.encode(), content, count=1)


class EventStream:
    """Events of one answer. `ids` are the engine's own ids seen so far (with n > 1 it invents one per choice)."""

    def __init__(self, call: Call, read: Callable[[], Awaitable[bytes]]) -> None:
        self._call = call
        self._read = read
        self._splitter = Splitter()
        self._finishes = 0
        self._rename = b'data: {"id":"%s"' % call.id.encode() if call.choices > 1 else None
        self._first = b""
        self._failure: AttemptFailed | None = None
        self.ids: set[str] = set()
        self.usage: Usage | None = None
        self.complete = False

    async def begin(self) -> None:
        """Wait for the first event; raises AttemptFailed when it is an error, or when none comes."""
        while not self._first and not self.complete:
            self._first = self._take(await self._more())
            if self._failure is not None and not self._first:
                raise self._failure

    async def events(self) -> AsyncIterator[bytes]:
        """Blocks of whole events. Ends after `[DONE]`; raises AttemptFailed for anything else."""
        if self._first:
            yield self._first
        while not self.complete:
            if self._failure is not None:
                raise self._failure
            block = self._take(await self._more())
            if block:
                yield block

    async def _more(self) -> list[bytes]:
        data = await self._read()
        if data:
            try:
                return self._splitter.feed(data)
            except EventTooLarge as error:
                raise AttemptFailed("broken", BadGateway("The engine sent nonsense.", detail=str(error))) from None
        if self._finishes >= self._call.choices and not self._splitter.pending:
            return [DONE]  # every choice finished: only the closing line is missing
        raise _cut(f"the stream ended after {self._finishes} of {self._call.choices} finishes")

    def _take(self, events: list[bytes]) -> bytes:
        out: list[bytes] = []
        for event in events:
            if event == DONE:
                if self._finishes < self._call.choices:
                    self._failure = _cut(f"[DONE] after {self._finishes} of {self._call.choices} finishes")
                else:
                    out.append(event)
                    self.complete = True
                break
            if b'"error"' in event and _ERROR.match(event):
                self._failure = _error(event)
                break
            if _FINISH in event:
                if _ABORT in event:
                    self._failure = aborted()
                    break
                self._finishes += event.count(_FINISH)
            elif b'"choices":[]' in event and b'"usage":{' in event:
                self.usage = usage_of(event[6:])
                if not self._call.show_usage:
                    continue
            if self._rename is not None:
                found = _ID.match(event)
                if found:
                    self.ids.add(found[1].decode("latin-1"))
                    event = self._rename + event[found.end() :]
            out.append(event)
        return out[0] if len(out) == 1 else b"".join(out)


def _error(event: bytes) -> AttemptFailed:
    """An error event; what it carries as `code` is the status SGLang would have answered with."""
    content = event.strip()[5:]
    try:
        code = msgspec.json.decode(content, type=_WithError).error.code
        status = int(code) if code is not None else 500
    except (msgspec.DecodeError, ValueError):
        status = 500
    return translate.failure(status if 400 <= status < 600 else 500, content)


def aborted() -> AttemptFailed:
    """The engine gave up on a request by itself; `abort` is outside OpenAI's finish reasons and is never passed on."""
    error = Unavailable("The engine aborted this request.", code="engine_aborted", retry_after_s=2)
    return AttemptFailed("aborted", error, Verdict.BUSY)


def _cut(detail: str) -> AttemptFailed:
    return AttemptFailed("cut", BadGateway("The engine's answer ended before it was finished.", detail=detail))
