"""SGLang's event streams, watched while they pass: errors inside them, usage nobody asked for, and whether they really finished.

What is looked for are byte patterns that cannot occur inside a JSON string (a quote there is escaped), so no event is decoded but
those with the usage. SGLang writes compact JSON; errors start with `data: {"error"`.
"""

from __future__ import annotations

import abc
import re
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec

from backends.sglang_dsv3 import translate
from backends.sglang_dsv3.resume import Continuation
from gateway.errors import BadGateway, Unavailable
from gateway.plugin import AttemptFailed, Call, Endpoint, Usage, Verdict
from gateway.wire.sse import DONE, EventTooLarge, Splitter

_FINISH = b'"finish_reason":"'
_REASON = re.compile(rb'"finish_reason":\s*"(\w+)"')
_ABORT = b'"finish_reason":"abort"'
JSON_ABORT = re.compile(rb'"finish_reason"\s*:\s*"abort"')
_ERROR = re.compile(rb'\s*data:\s*\{\s*"error"\s*:\s*[^n\s]')
# The usage that ends an event, where `continuous_usage_stats` was asked for.
_TAIL = re.compile(rb',"usage":(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})\}\n\n\Z')
_CREATED = re.compile(rb'"created":\d+')
_ID = re.compile(rb'^data: \{"id":"([^"]*)"')
# Names of events: those before anything was generated, those that end a whole answer, those that say it failed.
_NAME = re.compile(rb"event: ([\w.]+)\n")
_PRELUDE = frozenset([b"", b"response.created", b"response.in_progress", b"message_start", b"ping"])
_LAST = frozenset([b"response.completed", b"response.incomplete", b"message_stop"])
_FAILED = frozenset([b"error", b"response.failed"])
_STATUS_OF = {"invalid_request_error": 400, "not_found_error": 404, "rate_limit_error": 429, "overloaded_error": 503}
_BUSY = re.compile(r"queue is full|higher priority request|timeout", re.IGNORECASE)
_JSON_ID = re.compile(rb'^\{"id":"([^"]*)"')


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _EngineUsage(msgspec.Struct):
    """Chat's and completions' names, and those of responses and messages, which count cached tokens apart."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None
    reasoning_tokens: int | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    input_tokens_details: _PromptDetails | None = None
    cache_read_input_tokens: int | None = None


class _WithUsage(msgspec.Struct):
    usage: _EngineUsage | None = None
    response: _WithUsage | None = None
    message: _WithUsage | None = None


class _Named(msgspec.Struct):
    type: str | None = None
    message: str | None = None


class _Failed(msgspec.Struct):
    error: _Named | None = None


class _NamedError(msgspec.Struct):
    error: _Named | None = None
    response: _Failed | None = None


class _ErrorCode(msgspec.Struct):
    code: int | str | None = None


class _WithError(msgspec.Struct):
    error: _ErrorCode


class _WithStatus(msgspec.Struct):
    status: str | None = None


_status_decoder = msgspec.json.Decoder(_WithStatus)
_raw_decoder = msgspec.json.Decoder(msgspec.Raw)
_usage_decoder = msgspec.json.Decoder(_WithUsage)


def usage_of(content: bytes, before: Usage | None = None) -> Usage | None:
    """The usage in a JSON answer or event, if it holds one; counts that it leaves out are those of `before`."""
    try:
        found: _WithUsage | None = _usage_decoder.decode(content)
    except msgspec.DecodeError:
        return before
    while found is not None and found.usage is None:
        found = found.response or found.message
    if found is None or found.usage is None:
        return before
    usage, before = found.usage, before or Usage()
    details = usage.prompt_tokens_details or usage.input_tokens_details
    cached = usage.cache_read_input_tokens if usage.cache_read_input_tokens is not None else before.cached_tokens
    return Usage(
        prompt_tokens=usage.prompt_tokens or usage.input_tokens + (usage.cache_read_input_tokens or 0) or before.prompt_tokens,
        completion_tokens=usage.completion_tokens or usage.output_tokens or before.completion_tokens,
        cached_tokens=details.cached_tokens if details is not None else cached,
        reasoning_tokens=_reasoning(usage),
    )


def _reasoning(usage: _EngineUsage) -> int | None:
    details = usage.completion_tokens_details
    return (details.reasoning_tokens if details is not None else usage.reasoning_tokens) or None


def reasons_of(content: bytes) -> list[str]:
    """Why choices ended, in an event or a whole answer."""
    return [found.decode("latin-1") for found in _REASON.findall(content)]


def with_id(content: bytes, public_id: str) -> bytes:
    """A JSON answer under our id: SGLang gives several choices ids of its own making."""
    return _JSON_ID.sub(b'{"id":"%s"' % public_id.encode(), content, count=1)


class EventStream(abc.ABC):
    """Events of one answer, whatever its endpoint. `ids` are the engine's own ids seen so far (with n > 1 it invents one per choice)."""

    def __init__(self, call: Call, read: Callable[[], Awaitable[bytes]], served_name: str | None = None) -> None:
        self._call = call
        self._read = read
        self._model = _renaming(served_name, call.model) if served_name is not None else None
        self._splitter = Splitter()
        self._first = b""
        self._begun = False
        self._failure: AttemptFailed | None = None
        self.ids: set[str] = set()
        self.usage: Usage | None = None
        self.complete = False
        # Why its choices ended.
        self.reasons: list[str] = []
        # Events with words of the answer that passed on to the client.
        self.passed = 0

    def used(self) -> Usage | None:
        """The usage as far as it is known; where the engine has not told, as the events say that passed: a token each, or more."""
        return self.usage or (Usage(self._call.prompt_tokens, self.passed, estimated=True) if self.passed else None)

    async def rest(self) -> Usage | None:
        """Read on until the engine has said what the answer came to, or has no more to say: for one that was stopped."""
        while not self.complete and self._failure is None:
            self._take(await self._more())
        # An aborted answer ends with a finish, its usage and the closing line.
        while self.usage is None:
            data = await self._read()
            if not data:
                break
            self._closing(self._splitter.feed(data))
        return self.used()

    def _closing(self, events: list[bytes]) -> None:
        """Look for the usage in what follows a finish that was an abort."""
        for event in events:
            if b'"usage":{' in event:
                self.usage = usage_of(event[event.find(b"data: ") + 6 :], self.usage)

    async def begin(self) -> None:
        """Wait for the first event of the answer itself; raises AttemptFailed when it is an error, or when none comes."""
        while not self._begun and not self.complete:
            self._first += self._take(await self._more())
            if self._failure is not None and not self._begun:
                raise self._failure

    async def events(self) -> AsyncIterator[bytes]:
        """Blocks of whole events. Ends after the last one of a finished answer; raises AttemptFailed for anything else."""
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
        if not data:
            return self._at_end()
        try:
            return self._splitter.feed(data)
        except EventTooLarge as error:
            raise AttemptFailed("broken", BadGateway("The engine sent nonsense.", detail=str(error))) from None

    def _at_end(self) -> list[bytes]:
        """Events that the engine owes at the end of its bytes; raises AttemptFailed when the answer is not whole."""
        raise cut("the stream ended before its last event")

    @abc.abstractmethod
    def _take(self, events: list[bytes]) -> bytes:
        """What of these events goes to the client; sets `_begun`, `_failure` and `complete`."""


