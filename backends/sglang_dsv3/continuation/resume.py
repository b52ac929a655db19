"""Going on with an answer whose host died: what may be continued, and the call that continues it.

The delivered text goes back as the beginning of the assistant's message (`continue_final_message`): SGLang puts it behind the prompt as it
is, with no template between, so thoughts are in context too. The engine tokenises it anew, so greedy text goes on identically where it
tokenises back to the tokens that were generated; where it does not, the answer still goes on, in other words. What the next engine has to
be asked first is in `placing`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from backends.sglang_dsv3.continuation import markup, unfinished
from backends.sglang_dsv3.shapes import Called, Choice, Continuation, Delivered, Message, Parsers, chunk_decoder, raws_decoder
from gateway.plugin import BOUNDS, Call, Endpoint, Reply, Terms, Usage
from gateway.wire import body
from gateway.wire.sse import DONE

# Parameters of completions whose answers cannot be cut in two and joined again.
_UNSOUND = ("regex", "ebnf", "json_schema", "response_format", "logprobs", "echo", "suffix", "best_of")
# What makes chat's text follow a grammar, which begins anew with the first token that another engine generates.
_GRAMMARS = ("response_format", "regex", "ebnf", "json_schema", "structural_tag")
_NOTHING = frozenset([b"null", b"false", b"[]", b'{"type":"text"}', b"0"])


class _Function(msgspec.Struct):
    strict: bool | None = None


class _Tool(msgspec.Struct):
    function: _Function = msgspec.field(default_factory=_Function)


class _Format(msgspec.Struct):
    type: str = ""


_tools = msgspec.json.Decoder(list[_Tool] | None)


def asked(call: Call, name: str) -> bool:
    """Whether a parameter asks for anything."""
    value = call.fields.get(name)
    return value is not None and bytes(value) not in _NOTHING


def read(delivered: bytes) -> Delivered:
    """The events of one choice, added up."""
    found, words, thoughts = Delivered(), list[str](), list[str]()
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
            if choice.delta.reasoning_content:
                # Thoughts after words are none that a prompt could hold.
                found.sound = found.sound and not words and not found.calls
                thoughts.append(choice.delta.reasoning_content)
            if piece and (not found.calls or piece.strip()):  # V3 has a line break between calls
                found.sound = found.sound and not found.calls
                words.append(piece)
            found.chunks += bool(piece or choice.delta.reasoning_content or choice.delta.tool_calls)
            _add_calls(found, choice)
            found.finished = found.finished or choice.finish_reason is not None
            found.unshown += isinstance(choice.matched_stop, int)
    found.text, found.reasoning = "".join(words), "".join(thoughts)
    return found


def _add_calls(found: Delivered, choice: Choice) -> None:
    for piece in choice.delta.tool_calls or ():
        if piece.index == len(found.calls):
            found.calls.append(Called())
        if piece.index != len(found.calls) - 1:  # calls come one after the other
            found.sound = False
            return
        call = found.calls[-1]
        call.id = call.id or piece.id or ""
        if piece.function is not None:
            call.name = call.name or piece.function.name or ""
            call.arguments += piece.function.arguments or ""


def resumable(call: Call) -> bool:
    """Whether an answer to this call could be continued, as far as the call tells: how far it got when it broke tells more."""
    if call.choices != 1 or not call.stream:
        return False
    return call.endpoint is Endpoint.CHAT or (call.endpoint is Endpoint.COMPLETIONS and not any(asked(call, name) for name in _UNSOUND))


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


def resume(call: Call, terms: Terms, delivered: bytes, usage: Usage | None, parsers: Parsers) -> Call | Reply | None:
    """See `gateway.plugin.Backend.resume`; `usage` is what the engine itself has told, if anything, `parsers` what it
    runs with."""
    found = read(delivered)
    if not found.sound or not resumable(call):
        return None
    used = usage.completion_tokens if usage is not None and usage.completion_tokens else found.chunks
    prompt = usage.prompt_tokens if usage is not None and usage.prompt_tokens else terms.prompt_tokens
    thought = usage.reasoning_tokens if usage is not None else None
    limit = limit_of(call, terms)
    if found.finished or (limit is not None and used >= limit):
        return closing(call, delivered, Usage(prompt, used + found.unshown, reasoning_tokens=thought))
    given = bool(found.text or found.reasoning or found.calls)
    if given and _inside_a_stop(call, found):
        return None
    continues = Continuation(found.created, prompt if given else 0, used)
    fields: body.Fields | None = call.fields
    if given and call.endpoint is Endpoint.CHAT:
        if not goes_on(call, found, parsers):
            return None
        if grammar(call) is not None and found.text and not unfinished.rest(found.text):
            return closing(call, delivered, Usage(prompt, used, reasoning_tokens=thought), "stop")
        over = bool(found.calls or (found.text and (thoughts_apart(call) or markup.THOUGHT in found.text)))
        continues = Continuation(found.created, prompt, used, thought, over, found, parsers)
        fields = as_words(call, found, parsers) if not raw(call, found) and parsers.reasoning not in markup.THINKING else fields
    elif given:
        prompted = msgspec.json.decode(call.fields["prompt"])
        fields = {**call.fields, "prompt": body.encode(prompted + found.text)} if isinstance(prompted, str) else None
    if fields is None:
        return None
    if limit is not None:
        names = BOUNDS[call.endpoint]
        fields = {name: value for name, value in fields.items() if name not in names}
        fields[names[0]] = body.encode(limit - used)
    return msgspec.structs.replace(call, fields=fields, continues=continues)


def raw(call: Call, given: Delivered) -> bool:
    """Whether the engine's own parsers could not go on with what was given: it is in the middle of a call, or of a form."""
    return bool(given.calls) or (bool(given.text) and grammar(call) is not None)


