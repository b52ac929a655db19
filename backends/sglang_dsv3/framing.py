"""Events in one form, however an engine spells them: `data: ` and compact JSON on one line, after `event: NAME` where events have names.

SGLang writes this form, which is found out once, by the first event; from then on its events are taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from backends.sglang_dsv3.shapes import typed_decoder
from gateway.wire.sse import DONE, EventTooLarge, Splitter


class Malformed(ValueError):
    """What came is no event stream of JSON."""


class Framing:
    """From an engine's bytes to events in that form. `foreign` is done to each event that came in another."""

    __slots__ = ("_as_they_are", "_decided", "_foreign", "_named", "_splitter")

    def __init__(self, named: bool, foreign: Callable[[bytes], bytes] | None = None) -> None:
        self._splitter = Splitter()
        self._named = named
        self._foreign = foreign
        self._decided = False
        self._as_they_are = False

    def feed(self, data: bytes) -> list[bytes]:
        """Whole events in `data` and what was waiting; raises Malformed."""
        try:
            events = self._splitter.feed(data)
        except EventTooLarge as error:
            raise Malformed(str(error)) from None
        return events if self._as_they_are else self._in_form(events)

    @property
    def pending(self) -> bytes:
        """Bytes of an event that has not ended."""
        return self._splitter.pending

    def _in_form(self, events: list[bytes]) -> list[bytes]:
        found = []
        for number, event in enumerate(events):
            formed = _formed(event, self._named)
            if not formed:
                continue
            if not self._decided:
                self._decided = True
                self._as_they_are = formed == event
                if self._as_they_are:
                    return events[number:]
            found.append(formed if self._foreign is None else self._foreign(formed))
        return found


def _formed(event: bytes, named: bool) -> bytes:
    """One event in the form, or nothing where it carries no data: comments, ids and retries are between the engine and us."""
    name, data = b"", []
    for line in event.split(b"\n"):
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.strip()
    if not data:
        return b""
    try:
        payload = b"\n".join(data)
        if payload.strip() == b"[DONE]":
            return DONE
        payload = msgspec.json.format(payload, indent=-1)
        if named:
            return b"event: %s\ndata: %s\n\n" % (name or _type(payload), payload)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Malformed(f"an event that is no JSON: {error}") from None
    if name == b"error" and not payload.startswith(b'{"error":'):
        payload = b'{"error":%s}' % payload
    return b"data: %s\n\n" % payload


def _type(payload: bytes) -> bytes:
    """The name of an event that came without: its `type` says it too."""
    return (typed_decoder.decode(payload).type or "").encode()