class Chunks(EventStream):
    """Chat and completions: chunks, each choice with a finish, usage when asked for, `[DONE]`."""

    def __init__(self, call: Call, read: Callable[[], Awaitable[bytes]], served_name: str | None = None) -> None:
        super().__init__(call, read, served_name)
        self._finishes = 0
        self._roles = call.choices
        self._keep = bool(call.keep)
        self._tail = b""
        self._continues: Continuation | None = call.continues if isinstance(call.continues, Continuation) else None
        self._rename = b'data: {"id":"%s"' % call.id.encode() if call.choices > 1 else None

    def used(self) -> Usage | None:
        """The usage, or of an answer that broke off what the engine has told so far; continued ones with what was used before."""
        if self.usage is not None or not self._tail:
            return super().used()
        usage = usage_of(b'{"usage":%s}' % self._tail)
        before = self._continues
        if usage is None or before is None:
            return usage
        return Usage(before.prompt_tokens, before.completion_tokens + usage.completion_tokens, usage.cached_tokens)

    def _joined(self, event: bytes) -> bytes:
        """An event of a continued answer as one of the answer it continues: no role again, created when that was."""
        assert self._continues is not None
        if b'"role":"assistant"' in event and b'"content":""' in event:
            return b""
        return _CREATED.sub(b'"created":%d' % self._continues.created, event, count=1)

    def _totals(self, event: bytes) -> bytes:
        """The usage event of a continued answer, as if one host had answered."""
        assert self._continues is not None
        assert self.usage is not None
        content = msgspec.json.decode(event[6:])
        completion = self._continues.completion_tokens + self.usage.completion_tokens
        self.usage = Usage(self._continues.prompt_tokens, completion, self.usage.cached_tokens)
        content["usage"].update(
            prompt_tokens=self.usage.prompt_tokens, completion_tokens=completion, total_tokens=self.usage.prompt_tokens + completion
        )
        return b"data: " + msgspec.json.encode(content) + b"\n\n"

    def _at_end(self) -> list[bytes]:
        if self._finishes >= self._call.choices and not self._splitter.pending:
            return [DONE]  # every choice finished: only the closing line is missing
        raise cut(f"the stream ended after {self._finishes} of {self._call.choices} finishes")

    def _take(self, events: list[bytes]) -> bytes:
        out: list[bytes] = []
        for event in events:
            if event == DONE:
                if self._finishes < self._call.choices:
                    self._failure = cut(f"[DONE] after {self._finishes} of {self._call.choices} finishes")
                else:
                    out.append(event)
                    self.complete = True
                break
            if b'"error"' in event and _ERROR.match(event):
                self._failure = error_of(event, self._call.endpoint)
                break
            if _FINISH in event:
                if _ABORT in event:
                    self._failure = aborted()
                    self._closing(events)
                    break
                self._finishes += event.count(_FINISH)
                self.reasons += reasons_of(event)
            elif b'"choices":[]' in event and b'"usage":{' in event:
                self.usage = usage_of(event[6:])
                if self._continues is not None:
                    event = self._totals(event)
                if not self._call.show_usage:
                    continue
            if self._keep:
                # The engine tells with every event what was used so far, for us alone: OpenAI's streams say it once.
                at = event.rfind(b',"usage":{')
                if at > 0 and b'"choices":[]' not in event and (found := _TAIL.match(event, at)):
                    self._tail = found[1]
                    event = event[:at] + b"}\n\n"
            if self._continues is not None:
                event = self._joined(event)
                if not event:
                    continue
            if self._rename is not None:
                found = _ID.match(event)
                if found:
                    self.ids.add(found[1].decode("latin-1"))
                    event = self._rename + event[found.end() :]
            if self._model is not None:
                event = self._model(event)
            out.append(event)
        self._begun = self._begun or bool(out)
        if not self._keep:
            self.passed += len(out) - self._roles  # each choice begins with an event that only says who speaks
            self._roles = 0
        return out[0] if len(out) == 1 else b"".join(out)


