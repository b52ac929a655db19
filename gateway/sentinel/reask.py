"""Answers that are worth asking for once more, seen before a byte of them has left: a JSON answer when it is whole, a stream only while it
has said nothing. Decides; who asks again, and whether that can be afforded, is `serving.dispatch`'s affair."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

from gateway.plugin import Call, Markup, Reply
from gateway.sentinel.answers import Unreadable, read
from gateway.sentinel.rules import broken_calls, is_empty, leaked_call, without_code
from gateway.sentinel.sample import MAX_ANSWER_BYTES, READ, STOPS, says

# What is wrong, in the words of `sentinel.reask`.
CALLS: Final = "tool_calls"
EMPTY: Final = "empty"
# Of a stream so much may come before its first word: those of /v1/responses begin with the whole request.
_MAX_PRELUDE = 256 << 10
_SAYS = re.compile(
    rb'"(?:content|reasoning_content|text|delta|thinking|partial_json|arguments|refusal)": ?"[^"]|"tool_calls": ?\[\{|"type": ?"tool_use"'
)


async def prelude(reply: Reply) -> tuple[bytes, bool]:
    """The blocks of a stream up to the first that says something, and whether it has ended before one did. Raises AttemptFailed."""
    held = b""
    while block := await reply.next():
        held += block
        if _SAYS.search(block) or len(held) > _MAX_PRELUDE:
            return held, False
    return held, True


def wrong(kinds: Collection[str], call: Call, answer: bytes, stream: bool, markup: Markup) -> str:
    """CALLS, EMPTY, or "" where there is nothing to ask for again: an answer, or a stream that has ended and said nothing."""
    if call.endpoint not in READ or len(answer) > MAX_ANSWER_BYTES:
        return ""
    try:
        choices = read(call.endpoint, stream, answer)
    except (Unreadable, UnicodeError):
        return ""
    if CALLS in kinds and not stream:
        for said in choices:
            if said.calls and next(broken_calls(said, {}), None) is not None:
                return CALLS
            if "tools" in call.fields and (marker := leaked_call(without_code(said.content), markup)) and not says(call, marker):
                return CALLS
    if EMPTY in kinds and STOPS.isdisjoint(call.fields) and any(is_empty(said) for said in choices):
        return EMPTY
    return ""
