"""An answer that is to be judged, and how a worker comes by it: no event is decoded on its way, and no prompt is kept that need not be.

What a stream has said is at hand when it ends, since it is kept in case another host has to go on with it (`serving.kept`); of streams that
no host could go on with it is kept for this alone, and of few at once. Which answers are taken is decided by numbers in the request's path
(`Sampler`), and everything else when its record is observed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from gateway.config import Sentinel
from gateway.plugin import Call, Endpoint, Markup
from gateway.serving.kept import Answer, Kept

if TYPE_CHECKING:
    from gateway.telemetry.record import Record

# A larger answer is left out, and of tools that are larger the schemas.
MAX_ANSWER_BYTES = 512 << 10
MAX_TOOLS_BYTES = 256 << 10
# What a client has written is looked through up to here.
MAX_SAID_BYTES = 1 << 20
# Of a prompt that may be kept so much is.
MAX_PROMPT_BYTES = 16 << 10
# So many streams at once are kept for this alone; of each at most `relay.MAX_HELD_BYTES`.
MAX_HELD = 64
# Whose answers are read.
READ = frozenset([Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.MESSAGES, Endpoint.RESPONSES])
_PROMPTS = ("messages", "input", "prompt", "system", "instructions", "tools")
# With one of these an empty answer may be what was asked for.
STOPS = frozenset(["stop", "stop_sequences", "stop_regex", "stop_token_ids", "continue_final_message"])
_REPLACEMENT = "\ufffd"
_LETTERS = re.compile(r"[A-Za-z]{3,}")


class Sampler:
    """Which answers are taken: `share` of them, and no more than `per_second` of this worker's. The request's path reads and writes these
    fields itself, which takes no call."""

    __slots__ = ("due", "held", "left", "per_second", "share", "until")

    def __init__(self, settings: Sentinel, workers: int) -> None:
        self.share = settings.share
        self.per_second = max(1, settings.per_second // workers)
        self.due = 0.0
        self.left = 0
        # When there are as many to be taken again (monotonic seconds).
        self.until = 0.0
        # Streams that are kept for this alone.
        self.held = 0


class Sample(msgspec.Struct, tag="sample", frozen=True, omit_defaults=True):
    """One answer, and what of its request its judge must know. A stream is packed as `serving.kept` has packed it."""

    id: str
    request_id: str
    backend: str
    host: str
    weights: str
    endpoint: Endpoint
    stream: bool
    answer: bytes
    beginning: bytes = b""
    end: bytes = b""
    # What it is counted by: calls of one conversation go to one host, and are no evidence of each other.
    unit: int | None = None
    # Whether tools were offered, and these, as the client wrote them.
    offered: bool = False
    tools: bytes = b""
    # What must not be in its text: of tool calls, what begins reasoning, and what ends it.
    markup: Markup = Markup()
    # Whether the client named words at which it stops, or has itself sent what stands for broken text.
    stops: bool = False
    replaced: bool = False
    prompt: bytes = b""


def sample(record: Record, call: Call, markup: Markup, backend: str, prompts: bool) -> Sample | str:
    """Of a request that was answered whole by one host; or in a word, why it cannot be judged. `prompts`: they may be kept."""
    kept, last = record.answer, record.attempts[-1]
    if call.endpoint not in READ:
        return ""
    if record.continuations:
        return "continued"
    answer = kept.answer() if isinstance(kept, Kept) else kept and Answer(kept)
    if not answer or len(answer.body) > MAX_ANSWER_BYTES:
        return "large"
    fields = call.fields
    said = _said(call)
    if said is None:
        return "large"
    offered = "tools" in fields and len(memoryview(fields["tools"])) > len(b"[{}]")
    tools = bytes(fields["tools"]) if offered and len(memoryview(fields["tools"])) <= MAX_TOOLS_BYTES else b""
    return Sample(
        record.call_id,
        record.request_id,
        backend,
        last.target,
        last.weights,
        call.endpoint,
        record.stream,
        answer.body,
        answer.beginning,
        answer.end,
        record.point,
        offered,
        tools,
        markup=_unsaid(markup, said, offered),
        stops=not STOPS.isdisjoint(fields),
        replaced=any(_says(_REPLACEMENT, part) for part in said),
        prompt=b"\n".join(said)[:MAX_PROMPT_BYTES] if prompts else b"",
    )


def _said(call: Call) -> list[bytes] | None:
    """What the client has written; None where it is too much to be looked through."""
    parts = [memoryview(call.fields[name]) for name in _PROMPTS if name in call.fields]
    return None if sum(map(len, parts)) > MAX_SAID_BYTES else [bytes(part) for part in parts]


def says(call: Call, words: str) -> bool:
    """Whether the client has written this itself, or may have."""
    said = _said(call)
    return said is None or any(_says(words, part) for part in said)


def _unsaid(markup: Markup, said: list[bytes], offered: bool) -> Markup:
    """What the client has not written itself: who asks about a mark is answered with it, and with those that belong to it."""

    def spoken(marks: Iterable[str]) -> bool:
        return any(_says(mark, part) for mark in marks for part in said)

    tools = markup.tools if offered and not spoken(markup.tools) else ()
    return Markup(tools) if spoken((*markup.opens, *markup.closes)) else Markup(tools, markup.opens, markup.closes)


def _says(words: str, said: bytes) -> bool:
    """As UTF-8, or as JSON that escapes what is not ASCII, or, as Go's and some others do, what is HTML."""
    escaped = json.dumps(words)[1:-1]
    longest = max(_LETTERS.findall(words), key=len, default="")
    if longest.encode() not in said:  # which is mostly all that a long prompt is searched for
        return False
    return words.encode() in said or escaped.encode() in said or escaped.replace("<", "\\u003c").replace(">", "\\u003e").encode() in said