class NamedEvents(EventStream):
    """Responses and messages: events with names, the last of which says that the answer is whole.

    What comes before the engine has begun to generate is held back, so that an error there can still be a status.
    """

    def _take(self, events: list[bytes]) -> bytes:
        out: list[bytes] = []
        for event in events:
            found = _NAME.match(event)
            name = found[1] if found else b""
            if name in _FAILED:
                self._failure = _named_error(event[found.end() :] if found else event, self._call.endpoint)
                break
            if b'"usage":{' in event:
                self.usage = usage_of(event[event.find(b"data: ") + 6 :], self.usage)
            if self._model is not None:
                event = self._model(event)
            out.append(event)
            self._begun = self._begun or name not in _PRELUDE
            if name in _LAST:
                self.complete = True
                break
            self.passed += name.endswith(b"delta")
        return b"".join(out)

    def used(self) -> Usage | None:
        """The usage, or of an answer that broke off what passed of it: these say what the prompt took first and the rest at the end."""
        usage = self.usage
        if self.complete or (usage is not None and usage.completion_tokens) or not self.passed:
            return usage
        prompt = usage.prompt_tokens if usage is not None else self._call.prompt_tokens
        return Usage(prompt, self.passed, usage.cached_tokens if usage is not None else None, estimated=True)


