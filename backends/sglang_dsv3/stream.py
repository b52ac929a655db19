"""SGLang's event streams, watched while they pass: errors inside them, usage nobody asked for, and whether they really finished.

No I/O here: bytes of the engine go in, bytes for the client come out.

Events come here in one form (see `framing`). What is looked for are byte patterns that cannot occur inside a JSON string (a quote there is
escaped), so no event is decoded but those with the usage and those that may be an error.
"""

from __future__ import annotations

import contextlib
import re
from typing import Final

import msgspec

from backends.sglang_dsv3 import failures
from backends.sglang_dsv3.answer import Edit, renaming, usage_of
from backends.sglang_dsv3.failures import cut
from backends.sglang_dsv3.framing import Framing, Malformed
from backends.sglang_dsv3.shapes import Continuation, members_decoder
from gateway.plugin import AttemptFailed, Call, Endpoint, Terms, Usage
from gateway.wire.sse import DONE, MAX_EVENT_BYTES

# Whether an event holds one of these is asked by `partition`: `in` would first ask whether the pattern is a number, and make an exception
# to say that it is not, which at five patterns an event was a third of what a stream took; `find` spends half as much on reading its
# arguments (Python 3.11; bench/stages.py, 2026-11-28).
_FINISH: Final = b'"finish_reason":"'
_REASON = re.compile(rb'"finish_reason":\s*"(\w+)"')
_ABORT: Final = b'"finish_reason":"abort"'
_ERROR: Final = b'"error"'
_USAGE: Final = b'"usage":{'
_ENDS_WITH_USAGE: Final = b',"usage":{'
_CHOICE: Final = b'"choices":[{'
_DONE: Final = DONE
# The usage that ends an event, where `continuous_usage_stats` was asked for.
_TAIL = re.compile(rb',"usage":(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})\}\n\n\Z')
_CREATED = re.compile(rb'"created":\d+')
_ID = re.compile(rb'^data: \{"id":"([^"]*)"')
# Names of events: those before anything was generated, those that end a whole answer, those that say it failed.
_NAME = re.compile(rb"event: ([\w.]+)\n")
_PRELUDE = frozenset([b"", b"response.created", b"response.in_progress", b"message_start", b"ping"])
_LAST = frozenset([b"response.completed", b"response.incomplete", b"message_stop"])
_FAILED = frozenset([b"error", b"response.failed"])
# What an engine may say before it begins to generate: SGLang's responses begin with the whole request, twice.
MAX_HELD_BYTES = 2 * MAX_EVENT_BYTES
MAX_HELD_EVENTS = 1000


class EventStream:
    """Events of one answer, whatever its endpoint: `feed` it until `failure` or `complete` is set, `end` it where the bytes end."""

    def __init__(self, call: Call, terms: Terms, framing: Framing) -> None:
        self._call = call
        self._prompt_tokens = terms.prompt_tokens
        self._framing = framing
        # What ended the answer early; what was fed before it has been given out.
        self.failure: AttemptFailed | None = None
        # Whether it is whole.
        self.complete = False
        # The engine's own ids seen so far (with n > 1 it invents one per choice).
        self.ids: set[str] = set()
        self.usage: Usage | None = None
        # Why its choices ended.
        self.reasons: list[str] = []
        # Events with words of the answer that passed on to the client.
        self.passed = 0
        # What `/parse_function_call` has to be asked before the answer is whole; see `answered`.
        self.asks = b""

    def feed(self, data: bytes) -> bytes:
        """What of these bytes of the engine, and of those before, goes to the client: whole events, or nothing yet."""
        try:
            return self._take(self._framing.feed(data))
        except (Malformed, msgspec.DecodeError) as error:
            self.failure = failures.nonsense(str(error))
            return b""

    def end(self) -> bytes:
        """The engine's bytes are at their end: what the client still lacks of a whole answer; else the failure is set."""
        self.failure = self.failure or cut("the stream ended before its last event")
        return b""

    def answered(self, content: bytes) -> bytes:
        """What the client still lacks, by what `asks` was answered; else the failure is set."""
        raise NotImplementedError

    def used(self) -> Usage | None:
        """The usage as far as it is known; where the engine has not told, as the events say that passed: a token each, or more."""
        return self.usage or (Usage(self._prompt_tokens, self.passed, estimated=True) if self.passed > 0 else None)

    def hear(self, data: bytes) -> bool:
        """More of an answer that was stopped, of which only the usage is of interest; whether it is known now.

        An aborted answer ends with a finish, its usage and the closing line."""
        if not self.complete and self.failure is None:
            self.feed(data)
        else:
            with contextlib.suppress(Malformed):
                self._closing(self._framing.feed(data))
        return self.usage is not None

    def _closing(self, events: list[bytes]) -> None:
        """Look for the usage in what follows a finish that was an abort."""
        for event in events:
            if event.partition(_USAGE)[1]:
                self.usage = usage_of(event[event.find(b"data: ") + 6 :], self.usage)

    def _take(self, events: list[bytes]) -> bytes:
        """What of these events goes to the client."""
        raise NotImplementedError


