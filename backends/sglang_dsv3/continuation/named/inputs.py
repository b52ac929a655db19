"""A request to `/v1/responses` as a chat's, as SGLang 0.5.23 makes one of it (`entrypoints/openai/serving_responses.py`)."""

from __future__ import annotations

import msgspec

from backends.sglang_dsv3.continuation.named.events import Event, NoChat
from gateway.wire import body

# Parameters that a chat has by the same name.
_SAME = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "stop", "parallel_tool_calls",
    "max_output_tokens",
)  # fmt: skip
# Tokens that SGLang takes off a response's bound, for those it may add itself.
HEADROOM = 2
# What SGLang puts before a developer's words, which templates know as a system's.
_DEVELOPER = "Developer instructions:\n"


def parameters(fields: body.Fields) -> body.Fields:
    """All but the messages, under chat's names but for the bound; raises NoChat or msgspec.DecodeError."""
    if "previous_response_id" in fields:
        raise NoChat("what was said before is known to the host that is gone, and to no other")
    if "background" in fields and bytes(fields["background"]) == b"true":
        raise NoChat("an answer that is made whoever listens")
    found = {name: fields[name] for name in _SAME if name in fields}
    kwargs = msgspec.json.decode(fields["chat_template_kwargs"]) if "chat_template_kwargs" in fields else {}
    effort = msgspec.json.decode(fields["reasoning"]).get("effort", "medium") if "reasoning" in fields else None
    if effort is not None:
        found["reasoning_effort"] = body.encode(effort)
    if effort == "none":
        kwargs = {"thinking": False, "enable_thinking": False, **kwargs}
    if kwargs:
        found["chat_template_kwargs"] = body.encode(kwargs)
    if "text" in fields:
        form = msgspec.json.decode(fields["text"]).get("format") or {"type": "text"}
        if form["type"] == "json_schema":
            form = {"type": "json_schema", "json_schema": {"name": form.get("name", "response"), "schema": form["schema"]}}
        found["response_format"] = body.encode(form)
    tools = [_tool(tool) for tool in msgspec.json.decode(fields["tools"])] if "tools" in fields else []
    if tools:
        found["tools"] = body.encode(tools)
        if "tool_choice" in fields:
            choice = msgspec.json.decode(fields["tool_choice"])
            if not isinstance(choice, str):
                choice = {"type": "function", "function": {"name": choice["name"]}}
            found["tool_choice"] = body.encode(choice)
    return found


def _tool(tool: Event) -> Event:
    if tool["type"] != "function":
        raise NoChat(f"a tool of type {tool['type']!r}, which a chat does not have")
    function = {
        "name": tool["name"],
        "description": tool.get("description"),
        "parameters": tool.get("parameters"),
        "strict": tool.get("strict") or False,
    }
    return {"type": "function", "function": function}


def messages(fields: body.Fields) -> list[Event]:
    """The input as a chat's messages; raises NoChat, LookupError, TypeError or msgspec.DecodeError."""
    found: list[Event] = []
    if "instructions" in fields and (instructions := msgspec.json.decode(fields["instructions"])):
        found.append({"role": "system", "content": instructions})
    given = msgspec.json.decode(fields["input"])
    for item in [{"role": "user", "content": given}] if isinstance(given, str) else given:
        if (message := _message(item)) is None:
            continue
        if message["role"] == "assistant" and found and found[-1]["role"] == "assistant":
            found[-1] = _joined(found[-1], message)
        else:
            found.append(message)
    if any(message["role"] == "system" for message in found[1:]):
        raise NoChat("where a system's word stands in the conversation is the chat template's affair")
    return found


def _message(item: Event) -> Event | None:
    match item.get("type", "message"):
        case "message":
            return _of_role(item)
        case "function_call":
            arguments = item.get("arguments")
            try:
                sound = isinstance(arguments, str) and isinstance(msgspec.json.decode(arguments), dict)
            except msgspec.DecodeError:
                sound = False
            function = {"name": item["name"], "arguments": arguments if sound else "{}"}
            call = {"id": item.get("call_id") or item.get("id"), "type": "function", "function": function}
            return {"role": "assistant", "tool_calls": [call]}
        case "function_call_output":
            output = item.get("output", "")
            text = "".join(part.get("text", "") for part in output) if isinstance(output, list) else output
            return {"role": "tool", "tool_call_id": item["call_id"], "content": text}
        case "reasoning":
            texts = [part["text"] for part in item.get("summary") or item.get("content") or () if part.get("text")]
            if not texts and item.get("encrypted_content"):
                raise NoChat("thoughts that are packed")
            return {"role": "assistant", "reasoning_content": "\n".join(texts)} if texts else None
        case other:
            raise NoChat(f"an item of type {other!r}")


def _of_role(item: Event) -> Event:
    found = {name: value for name, value in item.items() if value is not None and name not in ("id", "status", "type")}
    if isinstance(found.get("content"), list):
        found["content"] = [_part(part) for part in found["content"]]
    if found["role"] == "developer":
        if not isinstance(found["content"], str):
            first = next(part for part in found["content"] if part["type"] == "text")
            first["text"] = _DEVELOPER + first["text"]
        found |= {"role": "system"} if isinstance(found["content"], list) else {"role": "system", "content": _DEVELOPER + found["content"]}
    return found


def _part(part: Event) -> Event:
    match part["type"]:
        case "input_text" | "output_text":
            return {"type": "text", "text": part.get("text", "")}
        case "input_image" if isinstance(part.get("image_url"), str):
            return {"type": "image_url", "image_url": {"url": part["image_url"], "detail": part.get("detail") or "auto"}}
        case other:
            raise NoChat(f"a part of type {other!r}")


def _joined(one: Event, other: Event) -> Event:
    """Two of an assistant's messages in a row as one: a turn has a message here for each of its items."""
    if one.get("phase") != other.get("phase") and set(one) != {"role", "reasoning_content"}:
        raise NoChat("an assistant's messages of two phases in a row")
    found = {**one, **{name: other[name] for name in ("phase",) if name in other}}
    said, more = one.get("content") or "", other.get("content") or ""
    if said and more:
        if isinstance(said, list) or isinstance(more, list):
            found["content"] = _parts(said) + _parts(more)
        else:
            found["content"] = f"{said}\n\n{more}"
    elif more:
        found["content"] = more
    if "tool_calls" in other:
        found["tool_calls"] = one.get("tool_calls", []) + other["tool_calls"]
    if "reasoning_content" in other:
        found["reasoning_content"] = "\n".join(message["reasoning_content"] for message in (one, other) if message.get("reasoning_content"))
    return found


def _parts(content: str | list[Event]) -> list[Event]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