def reader_of(call: Call) -> type[EventStream]:
    """How the events of a call's endpoint are read."""
    return Chunks if call.endpoint in (Endpoint.CHAT, Endpoint.COMPLETIONS) else NamedEvents


def whole(content: bytes, call: Call, served_name: str | None = None) -> tuple[bytes, Usage | None]:
    """A JSON answer as the client gets it, and its usage; raises AttemptFailed when the engine gave up on it, or when it is no JSON."""
    try:
        _raw_decoder.decode(content)
    except (msgspec.DecodeError, RecursionError) as error:
        raise AttemptFailed("broken", BadGateway("The engine sent nonsense.", detail=f"no JSON: {error}")) from None
    if JSON_ABORT.search(content):
        raise aborted()
    if call.endpoint is Endpoint.RESPONSES and _status_decoder.decode(content).status == "failed":
        raise _named_error(content, call.endpoint)
    if call.choices > 1:
        content = with_id(content, call.id)
    if served_name is not None:
        content = _renaming(served_name, call.model)(content)
    return content, usage_of(content)


def _renaming(served_name: str, name: str) -> Callable[[bytes], bytes]:
    """Exchanges the engine's own name for the model with the client's, where it stands first (a quote inside a string is escaped)."""
    found = re.compile(rb'"model":\s*' + re.escape(msgspec.json.encode(served_name)))
    instead = b'"model":' + msgspec.json.encode(name)
    return lambda content: found.sub(lambda _: instead, content, count=1)


def _named_error(content: bytes, endpoint: Endpoint) -> AttemptFailed:
    """The error of a named event, or of a response that failed: Anthropic's types name a status, SGLang's responses only speak."""
    content = content.removeprefix(b"data: ").strip()
    try:
        found = msgspec.json.decode(content, type=_NamedError)
    except msgspec.DecodeError:
        found = _NamedError()
    error = found.error or (found.response.error if found.response is not None else None) or _Named()
    status = _STATUS_OF.get(error.type or "", 503 if _BUSY.search(error.message or "") else 500)
    return translate.failure(status, msgspec.json.encode({"error": {"message": error.message or "no reason given"}}), endpoint)


def error_of(event: bytes, endpoint: Endpoint) -> AttemptFailed:
    """An error event; what it carries as `code` is the status SGLang would have answered with."""
    content = event.strip()[5:]
    try:
        code = msgspec.json.decode(content, type=_WithError).error.code
        status = int(code) if code is not None else 500
    except (msgspec.DecodeError, ValueError):
        status = 500
    return translate.failure(status if 400 <= status < 600 else 500, content, endpoint)


def aborted() -> AttemptFailed:
    """The engine gave up on a request by itself; `abort` is outside OpenAI's finish reasons and is never passed on."""
    error = Unavailable("The engine aborted this request.", code="engine_aborted", retry_after_s=2)
    return AttemptFailed("aborted", error, Verdict.BUSY)


def cut(detail: str) -> AttemptFailed:
    """The answer ended before it was finished."""
    return AttemptFailed("cut", BadGateway("The engine's answer ended before it was finished.", detail=detail))