def as_words(call: Call, given: Delivered, parsers: Parsers, opened: bool = False) -> body.Fields:
    """The call's fields with what was given put where the engine goes on from it; `opened`: the prompt has opened the thinking."""
    messages = raws_decoder.decode(call.fields["messages"])
    last = msgspec.json.decode(messages[-1], type=Message)
    own = ""
    if last.role == "assistant":
        messages.pop()
        own = last.content
    if parsers.reasoning in markup.STRUCTURED:
        message = {"content": given.text, **({"reasoning_content": given.reasoning} if given.reasoning else {})}
    else:
        message = {"content": own + markup.spoken(given, opened, thoughts_apart(call))}
    messages.append(body.encode({"role": "assistant", **message}))
    return {**call.fields, "messages": body.encode(messages), "continue_final_message": body.encode(True)}


def goes_on(call: Call, given: Delivered, parsers: Parsers) -> bool:
    """Whether another engine could go on with what was given of a chat."""
    last = last_message(call)
    if last.role == "assistant" and (not _continuing(call) or not isinstance(last.content, str)):
        return False  # two assistants' messages in a row are not what the template was made for
    if asked(call, "logprobs"):
        return False  # whose tokens would not be those that the next engine reads
    apart = thoughts_apart(call)
    if given.reasoning and parsers.reasoning not in markup.THINKING and parsers.reasoning not in markup.STRUCTURED:
        return False
    if parsers.reasoning in markup.STRUCTURED and (not apart or last.role == "assistant"):
        return False
    if given.calls:
        return (
            parsers.tools in markup.FORMATS
            and parsers.reasoning not in markup.STRUCTURED
            and grammar(call) is None
            and all(begun.name for begun in given.calls)
        )
    if not given.text or (forced := grammar(call)) is None:
        return True
    # A grammar would wait for the end of thoughts that are over, where an engine always thinks.
    if forced != "json_object" or parsers.reasoning not in ("", "deepseek-v3") or asked(call, "tools"):
        return False
    try:
        unfinished.rest(given.text)
    except unfinished.NotJSONError:
        return False
    return True


def grammar(call: Call) -> str | None:
    """What holds the words or calls of an answer to a form: a parameter's name, `json_object`, or None for nothing."""
    for name in _GRAMMARS:
        if asked(call, name):
            if name != "response_format":
                return name
            found = msgspec.json.decode(call.fields[name], type=_Format)
            if found.type != "text":
                return "json_object" if found.type == "json_object" else name
    if not asked(call, "tools"):
        return None
    choice = bytes(call.fields.get("tool_choice", b'"auto"'))
    if choice not in (b'"auto"', b'"none"', b"null"):
        return "tool_choice"
    try:
        strict = any(tool.function.strict for tool in _tools.decode(call.fields["tools"]) or ())
    except msgspec.ValidationError:
        return "tools"
    return "tools" if strict else None


def _continuing(call: Call) -> bool:
    return bytes(call.fields.get("continue_final_message", b"")) == b"true"


def last_message(call: Call) -> Message:
    """The last of its messages."""
    return msgspec.json.decode(raws_decoder.decode(call.fields["messages"])[-1], type=Message)


def without_last(call: Call) -> msgspec.Raw:
    """The messages but for the last."""
    return body.encode(raws_decoder.decode(call.fields["messages"])[:-1])


def thoughts_apart(call: Call) -> bool:
    """Whether thoughts are told apart from words, as they are unless a client asks for one text."""
    return bytes(call.fields.get("separate_reasoning", b"true")) != b"false"


def _inside_a_stop(call: Call, given: Delivered) -> bool:
    """Whether the text ends in what may be the beginning of a stop word: its end would not be recognised on the other side."""
    if "stop" not in call.fields:
        return False
    text = given.calls[-1].arguments if given.calls else given.text or given.reasoning
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


def closing(call: Call, delivered: bytes, usage: Usage, reason: str = "length") -> Reply:
    """The events that the client lacks of an answer whose text is complete."""
    found = read(delivered)
    kind = "chat.completion.chunk" if call.endpoint is Endpoint.CHAT else "text_completion"
    head = {"id": call.id, "object": kind, "created": found.created, "model": call.model}
    events = []
    if not found.finished:
        empty: dict[str, Any] = {"delta": {}} if call.endpoint is Endpoint.CHAT else {"text": ""}
        events.append({**head, "choices": [{"index": 0, **empty, "logprobs": None, "finish_reason": reason}]})
    if call.show_usage and not found.usage_shown:
        total = usage.prompt_tokens + usage.completion_tokens
        counts = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens, "total_tokens": total}
        counts["reasoning_tokens"] = usage.reasoning_tokens or 0
        events.append({**head, "choices": [], "usage": counts})

    return Ending(b"".join(b"data: " + msgspec.json.encode(event) + b"\n\n" for event in events) + DONE, usage)
