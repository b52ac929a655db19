"""Anthropic's messages: a request as a chat's, and the grammar of their streams, as SGLang 0.5.23 has both
(`entrypoints/anthropic/serving.py`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec

from backends.sglang_dsv3.continuation.named.events import Event, Grammar, NoChat
from gateway.wire import body

# Parameters that a chat has by the same name.
_SAME = ("max_tokens", "temperature", "top_p", "top_k")
_STOPPED = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_FINISHED = {ended: finish for finish, ended in _STOPPED.items()}


def parameters(fields: body.Fields) -> body.Fields:
    """All but the messages; raises NoChat or msgspec.DecodeError."""
    found = {name: fields[name] for name in _SAME if name in fields}
    if "stop_sequences" in fields:
        found["stop"] = fields["stop_sequences"]
    if "thinking" in fields:
        thinks = msgspec.json.decode(fields["thinking"])["type"] != "disabled"
        found["chat_template_kwargs"] = body.encode({"thinking": thinks, "enable_thinking": thinks})
    if "output_config" in fields:
        config = msgspec.json.decode(fields["output_config"])
        if config.get("format"):
            schema = {"name": "response", "schema": config["format"]["schema"], "strict": True}
            found["response_format"] = body.encode({"type": "json_schema", "json_schema": schema})
        if config.get("effort"):
            found["reasoning_effort"] = body.encode("max" if config["effort"] == "xhigh" else config["effort"])
    offered = msgspec.json.decode(fields["tools"]) if "tools" in fields else []
    if tools := [_tool(tool) for tool in offered if tool.get("type") in (None, "custom")]:
        found["tools"] = body.encode(tools)
    if "tool_choice" in fields:
        _choose(msgspec.json.decode(fields["tool_choice"]), found)
    return found


def _tool(tool: Event) -> Event:
    function = {
        "name": tool["name"],
        "description": tool.get("description") or "",
        "parameters": tool["input_schema"],
        "strict": tool.get("strict", False),
    }
    return {"type": "function", "function": function, "defer_loading": tool.get("defer_loading")}


def _choose(choice: Event, found: body.Fields) -> None:
    found["parallel_tool_calls"] = body.encode(not choice.get("disable_parallel_tool_use"))
    kind = choice["type"]
    if kind == "none" or "tools" in found:
        named = {"type": "function", "function": {"name": choice.get("name")}}
        found["tool_choice"] = body.encode(named if kind == "tool" else {"any": "required"}.get(kind, kind))


def messages(fields: body.Fields) -> list[Event]:
    """The conversation as a chat's messages; raises NoChat, LookupError, TypeError or msgspec.DecodeError."""
    found: list[Event] = []
    if "system" in fields:
        system = msgspec.json.decode(fields["system"])
        texts = [system] if isinstance(system, str) else [block["text"] for block in system if block["type"] == "text" and block["text"]]
        if isinstance(system, list) or system.strip():
            found += [{"role": "system", "content": "\n".join(texts)}] if texts else []
    for message in msgspec.json.decode(fields["messages"]):
        if message["role"] not in ("user", "assistant"):
            raise NoChat("where a system's word stands in the conversation is the chat template's affair")
        content = message["content"]
        if isinstance(content, str):
            found.append({"role": message["role"], "content": content})
        elif message["role"] == "user":
            found += _user(content)
        else:
            found.append(_assistant(content))
    return found


def _user(blocks: list[Event]) -> list[Event]:
    """A user's blocks: results of tools are messages of their own, in their place."""
    found: list[Event] = []
    parts: list[Event] = []
    for block in blocks:
        if block["type"] == "tool_result":
            found += _of_user(parts)
            parts = []
            content = block.get("content") or ""
            said = [content] if isinstance(content, str) else [_text(part) for part in content]
            # Texts of one result are parts of one message.
            told: Any = said[0] if len(said) == 1 else [{"type": "text", "text": text} for text in said]
            found.append({"role": "tool", "tool_call_id": block["tool_use_id"], "content": told or ""})
        else:
            parts.append({"type": "text", "text": _text(block)} if block["type"] == "text" else _image(block))
    return found + _of_user(parts)


