"""JSON answers put together from streams, in the shape in which SGLang 0.5.23 gives them."""

from __future__ import annotations

import abc
from typing import Any

import msgspec

from backends.sglang_dsv3 import failures
from backends.sglang_dsv3.abandon import MAX_JSON_BYTES
from backends.sglang_dsv3.translate import INTERNAL_FIELDS
from gateway.plugin import Call, Endpoint, Gathering
from gateway.wire import body

Event = dict[str, Any]


class _Gathered(Gathering):
    """What all have in common."""

    def __init__(self, call: Call) -> None:
        super().__init__(msgspec.structs.replace(call, stream=True, show_usage=True, fields={**call.fields, "stream": body.encode(True)}))
        self._bytes = 0

    def add(self, block: bytes) -> None:
        """See `Gathering`."""
        self._bytes += len(block)
        if self._bytes > MAX_JSON_BYTES:
            raise failures.nonsense("an answer that is too large")
        for event in block.split(b"\n\n"):
            if (at := event.find(b"data: {")) >= 0:
                try:
                    self._add(msgspec.json.decode(event[at + 6 :]))
                except (msgspec.DecodeError, LookupError, TypeError, AttributeError) as error:
                    raise failures.nonsense(f"an event that belongs to no answer: {error}") from None

    @abc.abstractmethod
    def _add(self, event: Event) -> None: ...


class _Choice:
    """One of them."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.thoughts: list[str] = []
        self.calls: dict[int, Event] = {}
        self.logprobs: dict[str, list[Any]] | None = None
        self.end: Event = {}

    def add(self, choice: Event) -> None:
        """What a chunk says of it."""
        delta = choice.get("delta") or {}
        self.text.append(choice.get("text") or delta.get("content") or "")
        self.thoughts.append(delta.get("reasoning_content") or "")
        for call in delta.get("tool_calls") or ():
            known = self.calls.setdefault(
                call["index"], {"id": None, "index": call["index"], "type": "function", "function": {"arguments": []}}
            )
            known["id"] = call.get("id") or known["id"]
            function = call.get("function") or {}
            if function.get("name"):
                known["function"]["name"] = function["name"]
            known["function"]["arguments"].append(function.get("arguments") or "")
        if choice.get("logprobs"):
            self.logprobs = self.logprobs or {}
            for name, values in choice["logprobs"].items():
                self.logprobs.setdefault(name, []).extend(values or ())
        if choice.get("finish_reason"):
            self.end = {"finish_reason": choice["finish_reason"], "matched_stop": choice.get("matched_stop")}

    def message(self) -> Event:
        """Of a chat."""
        found: Event = {"role": "assistant", "content": "".join(self.text), "reasoning_content": "".join(self.thoughts) or None}
        if self.calls:
            found["tool_calls"] = [
                {**call, "function": {"name": call["function"]["name"], "arguments": "".join(call["function"]["arguments"])}}
                for _, call in sorted(self.calls.items())
            ]
        return found


class Chunks(_Gathered):
    """Of chats and completions."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._choices: dict[int, _Choice] = {}
        self._created = 0
        self._usage: Event | None = None

    def _add(self, event: Event) -> None:
        self._created = self._created or event["created"]
        self._usage = event.get("usage") or self._usage
        for choice in event["choices"]:
            self._choices.setdefault(choice["index"], _Choice()).add(choice)

    def whole(self) -> bytes:
        """See `Gathering`."""
        call, chat = self.call, self.call.endpoint is Endpoint.CHAT
        choices = [
            {
                "index": index,
                **({"message": choice.message()} if chat else {"text": "".join(choice.text)}),
                "logprobs": choice.logprobs,
                **choice.end,
            }
            for index, choice in sorted(self._choices.items())
        ]
        kind = "chat.completion" if chat else "text_completion"
        head = {"id": call.id, "object": kind, "created": self._created, "model": call.model}
        return msgspec.json.encode({**head, "choices": choices, "usage": self._usage})


class Messages(_Gathered):
    """Of Anthropic's messages."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._message: Event = {}
        self._blocks: list[Event] = []
        self._pieces: list[str] = []

    def _add(self, event: Event) -> None:
        match event["type"]:
            case "message_start":
                self._message = event["message"]
            case "content_block_start":
                self._blocks.append(event["content_block"])
            case "content_block_delta":
                self._pieces += [text for name, text in event["delta"].items() if name in ("text", "thinking", "partial_json")]
            case "content_block_stop":
                self._fill(self._blocks[-1], "".join(self._pieces))
                self._pieces = []
            case "message_delta":
                self._message |= event["delta"]
                self._message["usage"] |= event["usage"]

    def _fill(self, block: Event, content: str) -> None:
        if block["type"] != "tool_use":
            block[block["type"]] = content
            return
        try:
            block["input"] = msgspec.json.decode(content)
        except msgspec.DecodeError:  # what SGLang does with arguments that are none
            block["input"] = {}

    def whole(self) -> bytes:
        """See `Gathering`."""
        return msgspec.json.encode({**self._message, "content": self._blocks or [{"type": "text", "text": ""}]})


class Responses(_Gathered):
    """Of `/v1/responses`: the last event holds all of it."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._response: Event = {}

    def _add(self, event: Event) -> None:
        if "response" in event:
            self._response = event["response"]

    def whole(self) -> bytes:
        """See `Gathering`."""
        return msgspec.json.encode(self._response)


_KINDS: dict[Endpoint, type[_Gathered]] = {
    Endpoint.CHAT: Chunks,
    Endpoint.COMPLETIONS: Chunks,
    Endpoint.MESSAGES: Messages,
    Endpoint.RESPONSES: Responses,
}


def gather(call: Call) -> Gathering | None:
    """See `Backend.gather`. What the operator allows of the engine's inside is not in streams, or elsewhere there; log-probabilities
    of chats have gaps in theirs (tokens that end in half a character), those of responses are not in them at all, and what is made in the
    background has no stream that anybody waits for."""
    kind = _KINDS.get(call.endpoint)
    if kind is None or not INTERNAL_FIELDS.isdisjoint(call.fields):
        return None
    if call.endpoint is Endpoint.CHAT and bytes(call.fields.get("logprobs", b"false")) != b"false":
        return None
    if kind is Responses and not {"include", "background"}.isdisjoint(call.fields):
        return None
    return kind(call)
