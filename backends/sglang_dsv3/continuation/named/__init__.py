"""Streams with named events, Anthropic's messages and OpenAI's responses, that go on when their host dies.

SGLang makes a chat of either request, and named events of the chat's chunks. What goes on does the same here: the request becomes a chat's,
what was delivered what a chat would have delivered, that chat is continued (see `resume`), and its chunks are written as the events that
would have come.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import msgspec

from backends.sglang_dsv3.continuation import resume
from backends.sglang_dsv3.continuation.named import inputs, messages
from backends.sglang_dsv3.continuation.named.events import Grammar, NoChat
from backends.sglang_dsv3.continuation.named.messages import Messages
from backends.sglang_dsv3.continuation.named.responses import Responses
from gateway.plugin import Call, Endpoint, Reply, Terms, Usage
from gateway.wire import body

# How a chat is continued, from what of it was delivered and what it has used.
Again = Callable[[Call, bytes, Usage | None], Call | Reply | None]

_BAD = (NoChat, LookupError, TypeError, AttributeError, ValueError, msgspec.MsgspecError)


class Going(msgspec.Struct, frozen=True):
    """`Call.continues` of such a stream. `chat`: its request as a chat's; `grammar`: where it stands, to be copied by who writes; `usage`:
    what engines have told of it, None where only its events were counted."""

    chat: Call
    terms: Terms
    grammar: Grammar
    usage: Usage | None
    again: Again

    def copy(self) -> Grammar:
        """For one attempt: one that fails before it has said anything must leave no trace."""
        return copy.deepcopy(self.grammar)


class Written(Reply):
    """A chat's stream, written as named events."""

    streams = True
    content_type = b"text/event-stream; charset=utf-8"

    def __init__(self, chat: Reply | None, grammar: Grammar) -> None:
        self.chat = chat
        self.grammar = grammar

    async def next(self) -> bytes:
        """See `Reply`."""
        assert self.chat is not None, "it has not begun"
        while said := await self.chat.next():
            if block := self.grammar.write(said):
                return block
        return b""

    def close(self) -> Usage | None:
        """See `Reply`."""
        if self.chat is not None:
            self.usage = self.chat.close()
            self.finishes, self.late = self.chat.finishes, self.chat.late
        return self.usage


def speaks(call: Call) -> bool:
    """Whether an answer to this call is a stream of named events."""
    return call.endpoint is Endpoint.MESSAGES or call.endpoint is Endpoint.RESPONSES


def resumable(call: Call) -> bool:
    """See `Backend.resumable`: as far as the parameters tell, without a look at the conversation or into the tools, which are large."""
    tools = {name: value for name, value in call.fields.items() if name == "tools"}
    try:
        plain = _parameters(call.endpoint, {name: value for name, value in call.fields.items() if name not in ("tools", "tool_choice")})
        return call.stream and resume.resumable(_chat(call, {**plain, **tools}))
    except _BAD:
        return False


def _parameters(endpoint: Endpoint, fields: body.Fields) -> body.Fields:
    return messages.parameters(fields) if endpoint is Endpoint.MESSAGES else inputs.parameters(fields)


def _chat(call: Call, fields: body.Fields) -> Call:
    return msgspec.structs.replace(call, endpoint=Endpoint.CHAT, fields=fields, show_usage=True, continues=None)


def _as_chat(call: Call, terms: Terms) -> Call:
    """The request as a chat's, with the bound that its own endpoint would have set; raises NoChat."""
    fields = _parameters(call.endpoint, call.fields)
    said = messages.messages(call.fields) if call.endpoint is Endpoint.MESSAGES else inputs.messages(call.fields)
    fields["messages"] = body.encode(said)
    fields["model"] = body.encode(call.model)
    if call.endpoint is Endpoint.RESPONSES:
        own = fields.pop("max_output_tokens", None)
        limit = terms.bound if own is None else msgspec.json.decode(own, type=int, strict=False)
        if limit is not None:
            if limit <= inputs.HEADROOM:
                raise NoChat("an answer without a token")
            fields["max_tokens"] = body.encode(limit - inputs.HEADROOM)
    return _chat(call, {**fields, "stream": body.encode(True)})


def _grammar(call: Call) -> Grammar:
    if call.endpoint is Endpoint.MESSAGES:
        return Messages()
    fields = call.fields
    reasoning = msgspec.json.decode(fields["reasoning"]) if "reasoning" in fields else {}
    packed = "include" in fields and "reasoning.encrypted_content" in msgspec.json.decode(fields["include"])
    return Responses("tools" in fields, reasoning.get("summary") is not None, packed)


def go_on(going: Going, grammar: Grammar, usage: Usage | None) -> Call | Reply | None:
    """How the chat goes on where so much was used."""
    if grammar.said and not grammar.finish and "tools" not in going.chat.fields:
        limit = resume.limit_of(going.chat, going.terms)
        used = grammar.passed if usage is None else usage.completion_tokens
        grammar.finish = "length" if limit is not None and used >= limit else "stop"
    return going.again(going.chat, grammar.as_chat(), usage)


def resume_named(call: Call, terms: Terms, usage: Usage | None, delivered: bytes, again: Again) -> Call | Reply | None:
    """How to go on with a stream of which the client has `delivered`, and for which the engines have told `usage`, if anything."""
    try:
        chat, grammar = _as_chat(call, terms), _grammar(call)
        grammar.read(delivered)
    except _BAD:
        return None
    going = Going(chat, terms, grammar, usage, again)
    grammar = going.copy()
    if usage is None and grammar.prompt_tokens:
        usage = Usage(grammar.prompt_tokens, grammar.passed)
    found = go_on(going, grammar, usage)
    if found is None:
        return None
    if isinstance(found, Reply) and usage is not None:
        return Written(found, grammar)
    return msgspec.structs.replace(call, continues=going)