class Chunks(EventStream):
    """Chat and completions: chunks, each choice with a finish, usage when asked for, `[DONE]`."""

    def __init__(self, call: Call, terms: Terms, served_name: str | None = None) -> None:
        super().__init__(call, terms, Framing(False, self._foreign))
        self._keep = bool(terms.keep)
        self._finishes = 0
        self._tail = b""
        self._continues: Continuation | None = call.continues if isinstance(call.continues, Continuation) else None
        if call.endpoint is Endpoint.CHAT and self._continues is None:
            self.passed = -call.choices  # each begins with an event that only says who speaks
        self._id = b'data: {"id":"%s"' % call.id.encode()
        # What is done to each event on its way, chosen once: a plain stream's are only looked at.
        edits: list[Edit] = []
        if self._continues is not None:
            edits.append(self._joined)
        if call.choices > 1:
            edits.append(self._renamed)
        if served_name is not None:
            edits.append(renaming(served_name, call.model))
        self._edits = tuple(edits)

    def used(self) -> Usage | None:
        """The usage, or of an answer that broke off what the engine has told so far; continued ones with what was used before."""
        before = self._continues
        if self.usage is not None:
            return self.usage
        if self._tail and self._call.choices == 1:  # of several each tells its own
            found = usage_of(b'{"usage":%s}' % self._tail)
        else:
            found = Usage(self._prompt_tokens, self.passed, estimated=True) if self.passed > 0 else None
        if found is None or before is None:
            return found
        completion = before.completion_tokens + found.completion_tokens
        return Usage(before.prompt_tokens or found.prompt_tokens, completion, found.cached_tokens, estimated=found.estimated)

    def _without_usage(self, event: bytes) -> bytes:
        """The engine tells with every event what was used so far, for us alone: OpenAI's streams say it once."""
        before, comma, _ = event.rpartition(_ENDS_WITH_USAGE)
        if comma and before.partition(_CHOICE)[1] and (found := _TAIL.match(event, len(before))):
            self._tail = found[1]
            return before + b"}\n\n"
        return event

    def _foreign(self, event: bytes) -> bytes:
        """An event that SGLang has not written: its usage may stand in any chunk, and anywhere in it."""
        if not event.partition(_USAGE)[1] or not event.partition(_CHOICE)[1]:
            return event
        members = members_decoder.decode(event[6:])
        self._tail = bytes(members.pop("usage"))
        if self._call.show_usage and not self._keep:
            return event
        return b"data: " + msgspec.json.encode(members) + b"\n\n"

    def _joined(self, event: bytes) -> bytes:
        """An event of a continued answer as one of the answer it continues: no role again, created when that was."""
        assert self._continues is not None
        if b'"role":"assistant"' in event and b'"content":""' in event:
            return b""
        return _CREATED.sub(b'"created":%d' % self._continues.created, event, count=1)

    def _renamed(self, event: bytes) -> bytes:
        """An event of several choices under our id; the engine's is noted."""
        found = _ID.match(event)
        if not found:
            return event
        if len(self.ids) < self._call.choices:
            self.ids.add(found[1].decode("latin-1"))
        return self._id + event[found.end() :]

    def _totals(self, event: bytes, before: Continuation, usage: Usage) -> bytes:
        """The usage event of a continued answer, as if one host had answered."""
        content = msgspec.json.decode(event[6:])
        completion = before.completion_tokens + usage.completion_tokens
        prompt = before.prompt_tokens or usage.prompt_tokens
        thought = self._thought(before, usage)
        self.usage = Usage(prompt, completion, usage.cached_tokens, thought)
        content["usage"].update(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)
        if "reasoning_tokens" in content["usage"]:
            content["usage"]["reasoning_tokens"] = thought or 0
        if content["usage"].get("completion_tokens_details") is not None:
            content["usage"]["completion_tokens_details"]["reasoning_tokens"] = thought or 0
        return b"data: " + msgspec.json.encode(content) + b"\n\n"

    def _thought(self, before: Continuation, usage: Usage) -> int | None:
        """Tokens of thoughts in both parts. An engine that has not seen their end, since it lies in the prompt, takes all it generates for
        thoughts."""
        if before.thought_over:
            return before.reasoning_tokens
        return None if usage.reasoning_tokens is None else (before.reasoning_tokens or 0) + usage.reasoning_tokens

    def end(self) -> bytes:
        """See `EventStream`: when every choice has finished only the closing line is missing."""
        if self.failure is None and self._finishes >= self._call.choices and not self._framing.pending:
            self.complete = True
            return DONE
        self.failure = self.failure or cut(f"the stream ended after {self._finishes} of {self._call.choices} finishes")
        return b""

    def _take(self, events: list[bytes]) -> bytes:
        out: list[bytes] = []
        edits = self._edits
        for event in events:
            if event == _DONE:
                if self._finishes < self._call.choices:
                    self.failure = cut(f"[DONE] after {self._finishes} of {self._call.choices} finishes")
                else:
                    out.append(event)
                    self.complete = True
                break
            if event.partition(_ERROR)[1]:
                self.failure = failures.error_of(event, self._call)
                if self.failure is not None:
                    break
            told = event.partition(_USAGE)[1]
            if event.partition(_FINISH)[1]:
                if event.partition(_ABORT)[1]:
                    self.failure = failures.aborted()
                    self._closing(events)
                    break
                self._finishes += event.count(_FINISH)
                if len(self.reasons) < self._call.choices:
                    self.reasons += [reason.decode("latin-1") for reason in _REASON.findall(event)]
            elif told and not event.partition(_CHOICE)[1]:
                usage = self.usage = usage_of(event[6:])
                if self._continues is not None and usage is not None:
                    event = self._totals(event, self._continues, usage)
                if not self._call.show_usage:
                    continue
            if told and self._keep:
                event = self._without_usage(event)
            for edit in edits:
                event = edit(event)
            if event:
                out.append(event)
        self.passed += len(out)
        return out[0] if len(out) == 1 else b"".join(out)


