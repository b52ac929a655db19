"""What an answer says, read from its bytes: of every endpoint, whole or as events."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gateway.plugin import Endpoint

_DATA = b"data: "
# Anthropic's words for an answer's end, and ours.
_ENDS = {"end_turn": "stop", "tool_use": "tool_calls", "max_tokens": "length", "stop_sequence": "stop"}
FINISHES = ("stop", "length", "tool_calls", "content_filter", "other")


class Unreadable(ValueError):
    """It is no answer of that endpoint."""


@dataclass
class Said:
    """One choice of an answer. Of a call of a tool its name and its arguments, as text."""

    content: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)
    finish: str = ""
    # Whether it refuses: such an answer has no content.
    refusal: bool = False


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    function: _Function | None = None
    index: int | None = None


class _Words(msgspec.Struct):
    content: Any = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    message: _Words | None = None
    delta: _Words | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None


class _Part(msgspec.Struct):
    type: str = ""
    text: str | None = None
    thinking: str | None = None
    refusal: str | None = None
    partial_json: str | None = None
    name: str | None = None
    # An object; a text where the engine could make none of it.
    input: Any = None
    arguments: str | None = None
    content: list[Any] | None = None
    stop_reason: str | None = None


class _Message(msgspec.Struct):
    type: str = ""
    content: list[_Part] | None = None
    stop_reason: str | None = None
    index: int = 0
    content_block: _Part | None = None
    delta: _Part | None = None


class _Response(msgspec.Struct):
    output: list[_Part] = []
    status: str | None = None


class _Named(msgspec.Struct):
    response: _Response | None = None


_chunk = msgspec.json.Decoder(_Chunk)
_message = msgspec.json.Decoder(_Message)
_response = msgspec.json.Decoder(_Response)
_named = msgspec.json.Decoder(_Named)
_part = msgspec.json.Decoder(_Part)


def read(endpoint: Endpoint, stream: bool, text: bytes) -> list[Said]:
    """Its choices in their order; `text` is UTF-8. Raises Unreadable."""
    try:
        if endpoint is Endpoint.MESSAGES:
            return [_of_events(text) if stream else _of_message(_message.decode(text))]
        if endpoint is Endpoint.RESPONSES:
            return [_of_response(_last(text) if stream else _response.decode(text))]
        return _of_chunks(map(_chunk.decode, _events(text)) if stream else [_chunk.decode(text)])
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError) as error:
        raise Unreadable(str(error)) from None


def _events(text: bytes) -> Iterator[bytes]:
    for line in text.split(b"\n"):
        if line.startswith(_DATA) and line != b"data: [DONE]":
            yield line[len(_DATA) :]


def _of_chunks(chunks: Any) -> list[Said]:
    found: dict[int, Said] = {}
    words: dict[int, tuple[list[str], list[str]]] = {}
    for chunk in chunks:
        for choice in chunk.choices or ():
            said = found.setdefault(choice.index, Said())
            content, reasoning = words.setdefault(choice.index, ([], []))
            if choice.text:
                content.append(choice.text)
            said.finish = choice.finish_reason or said.finish
            for part in (choice.message, choice.delta):
                if part is not None:
                    _take(part, said, content, reasoning)
    for index, said in found.items():
        content, reasoning = words[index]
        said.content, said.reasoning = "".join(content), "".join(reasoning)
    return [found[index] for index in sorted(found)]


def _take(part: _Words, said: Said, content: list[str], reasoning: list[str]) -> None:
    if isinstance(part.content, str):
        content.append(part.content)
    if part.reasoning_content:
        reasoning.append(part.reasoning_content)
    said.refusal = said.refusal or bool(part.refusal)
    for number, call in enumerate(part.tool_calls or ()):
        place = number if call.index is None else call.index
        if not 0 <= place < 1000:
            raise Unreadable("a call of a tool at an index that is none")
        while len(said.calls) <= place:
            said.calls.append(["", ""])
        if call.function is not None:
            said.calls[place][0] += call.function.name or ""
            said.calls[place][1] += call.function.arguments or ""


def _of_message(message: _Message) -> Said:
    said = Said(finish=_ENDS.get(message.stop_reason or "", message.stop_reason or ""))
    for part in message.content or ():
        said.content += part.text or ""
        said.reasoning += part.thinking or ""
        if part.type == "tool_use":
            given = part.input if isinstance(part.input, str) else msgspec.json.encode(part.input or {}).decode()
            said.calls.append([part.name or "", given])
    return said


def _of_events(text: bytes) -> Said:
    said, content, reasoning = Said(), list[str](), list[str]()
    calls: dict[int, list[str]] = {}
    for event in map(_message.decode, _events(text)):
        block, delta = event.content_block, event.delta
        if block is not None:
            content.append(block.text or "")
            reasoning.append(block.thinking or "")
            if block.type == "tool_use":
                calls[event.index] = [block.name or "", ""]
                said.calls.append(calls[event.index])
        if delta is not None:
            content.append(delta.text or "")
            reasoning.append(delta.thinking or "")
            if delta.partial_json and event.index in calls:
                calls[event.index][1] += delta.partial_json
            if delta.stop_reason:
                said.finish = _ENDS.get(delta.stop_reason, delta.stop_reason)
    said.content, said.reasoning = "".join(content), "".join(reasoning)
    return said


def _last(text: bytes) -> _Response:
    """The response in the last event that holds one."""
    for event in reversed(list(_events(text))):
        found = _named.decode(event).response
        if found is not None:
            return found
    raise Unreadable("a stream without its response")


def _of_response(response: _Response) -> Said:
    said = Said(finish={"completed": "stop", "incomplete": "length"}.get(response.status or "", response.status or ""))
    for item in response.output:
        if item.type == "function_call":
            said.calls.append([item.name or "", item.arguments or ""])
        for piece in item.content or ():
            part = msgspec.convert(piece, _Part)
            if item.type == "reasoning":
                said.reasoning += part.text or ""
            else:
                said.content += part.text or ""
            said.refusal = said.refusal or bool(part.refusal)
    if said.calls and said.finish == "stop":
        said.finish = "tool_calls"
    return said