def _of_user(parts: list[Event]) -> list[Event]:
    if not parts:
        return []
    alone = len(parts) == 1 and parts[0]["type"] == "text"
    return [{"role": "user", "content": parts[0]["text"] if alone else parts}]


def _assistant(blocks: list[Event]) -> Event:
    found: Event = {"role": "assistant"}
    parts, calls = [], []
    for block in blocks:
        if block["type"] == "tool_use":
            function = {"name": block["name"], "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": block["id"], "type": "function", "function": function})
        else:
            parts.append(_text(block))
    if calls:
        found["tool_calls"] = calls
    if parts or not calls:
        found["content"] = parts[0] if len(parts) == 1 else [{"type": "text", "text": text} for text in parts] or ""
    return found


def _text(block: Event) -> str:
    if block["type"] != "text":
        raise NoChat(f"a block of type {block['type']!r}")
    text: str = block["text"]
    return text


def _image(block: Event) -> Event:
    if block["type"] != "image":
        raise NoChat(f"a block of type {block['type']!r}")
    source = block["source"]
    url = f"data:{source.get('media_type', 'image/png')};base64,{source['data']}" if source["type"] == "base64" else source["url"]
    return {"type": "image_url", "image_url": {"url": url}}


class Messages(Grammar):
    """message_start, then blocks one after the other, each opened, filled and closed, then message_delta and message_stop."""

    def __init__(self) -> None:
        super().__init__()
        self._index = 0
        self._open = ""
        self._ended = False
        self._completion_tokens = 0

    def _read(self, event: Event) -> None:
        match event["type"]:
            case "message_start":
                usage = event["message"]["usage"]
                self.prompt_tokens = usage["input_tokens"] + usage.get("cache_read_input_tokens", 0)
            case "content_block_start":
                self._index, block = event["index"], event["content_block"]
                self._open, self.said = block["type"], False
                if self._open == "tool_use":
                    self._heard_call(block["id"], block["name"])
            case "content_block_delta":
                self._read_delta(event["delta"])
            case "content_block_stop":
                self.said = self._open == "text"
                self._index, self._open = event["index"] + 1, ""
            case "message_delta":
                self.finish, self._ended = _FINISHED[event["delta"]["stop_reason"]], True
                self._completion_tokens = event["usage"]["output_tokens"]

    def _read_delta(self, delta: Event) -> None:
        match delta["type"]:
            case "text_delta":
                self._heard(content=delta["text"])
            case "thinking_delta":
                self._heard(reasoning_content=delta["thinking"])
            case "input_json_delta":
                self._heard_arguments(delta["partial_json"])

    def _close(self) -> Iterator[Event]:
        if self._open:
            yield {"type": "content_block_stop", "index": self._index}
            self._index, self._open = self._index + 1, ""

    def _block(self, kind: str, **content: Any) -> Iterator[Event]:
        """See to it that a block of this kind is open: calls have one each."""
        if self._open != kind or kind == "tool_use":
            yield from self._close()
            yield {"type": "content_block_start", "index": self._index, "content_block": {"type": kind, **content}}
            self._open = kind

    def _fill(self, kind: str, **content: str) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": {"type": kind, **content}}

    def _think(self, thoughts: str) -> Iterator[Event]:
        yield from self._block("thinking", thinking="")
        yield self._fill("thinking_delta", thinking=thoughts)

    def _say(self, text: str) -> Iterator[Event]:
        yield from self._block("text", text="")
        yield self._fill("text_delta", text=text)

    def _call(self, id: str, name: str) -> Iterator[Event]:
        yield from self._block("tool_use", id=id, name=name, input={})

    def _argue(self, arguments: str) -> Iterator[Event]:
        if self._open == "tool_use":
            yield self._fill("input_json_delta", partial_json=arguments)

    def _used(self, usage: Event) -> None:
        self._completion_tokens = usage["completion_tokens"]

    def _end(self) -> Iterator[Event]:
        yield from self._close()
        if not self._ended:
            delta, usage = {"stop_reason": _STOPPED.get(self.finish, "end_turn")}, {"output_tokens": self._completion_tokens}
            yield {"type": "message_delta", "delta": delta, "usage": usage}
        yield {"type": "message_stop"}
