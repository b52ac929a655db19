"""Requests that run as they stand, for every endpoint that some configured model is served on, and what a streamed answer looks like."""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.plugin import Endpoint

_HELLO = [{"role": "user", "content": "Hello"}]
# What each endpoint is asked beside the model; the first is what the page begins with. All of it holds under `strict_parameters` too.
_ASKED: dict[Endpoint, dict[str, dict[str, Any]]] = {
    Endpoint.CHAT: {
        "An answer in one piece": {"messages": _HELLO, "max_tokens": 32},
        "A stream": {"messages": _HELLO, "max_tokens": 32, "stream": True},
    },
    Endpoint.COMPLETIONS: {
        "An answer in one piece": {"prompt": "Once upon a time", "max_tokens": 32},
        "A stream": {"prompt": "Once upon a time", "max_tokens": 32, "stream": True},
    },
    Endpoint.EMBEDDINGS: {"A text": {"input": "Hello", "encoding_format": "float"}},
    Endpoint.RESPONSES: {
        "An answer in one piece": {"input": "Hello", "max_output_tokens": 32},
        "A stream": {"input": "Hello", "max_output_tokens": 32, "stream": True},
    },
    Endpoint.INPUT_TOKENS: {"A text": {"input": "Hello"}},
    Endpoint.MESSAGES: {
        "An answer in one piece": {"messages": _HELLO, "max_tokens": 32},
        "A stream": {"messages": _HELLO, "max_tokens": 32, "stream": True},
    },
    Endpoint.COUNT_TOKENS: {"A message": {"messages": _HELLO}},
    Endpoint.RERANK: {"Two documents": {"query": "Where do eels spawn?", "documents": ["In the Sargasso Sea.", "In a box."]}},
    Endpoint.SCORE: {"Two items": {"query": "Is it so? ", "items": ["yes", "no"], "label_token_ids": [5, 6]}},
    Endpoint.TOKENIZE: {"A text": {"prompt": "Hello"}},
}


def requests(endpoint: Endpoint, model: str) -> dict[str, Any]:
    """Examples of its requests, by a short name each."""
    return {
        name.lower().replace(" ", "-"): {"summary": name, "value": {"model": model, **asked}} for name, asked in _ASKED[endpoint].items()
    }


def stream(endpoint: Endpoint, model: str) -> str:
    """A short stream as it goes over the wire; "" for an endpoint that has none."""
    if endpoint is Endpoint.CHAT:
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, {"content": "Hi"}, {}]
        return _chunks("chatcmpl-0", "chat.completion.chunk", model, [{"delta": delta} for delta in deltas])
    if endpoint is Endpoint.COMPLETIONS:
        return _chunks("cmpl-0", "text_completion", model, [{"text": "there"}, {"text": " was"}, {"text": ""}])
    if endpoint is Endpoint.RESPONSES:
        made = {"id": "resp_0", "object": "response", "created_at": 0, "model": model, "output": []}
        place = {"item_id": "msg_0", "output_index": 0, "content_index": 0}
        return _named(
            {"type": "response.created", "response": {**made, "status": "in_progress"}, "sequence_number": 0},
            {"type": "response.output_text.delta", **place, "delta": "Hi", "sequence_number": 1},
            {"type": "response.completed", "response": {**made, "status": "completed"}, "sequence_number": 2},
        )
    if endpoint is Endpoint.MESSAGES:
        usage = {"input_tokens": 8, "output_tokens": 0}
        message = {"id": "msg_0", "type": "message", "role": "assistant", "content": [], "model": model, "usage": usage}
        return _named(
            {"type": "message_start", "message": message},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}},
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}},
            {"type": "message_stop"},
        )
    return ""


def _chunks(id: str, kind: str, model: str, choices: list[dict[str, Any]]) -> str:
    head = {"id": id, "object": kind, "created": 0, "model": model}
    last = len(choices) - 1
    ends = [None if number < last else "stop" for number in range(last + 1)]
    sent = [{**head, "choices": [{"index": 0, **choice, "finish_reason": end}]} for choice, end in zip(choices, ends, strict=True)]
    return "".join(f"data: {_json(chunk)}\n\n" for chunk in sent) + "data: [DONE]\n\n"


def _named(*events: dict[str, Any]) -> str:
    return "".join(f"event: {event['type']}\ndata: {_json(event)}\n\n" for event in events)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
