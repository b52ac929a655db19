"""Going on with an answer whose host died: what may be continued, and the call that continues it.

The delivered text goes back as the beginning of the assistant's message (`continue_final_message`). The engine tokenises it anew, so greedy
text goes on identically where it tokenises back to the tokens that were generated; where it does not, the answer still goes on, in other
words. What cannot go on without a seam is not continued: several choices, tools, grammars, log-probabilities, reasoning.
"""

from __future__ import annotations

from typing import Any

import msgspec

from backends.sglang_dsv3.shapes import Continuation, Delivered, Message, chunk_decoder, raws_decoder
from gateway.plugin import BOUNDS, Call, Endpoint, Reply, Terms, Usage
from gateway.wire import body
from gateway.wire.sse import DONE

# Parameters whose answers cannot be cut in two and joined again.
_UNSOUND = (
    "tools",
    "functions",
    "response_format",
    "regex",
    "ebnf",
    "json_schema",
    "logprobs",
    "top_logprobs",
    "echo",
    "suffix",
    "best_of",
)
_NOTHING = frozenset([b"null", b"false", b"[]", b'{"type":"text"}', b"0"])


def read(delivered: bytes) -> Delivered:
    """The events of one choice, added up."""
    found, pieces = Delivered(), []
    for event in delivered.split(b"\n\n"):
        if not event.startswith(b"data: {"):
            continue
        try:
            chunk = chunk_decoder.decode(event[6:])
        except msgspec.DecodeError:  # content of another shape than text
            found.sound = False
            continue
        found.created = found.created or chunk.created
        found.usage_shown = found.usage_shown or (not chunk.choices and chunk.usage is not None)
        for choice in chunk.choices:
            piece = choice.text if choice.text is not None else choice.delta.content
            if piece:
                pieces.append(piece)
                found.chunks += 1
            if choice.delta.reasoning_content or choice.delta.tool_calls:
                found.sound = False
            found.finished = found.finished or choice.finish_reason is not None
    found.text = "".join(pieces)
    return found


def resumable(call: Call) -> bool:
    """Whether an answer to this call could be continued."""
    if call.endpoint not in (Endpoint.CHAT, Endpoint.COMPLETIONS) or call.choices != 1 or not call.stream:
        return False
    for name in _UNSOUND:
        value = call.fields.get(name)
        if value is not None and bytes(value) not in _NOTHING:
            return False
    return True


def limit_of(call: Call, terms: Terms) -> int | None:
    """The bound on the answer's tokens: the call's own word, else the core's."""
    for name in BOUNDS[call.endpoint]:
        if name in call.fields:
            return _number(call.fields[name])
    return terms.bound


def _number(value: msgspec.Raw) -> int | None:
    """A bound as SGLang reads it: `4`, `4.0` and `"4"` are the same; None for what bounds nothing."""
    try:
        found = int(msgspec.json.decode(value, type=int, strict=False))
    except msgspec.ValidationError:
        return None
    return found if found > 0 else None


def resume(call: Call, terms: Terms, delivered: bytes, usage: Usage | None) -> Call | Reply | None:
    """See `gateway.plugin.Backend.resume`; `usage` is what the engine itself has told, if anything."""
    found = read(delivered)
    if not found.sound or not resumable(call):
        return None
    used = usage.completion_tokens if usage is not None and usage.completion_tokens else found.chunks
    prompt = usage.prompt_tokens if usage is not None and usage.prompt_tokens else terms.prompt_tokens
    limit = limit_of(call, terms)
    if found.finished or (limit is not None and used >= limit):
        return closing(call, delivered, Usage(prompt, used))
    fields = _continued(call, found.text) if found.text else call.fields
    if fields is None:
        return None
    if limit is not None:
        names = BOUNDS[call.endpoint]
        fields = {name: value for name, value in fields.items() if name not in names}
        fields[names[0]] = body.encode(limit - used)
    return msgspec.structs.replace(call, fields=fields, continues=Continuation(found.created, prompt if found.text else 0, used))


def _continued(call: Call, text: str) -> body.Fields | None:
    """The call's fields with what was delivered put where the engine goes on from it; None where it would not."""
    if _inside_a_stop(call, text):
        return None
    if call.endpoint is Endpoint.COMPLETIONS:
        prompt = msgspec.json.decode(call.fields["prompt"])
        return {**call.fields, "prompt": body.encode(prompt + text)} if isinstance(prompt, str) else None
    messages = raws_decoder.decode(call.fields["messages"])
    last = msgspec.json.decode(messages[-1], type=Message)
    if last.role == "assistant":
        going_on = call.fields.get("continue_final_message")
        if going_on is None or bytes(going_on) != b"true" or not isinstance(last.content, str):
            return None  # two assistants' messages in a row are not what the template was made for
        messages.pop()
        text = last.content + text
    messages.append(body.encode({"role": "assistant", "content": text}))
    return {**call.fields, "messages": body.encode(messages), "continue_final_message": body.encode(True)}


def _inside_a_stop(call: Call, text: str) -> bool:
    """Whether the text ends in what may be the beginning of a stop word: its end would not be recognised on the other side."""
    if "stop" not in call.fields:
        return False
    stop = msgspec.json.decode(call.fields["stop"])
    words = [stop] if isinstance(stop, str) else stop or []
    return any(text.endswith(word[:length]) for word in words for length in range(1, len(word)))


class Ending(Reply):
    """Events that no host has to be asked for."""

    streams = True
    content_type = b"text/event-stream; charset=utf-8"

    def __init__(self, events: bytes, usage: Usage) -> None:
        self.usage = usage
        self._left = events

    async def next(self) -> bytes:
        """All of them at once."""
        events, self._left = self._left, b""
        return events


def closing(call: Call, delivered: bytes, usage: Usage) -> Reply:
    """The events that the client lacks of an answer whose text is complete."""
    found = read(delivered)
    kind = "chat.completion.chunk" if call.endpoint is Endpoint.CHAT else "text_completion"
    head = {"id": call.id, "object": kind, "created": found.created, "model": call.model}
    events = []
    if not found.finished:
        empty: dict[str, Any] = {"delta": {}} if call.endpoint is Endpoint.CHAT else {"text": ""}
        events.append({**head, "choices": [{"index": 0, **empty, "logprobs": None, "finish_reason": "length"}]})
    if call.show_usage and not found.usage_shown:
        total = usage.prompt_tokens + usage.completion_tokens
        counts = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens, "total_tokens": total}
        events.append({**head, "choices": [], "usage": counts})

    return Ending(b"".join(b"data: " + msgspec.json.encode(event) + b"\n\n" for event in events) + DONE, usage)
