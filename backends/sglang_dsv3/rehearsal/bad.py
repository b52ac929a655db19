"""Bad output on command: answers that are well-formed on the wire and wrong in what they say, one kind for each rule of the sentinel.

`[[bad RULE]]` in a prompt asks for one, `[[bad none]]` for a good one of the same making; `POST /rehearsal {"bad": {RULE: share}}` makes
that share of all answers bad, evenly, as a host does whose kernels or parsers are broken. Where tools are offered the first is called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from aiohttp import web

from backends.sglang_dsv3.markup import MARKUP

RULES = ("tool_arguments", "tool_schema", "tool_markup", "reasoning_markup", "empty", "loop", "utf8")
_CALLS, _CALL, _SEPARATOR, _END, _ENDS = MARKUP.tools[:5]
# What stands for a byte that is no UTF-8 until the answer is bytes.
_BYTE = "\x02"
_TEXTS = {
    "": "It is sunny in Paris, and it will stay so until the evening.",
    "tool_markup": f'{_CALLS}{_CALL}get_weather{_SEPARATOR}{{"city":"Paris"}}{_END}{_ENDS}',
    "reasoning_markup": "They ask for the weather, so I should look it up first.\n</think>\n\nIt is sunny in Paris.",
    "empty": "",
    "loop": "It is sunny " + "in the city " * 120,
    "utf8": f"It is {_BYTE} sunny in Paris.",
}
_ARGUMENTS = {"": '{"city": "Paris"}', "tool_arguments": '{"city": "Par', "tool_schema": '{"city": 7}'}
_PIECES = re.compile(r".{1,12}", re.DOTALL)


class Due:
    """Which answers of a host are bad: of each rule its share, evenly."""

    def __init__(self) -> None:
        self._due: dict[str, float] = {}

    def next(self, shares: dict[str, float], tools: bool) -> str:
        """The rule that the next answer breaks, or ""."""
        for rule, share in shares.items():
            if rule.startswith("tool_") and not tools:
                continue
            self._due[rule] = self._due.get(rule, 0.0) + share
            if self._due[rule] >= 1:
                self._due[rule] -= 1
                return rule
        return ""


def answer(path: str, body: dict[str, Any], command: str | None, shares: dict[str, float], due: Due) -> web.Response | None:
    """The answer where a prompt or this host asks for one of these, else None."""
    tools = body.get("tools") or []
    if command is None and not shares:
        return None
    rule = (command if command in RULES else "") if command is not None else due.next(shares, bool(tools))
    calls = bool(tools) and rule in _ARGUMENTS
    text = "" if calls else _TEXTS.get(rule, _TEXTS[""])
    name = (tools[0].get("function") or tools[0]).get("name", "") if tools else ""
    body["made"] += 8
    finish = "tool_calls" if calls else "length" if rule == "loop" else "stop"
    make = {"/v1/messages": _message, "/v1/responses": _response, "/v1/completions": _completion}.get(path, _chat)
    lines = list(make(body, text, [(name, _ARGUMENTS[rule])] if calls else [], finish))
    if body.get("stream"):
        named = path in ("/v1/messages", "/v1/responses")
        names = [f"event: {line['type']}\n" if named else "" for line in lines]
        content = "".join(f"{name}data: {_dumped(line)}\n\n" for name, line in zip(names, lines, strict=True))
        content += "" if named else "data: [DONE]\n\n"
    else:
        content = _dumped(lines[0])
    kind = "text/event-stream" if body.get("stream") else "application/json"
    return web.Response(body=content.encode().replace(_BYTE.encode(), b"\xff"), content_type=kind, charset="utf-8")


def _dumped(line: dict[str, Any]) -> str:
    return json.dumps(line, separators=(",", ":"), ensure_ascii=False).replace("\\u0002", _BYTE)


_USAGE = {"prompt_tokens": 12, "completion_tokens": 8, "total_tokens": 20}
_USED = {"input_tokens": 12, "output_tokens": 8, "total_tokens": 20}


def _chat(body: dict[str, Any], text: str, calls: list[tuple[str, str]], finish: str) -> Iterator[dict[str, Any]]:
    head = {"id": body["ids"][0], "object": "chat.completion", "created": 1795392000, "model": body["model"]}
    called: list[dict[str, Any]] = [
        {"index": number, "id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(calls)
    ]
    if not body.get("stream"):
        message = {"role": "assistant", "content": text if not calls else None, "reasoning_content": None, "tool_calls": called or None}
        yield {**head, "choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": _USAGE}
        return
    head["object"] = "chat.completion.chunk"

    def chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}

    yield chunk({"role": "assistant", "content": ""})
    for piece in _PIECES.findall(text):
        yield chunk({"reasoning_content": None, "content": piece})
    for call in called:
        arguments = call["function"]["arguments"]
        yield chunk({"tool_calls": [{**call, "function": {"name": call["function"]["name"], "arguments": ""}}]})
        for piece in _PIECES.findall(arguments):
            yield chunk({"tool_calls": [{"index": call["index"], "function": {"arguments": piece}}]})
    yield chunk({"reasoning_content": None}, finish)
    if (body.get("stream_options") or {}).get("include_usage"):
        yield {**head, "choices": [], "usage": _USAGE}


def _completion(body: dict[str, Any], text: str, calls: list[tuple[str, str]], finish: str) -> Iterator[dict[str, Any]]:
    head = {"id": body["ids"][0], "object": "text_completion", "created": 1795392000, "model": body["model"]}
    pieces = _PIECES.findall(text) if body.get("stream") else [text]
    for piece in pieces[:-1]:
        yield {**head, "choices": [{"index": 0, "text": piece, "finish_reason": None}]}
    last = pieces[-1] if pieces else ""
    more = {} if body.get("stream") else {"usage": _USAGE}
    yield {**head, "choices": [{"index": 0, "text": last, "finish_reason": finish}], **more}
    if (body.get("stream_options") or {}).get("include_usage"):
        yield {**head, "choices": [], "usage": _USAGE}


def _message(body: dict[str, Any], text: str, calls: list[tuple[str, str]], finish: str) -> Iterator[dict[str, Any]]:
    reason = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[finish]
    head = {"id": body["ids"][0], "type": "message", "role": "assistant", "model": body["model"], "content": []}
    if not body.get("stream"):
        used = [{"type": "tool_use", "id": "toolu_0", "name": name, "input": _parsed(arguments)} for name, arguments in calls]
        content = ([{"type": "text", "text": text}] if text else []) + used
        yield {**head, "content": content, "stop_reason": reason, "usage": _USED}
        return
    yield {"type": "message_start", "message": {**head, "usage": {"input_tokens": 12, "output_tokens": 0}}}
    yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    for piece in _PIECES.findall(text):
        yield {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece}}
    yield {"type": "content_block_stop", "index": 0}
    for number, (name, arguments) in enumerate(calls, 1):
        block = {"type": "tool_use", "id": f"toolu_{number}", "name": name, "input": {}}
        yield {"type": "content_block_start", "index": number, "content_block": block}
        for piece in _PIECES.findall(arguments):
            yield {"type": "content_block_delta", "index": number, "delta": {"type": "input_json_delta", "partial_json": piece}}
        yield {"type": "content_block_stop", "index": number}
    yield {"type": "message_delta", "delta": {"stop_reason": reason}, "usage": {"output_tokens": 8}}
    yield {"type": "message_stop"}


def _parsed(arguments: str) -> Any:
    """What Anthropic's shape has in place of a text; of what is no JSON it can only be the text."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def _response(body: dict[str, Any], text: str, calls: list[tuple[str, str]], finish: str) -> Iterator[dict[str, Any]]:
    message: dict[str, Any] = {
        "type": "message",
        "id": "msg_0",
        "role": "assistant",
        "content": [{"type": "output_text", "text": text, "annotations": []}],
    }
    output: list[dict[str, Any]] = [
        {"type": "function_call", "call_id": f"call_{name}", "name": name, "arguments": given} for name, given in calls
    ] or [message]
    status = "incomplete" if finish == "length" else "completed"
    head = {"id": body["ids"][0], "object": "response", "created_at": 1795392000, "model": body["model"], "output": [], "usage": None}
    whole = {**head, "status": status, "output": output, "usage": _USED}
    if not body.get("stream"):
        yield whole
        return
    yield {"type": "response.created", "response": {**head, "status": "in_progress"}, "sequence_number": 0}
    pieces = _PIECES.findall(text)
    for number, piece in enumerate(pieces, 1):
        yield {"type": "response.output_text.delta", "item_id": "msg_0", "delta": piece, "sequence_number": number}
    yield {"type": f"response.{status}", "response": whole, "sequence_number": len(pieces) + 1}
