"""The grammar of a stream of `/v1/responses`, as SGLang 0.5.23 has it (`entrypoints/openai/serving_responses.py`).

Items one after the other, each added, filled, and closed with its whole content said again; events are numbered; the last one holds the
response with all its items.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator

from backends.sglang_dsv3.continuation.named.events import Event, Grammar, new_id

_PREFIX = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}
# What begins the name of an item's events.
_ABOUT = {"message": "output_text", "reasoning": "reasoning_text", "function_call": "function_call_arguments"}


class _Item:
    """One item that is not closed yet. `part`: whether its part was opened; `closed`: how many of the events that close
    it were there."""

    def __init__(self, kind: str, id: str, index: int, call_id: str = "", name: str = "") -> None:
        self.kind = kind
        self.id = id
        self.index = index
        self.call_id = call_id
        self.name = name
        self.phase = "final_answer"
        self.content = ""
        self.part = kind == "function_call"
        self.closed = 0


class Responses(Grammar):
    """`tools`: whether the request offers any: then a message waits until it is known whether a call follows, which its phase says.
    `summary`: whether thoughts are told as their own summary. `packed`: whether they are handed out for a client to send again."""

    def __init__(self, tools: bool = False, summary: bool = False, packed: bool = False) -> None:
        super().__init__()
        self._tools = tools
        self._summary = summary
        self._packed = packed
        self._response: Event = {}
        self._items: list[Event] = []
        self._open: _Item | None = None
        self._next = 0
        self._waiting: list[Event] = []
        self._usage: Event = {}

    # What was delivered

    def _read(self, event: Event) -> None:
        self._next = event["sequence_number"] + 1
        name: str = event["type"].removeprefix("response.")
        item = self._open
        if name == "created":
            self._response = event["response"]
        elif name == "output_item.added":
            self._read_item(event["item"], event["output_index"])
        elif name == "output_item.done":
            self._items.append(event["item"])
            self._open, self.said = None, event["item"]["type"] == "message"
        elif item is not None and name.endswith("part.added"):
            item.part = True
        elif item is not None and name.endswith(".done"):
            item.closed += 1
            self.said = item.kind == "message"
        elif item is not None and name.endswith(".delta"):
            self._read_delta(item, event["delta"])

    def _read_item(self, item: Event, index: int) -> None:
        kind = item["type"]
        self._open, self.said = _Item(kind, item["id"], index, item.get("call_id", ""), item.get("name", "")), False
        self._open.phase = item.get("phase", self._open.phase)
        if kind == "function_call":
            self._heard_call(item["call_id"], item["name"])

    def _read_delta(self, item: _Item, delta: str) -> None:
        item.content += delta
        match item.kind:
            case "message":
                self._heard(content=delta)
            case "reasoning":
                self._heard(reasoning_content=delta)
            case "function_call":
                self._heard_arguments(delta)

    # What follows

    def _think(self, thoughts: str) -> Iterator[Event]:
        yield from self._fill("reasoning", thoughts)

    def _say(self, text: str) -> Iterator[Event]:
        between_calls = self._open is not None and self._open.kind == "function_call" and not text.strip()
        if not between_calls:
            yield from self._fill("message", text)

    def _call(self, id: str, name: str) -> Iterator[Event]:
        yield from self._close()
        for item in self._items:
            if item["type"] == "message":
                item["phase"] = "commentary"
        yield from self._let_go("commentary")
        yield from self._add(_Item("function_call", new_id("fc_", 8), len(self._items), id, name))

    def _argue(self, arguments: str) -> Iterator[Event]:
        if self._open is not None and self._open.kind == "function_call":
            yield from self._fill("function_call", arguments)

    def _used(self, usage: Event) -> None:
        self._usage = usage

    def _end(self) -> Iterator[Event]:
        yield from self._close()
        response = {**self._response, "output": self._items, "usage": self._counted()}
        response["status"] = "incomplete" if self.finish == "length" else "completed"
        if self.finish == "length":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        if response.get("text") is None and self._items and all(item["type"] == "message" for item in self._items):
            response["text"] = {"format": {"type": "text"}}
        yield from self._let_go("final_answer")
        yield self._numbered({"type": f"response.{response['status']}", "response": response})

    def _counted(self) -> Event:
        prompt, completion = self._usage["prompt_tokens"], self._usage["completion_tokens"]
        cached = (self._usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": min(cached, prompt), "cache_write_tokens": 0},
            "output_tokens": completion,
            "output_tokens_details": {"reasoning_tokens": self._usage.get("reasoning_tokens") or 0},
            "total_tokens": prompt + completion,
        }

    def _numbered(self, event: Event) -> Event:
        number, self._next = self._next, self._next + 1
        return {**event, "sequence_number": number}

    def _tell(self, item: _Item, name: str, more: Event) -> Iterator[Event]:
        """An event about an item; those of a message wait where a call may follow."""
        about = {} if "item" in more else {"item_id": item.id}
        event = self._numbered({"type": f"response.{name}", **about, **more, "output_index": item.index})
        if self._waiting or (self._tools and name == "output_item.added" and item.kind == "message"):
            self._waiting.append(event)
        else:
            yield event

    def _let_go(self, phase: str) -> Iterator[Event]:
        """What has waited, now that it is known what follows."""
        for event in self._waiting:
            if event.get("item", {}).get("type") == "message":
                event["item"]["phase"] = phase
            yield event
        self._waiting = []

    def _fill(self, kind: str, delta: str) -> Iterator[Event]:
        item = self._open
        if item is None or item.kind != kind or item.closed:
            yield from self._close()
            item = _Item(kind, new_id(_PREFIX[kind]), len(self._items))
            yield from self._add(item)
        if not item.part:
            yield from self._add_part(item)
        item.content += delta
        more: Event = {**self._place(item), "delta": delta}
        if kind == "message":
            more["logprobs"] = []
        yield from self._tell(item, f"{self._about(item)}.delta", more)

    def _add(self, item: _Item) -> Iterator[Event]:
        self._open = item
        begun: Event = {"id": item.id, "type": item.kind, "status": "in_progress"}
        match item.kind:
            case "message":
                begun |= {"content": [], "role": "assistant", "phase": item.phase}
            case "reasoning":
                begun |= {"summary": [], "content": [], "encrypted_content": None}
            case "function_call":
                begun |= {"arguments": "", "call_id": item.call_id, "name": item.name}
        yield from self._tell(item, "output_item.added", {"item": begun})

    def _add_part(self, item: _Item) -> Iterator[Event]:
        item.part = True
        yield from self._tell(item, f"{self._part(item)}.added", {**self._place(item), "part": self._content(item, "")})

    def _close(self) -> Iterator[Event]:
        """The events that the open item still lacks."""
        item = self._open
        if item is None:
            return
        if not item.part:
            yield from self._add_part(item)
        done = self._done(item)
        said = "arguments" if item.kind == "function_call" else "text"
        closing: list[tuple[str, Event]] = [(f"{self._about(item)}.done", {**self._place(item), said: item.content})]
        if item.kind == "message":
            closing[0][1]["logprobs"] = []
        if item.kind == "function_call":
            closing[0][1]["name"] = item.name
        else:
            closing.append((f"{self._part(item)}.done", {**self._place(item), "part": self._content(item, item.content)}))
        closing.append(("output_item.done", {"item": done}))
        for name, more in closing[item.closed :]:
            yield from self._tell(item, name, more)
        self._items.append(done)
        self._open = None

    def _done(self, item: _Item) -> Event:
        done: Event = {"id": item.id, "type": item.kind, "status": "completed"}
        match item.kind:
            case "message":
                done |= {"content": [self._content(item, item.content)], "role": "assistant", "phase": item.phase}
            case "reasoning":
                told = {"type": "reasoning_text", "text": item.content}
                done |= {"summary": [{**told, "type": "summary_text"}] if self._summary else [], "content": [told]}
                done["encrypted_content"] = _packed(item.content) if self._packed else None
            case "function_call":
                done |= {"arguments": item.content, "call_id": item.call_id, "name": item.name}
        return done

    def _about(self, item: _Item) -> str:
        return "reasoning_summary_text" if self._summary and item.kind == "reasoning" else _ABOUT[item.kind]

    def _part(self, item: _Item) -> str:
        return "reasoning_summary_part" if self._summary and item.kind == "reasoning" else "content_part"

    def _place(self, item: _Item) -> Event:
        if item.kind == "function_call":
            return {}
        return {"summary_index": 0} if self._summary and item.kind == "reasoning" else {"content_index": 0}

    def _content(self, item: _Item, text: str) -> Event:
        if item.kind == "message":
            return {"annotations": [], "text": text, "type": "output_text", "logprobs": None}
        return {"text": text, "type": "summary_text" if self._summary else "reasoning_text"}


def _packed(thoughts: str) -> str:
    """As SGLang hands out thoughts that it does not keep: encoded, not encrypted."""
    return "sglang-reasoning-v1." + base64.urlsafe_b64encode(zlib.compress(thoughts.encode())).decode()
