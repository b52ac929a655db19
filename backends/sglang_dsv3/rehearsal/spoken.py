"""An engine that was started with DeepSeek-V3.1's parsers (`--speaks`): it thinks (`[[thinks 8]]`) where the call asks for it, speaks
(`[[tokens 8]]`), and calls a tool (`[[calls 8]]`, so many numbers in its arguments) where one is offered, in the events of SGLang 0.5.23.

Everything it says is a list of raw tokens, known in advance; an answer that is to go on must be given back as its raw text, to the letter,
or it is refused with 400. Token ids are places in a list of all texts that it was ever asked to tokenise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from aiohttp import web

THINK, THOUGHT = "<think>", "</think>"
_CALLS, _CALL, _NAMED = "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"
_CALLED, _ALL_CALLED = "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"
_WHOLE = re.compile(f"{_CALL}(.*?){_NAMED}(.*?){_CALLED}", re.DOTALL)
NAME = "get_weather"
INFO = {"reasoning_parser": "deepseek-v3", "tool_call_parser": "deepseekv31"}
COMMANDS = ("thinks", "calls")
VOCABULARY = web.AppKey("vocabulary", list[str])


def add(app: web.Application) -> None:
    """Its routes."""
    app[VOCABULARY] = [THINK, THINK + "\n", THOUGHT]  # whose ids are those of every such server
    app.router.add_post("/tokenize", _tokenize)
    app.router.add_post("/parse_function_call", _parse)


def _ids(app: web.Application, *texts: str) -> list[int]:
    words = app[VOCABULARY]
    words += [text for text in dict.fromkeys(texts) if text not in words]
    return [words.index(text) for text in texts]


async def _tokenize(request: web.Request) -> web.Response:
    body = await request.json()
    if "messages" in body:
        tokens: Any = _ids(request.app, json.dumps(body["messages"]), THINK if thinks(body) else THOUGHT)
    elif isinstance(body["prompt"], str):
        tokens = _ids(request.app, body["prompt"])
    else:
        tokens = [_ids(request.app, text) for text in body["prompt"]]
    return web.json_response({"tokens": tokens, "count": len(tokens), "max_model_len": 16384})


async def _parse(request: web.Request) -> web.Response:
    body = await request.json()
    known = [tool["function"]["name"] for tool in body["tools"]]
    found = [(name, json.loads(arguments)) for name, arguments in _WHOLE.findall(body["text"]) if name in known]
    calls = [{"tool_index": known.index(name), "name": name, "parameters": json.dumps(arguments)} for name, arguments in found]
    return web.json_response({"normal_text": body["text"].partition(_CALLS)[0].strip(), "calls": calls})


def thinks(body: dict[str, Any]) -> bool:
    """Whether the template opens the thinking."""
    return bool((body.get("chat_template_kwargs") or {}).get("thinking"))


def given(app: web.Application, body: dict[str, Any]) -> tuple[list[dict[str, Any]], str, bool]:
    """The messages, the raw text of the answer that is there already, and whether it began with thoughts."""
    if "input_ids" in body:
        prompt, opened, *said = (app[VOCABULARY][place] for place in body["input_ids"])
        return json.loads(prompt), "".join(said), opened == THINK
    messages = body["messages"]
    if body.get("continue_final_message"):
        return messages[:-1], messages[-1]["content"], thinks(body)
    return messages, "", thinks(body)


def script(commands: dict[str, str], thinking: bool) -> list[str]:
    """Every token of the answer."""
    thoughts = [f"thought {number} " for number in range(int(commands.get("thinks", "0")))] if thinking else []
    words = [f"token {number} " for number in range(int(commands.get("tokens", "8")))]
    numbers = [f"{number}," for number in range(int(commands.get("calls", "0")))]
    call = [_CALLS, _CALL, NAME, _NAMED, '{"days":[', *numbers, "31]}", _CALLED, _ALL_CALLED] if numbers else []
    return [*thoughts, *([THOUGHT] if thinking else []), *words, *call]


def after(tokens: list[str], raw: str) -> int | None:
    """How many of the tokens the raw text is; None where it is none of their beginnings."""
    for number in range(len(tokens) + 1):
        if "".join(tokens[:number]) == raw:
            return number
    return None


def deltas(tokens: list[str], start: int, body: dict[str, Any], thinking: bool) -> Iterator[dict[str, Any] | None]:
    """What each token from there on adds, as SGLang's parsers read it; None where it adds nothing. Without tools in the call, or with
    thoughts that are not told apart, it is all text."""
    apart, calling, called = body.get("separate_reasoning") is not False, bool(body.get("tools")), -1
    for number, token in enumerate(tokens):
        begins = token == _CALL
        called += begins
        in_call = called >= 0 and token not in (_CALLS, _CALLED, _ALL_CALLED) and not begins
        if number < start:
            thinking = thinking and token != THOUGHT
        elif apart and thinking:
            thinking = token != THOUGHT
            yield {"reasoning_content": token} if thinking else None
        elif not calling or token.startswith("token "):
            yield {"content": token}
        elif token == _NAMED:
            function = {"name": NAME, "arguments": ""}
            yield {"tool_calls": [{"id": f"call_{called:024}", "index": called, "type": "function", "function": function}]}
        elif in_call and token != NAME:
            more = {"name": None, "arguments": token}
            yield {"tool_calls": [{"id": None, "index": called, "type": "function", "function": more}]}
        else:
            yield None