class NamedEvents(EventStream):
    """Responses and messages: events with names, the last of which says that the answer is whole.

    What comes before the engine has begun to generate is held back, so that an error there can still be a status.
    """

    def __init__(self, call: Call, terms: Terms, served_name: str | None = None) -> None:
        super().__init__(call, terms, Framing(True))
        self._edit = renaming(served_name, call.model) if served_name is not None else _as_it_is
        self._begun = False
        self._held: list[bytes] = []
        self._held_bytes = 0

    def _take(self, events: list[bytes]) -> bytes:
        out = self._held
        for event in events:
            found = _NAME.match(event)
            name = found[1] if found else b""
            if name in _FAILED:
                self.failure = failures.named_error(event[found.end() :] if found else event, self._call)
                break
            if event.partition(_USAGE)[1]:
                self.usage = usage_of(event[event.find(b"data: ") + 6 :], self.usage)
            out.append(self._edit(event))
            self._begun = self._begun or name not in _PRELUDE
            if name in _LAST:
                self.complete = True
                break
            self.passed += name.endswith(b"delta")
        if not self._begun:
            self._held_bytes += sum(map(len, events))
            if self._held_bytes > MAX_HELD_BYTES or len(out) > MAX_HELD_EVENTS:
                self.failure = failures.nonsense(f"{len(out)} events, {self._held_bytes} bytes, and none of the answer itself")
            return b""
        self._held = []
        return b"".join(out)

    def used(self) -> Usage | None:
        """The usage, or of an answer that broke off what passed of it: these say what the prompt took first and the rest at the end."""
        usage = self.usage
        if self.complete or (usage is not None and usage.completion_tokens) or not self.passed:
            return usage
        prompt = usage.prompt_tokens if usage is not None else self._prompt_tokens
        return Usage(prompt, self.passed, usage.cached_tokens if usage is not None else None, estimated=True)


def stream_of(call: Call, terms: Terms, served_name: str | None = None) -> EventStream:
    """What watches the events of a call's endpoint."""
    if call.endpoint in (Endpoint.CHAT, Endpoint.COMPLETIONS):
        return Chunks(call, terms, served_name)
    return NamedEvents(call, terms, served_name)


def _as_it_is(event: bytes) -> bytes:
    return event
