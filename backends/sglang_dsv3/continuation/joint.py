"""The rest of a call that broke off in the middle: the model's raw text behind what the client has, put into the events of a call.

Arguments go out as they come. When the text ends the engine's own detector reads the whole of it, what was delivered before included, and
it has to find in it exactly the calls that the client has: then what else it found is delivered too, each call in one piece, and the answer
ends. Where it does not, the answer ends in an error event, as it would have without this.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

import msgspec

from backends.sglang_dsv3 import failures, stream
from backends.sglang_dsv3.continuation import markup
from backends.sglang_dsv3.shapes import Called, Continuation, Parsed, ParsedCall, chunk_decoder, parsed_decoder
from gateway.plugin import Call, Terms
from gateway.wire.sse import DONE

# How often a client hears that there is something while calls are held for the detector: more often than `between_tokens_s` asks for.
PULSE_S = 5.0
_PULSE = b": a call is being written\n\n"
_FINISHED = b'"finish_reason":"'
_STOPPED = b'"finish_reason":"stop"'


def question(call: Call, parser: str, text: str) -> bytes:
    """What `/parse_function_call` is asked."""
    return msgspec.json.encode({"text": text, "tool_call_parser": parser, "tools": call.fields["tools"]})


def pieces(found: list[ParsedCall], start: int) -> list[dict[str, Any]]:
    """Calls from the one with that index on, as deltas."""
    return [
        {
            "index": index,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.parameters},
        }
        for index, call in enumerate(found)
        if index >= start
    ]


class Pulse:
    """Comments in place of nothing, now and then."""

    def __init__(self) -> None:
        self._at = time.monotonic()

    def beat(self, block: bytes) -> bytes:
        """The block, or where it is empty a comment, if none was for a while."""
        now = time.monotonic()
        if not block and now - self._at < PULSE_S:
            return block
        self._at = now
        return block or _PULSE


class Joint(stream.Chunks):
    """Chunks of raw text as the rest of the calls in `call.continues`."""

    def __init__(self, call: Call, terms: Terms, served_name: str | None = None) -> None:
        super().__init__(call, terms, served_name)
        continues = call.continues
        assert isinstance(continues, Continuation)
        assert continues.given is not None
        assert continues.parsers is not None
        self._parser = continues.parsers.tools
        self._created = continues.created
        self._calls = [Called(begun.id, begun.name, begun.arguments) for begun in continues.given.calls]
        form = markup.FORMATS[self._parser]
        self._ends = form.written or form.end
        self._raw = markup.called(self._parser, self._calls)
        # Of the call that was under way: what may not be its arguments any more. None when it is over.
        self._held: str | None = ""
        # Its finish and what follows it.
        self._last: list[bytes] = []
        self._pulse = Pulse()

    def _take(self, events: list[bytes]) -> bytes:
        out: list[bytes] = []
        for event in super()._take(events).split(b"\n\n"):
            if not event.startswith(b"data: "):
                continue
            event += b"\n\n"
            if self._last or event == DONE or event.partition(_FINISHED)[1]:
                self._last.append(event)
                continue
            out += [self._more(choice.delta.content or "") for choice in chunk_decoder.decode(event[6:]).choices]
        if not self.complete:
            return self._pulse.beat(b"".join(out))
        out.append(self._end())
        return b"".join(out)

    def _more(self, text: str) -> bytes:
        self._raw += text
        if self._held is None:
            return b""
        now = self._held + text
        arguments, end, _ = now.partition(self._ends)
        if end:
            self._held = None
        else:
            # White space behind a whole object is none of it; neither is what may become the mark.
            kept = max((length for length in range(1, len(self._ends)) if now.endswith(self._ends[:length])), default=0)
            arguments = now[: len(now) - kept].rstrip()
            self._held = now[len(arguments) :]
        return self._said(arguments.rstrip() if end else arguments)

    def _said(self, arguments: str) -> bytes:
        if not arguments:
            return b""
        self._calls[-1].arguments += arguments
        return self._event([{"index": len(self._calls) - 1, "function": {"arguments": arguments}}])

    def _event(self, calls: list[dict[str, Any]]) -> bytes:
        head = {"id": self._call.id, "object": "chat.completion.chunk", "created": self._created, "model": self._call.model}
        choice = {"index": 0, "delta": {"tool_calls": calls}, "logprobs": None, "finish_reason": None}
        return b"data: " + msgspec.json.encode({**head, "choices": [choice]}) + b"\n\n"

    def _end(self) -> bytes:
        if self._last[0].partition(_STOPPED)[1]:
            self.complete = False
            self.asks = question(self._call, self._parser, self._raw)
            return b""
        rest, self._held = self._held or "", ""
        return self._said(rest.rstrip()) + b"".join(self._last)

    def answered(self, content: bytes) -> bytes:
        """See `EventStream`."""
        self.asks = b""
        found = parsed_decoder.decode(content)
        if not self._sound(found):
            self.failure = failures.nonsense("what the engine generated does not go on with the call that was under way")
            return b""
        more = pieces(found.calls, len(self._calls))
        self.complete, self.reasons = True, ["tool_calls"]
        ending = self._last[0].replace(_STOPPED, b'"finish_reason":"tool_calls"')
        return (self._event(more) if more else b"") + ending + b"".join(self._last[1:])

    def _sound(self, found: Parsed) -> bool:
        """Whether the detector's calls begin with those of the client, whose arguments are whole."""
        if len(found.calls) < len(self._calls):
            return False
        try:
            return all(
                ours.name == theirs.name and msgspec.json.decode(ours.arguments) == msgspec.json.decode(theirs.parameters)
                for ours, theirs in zip(self._calls, found.calls, strict=False)
            )
        except msgspec.DecodeError:
            return False
