"""The server: one handler for both endpoints, events as SGLang writes them, faults as the prompt commands."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiohttp import web

_COMMAND = re.compile(r"\[\[([\w-]+) ?([\w.-]*)\]\]")
_FAULTS = ("die", "cut", "stall", "false-done", "abort", "mid-error")
_CREATED = 1795392000


class Seen:
    """What a test may ask about afterwards."""

    def __init__(self) -> None:
        self.requests = 0
        self.open = 0
        self.events_sent = 0
        self.aborted: list[str] = []
        self.last_body = ""
        self.last_ids: list[str] = []
        self.last_headers: dict[str, str] = {}


_SEEN = web.AppKey("seen", Seen)
_GOLDEN = web.AppKey("golden", Path)


def application(golden: Path | None = None) -> web.Application:
    """The whole server; `golden` is the folder of recorded streams."""
    app = web.Application(client_max_size=256 << 20)
    app[_SEEN] = Seen()
    if golden is not None:
        app[_GOLDEN] = golden
    app.router.add_post("/v1/chat/completions", _generate)
    app.router.add_post("/v1/completions", _generate)
    app.router.add_post("/abort_request", _abort)
    app.router.add_get("/ready", _ready)
    app.router.add_get("/model_info", _model_info)
    app.router.add_get("/rehearsal", _state)
    return app


async def _ready(request: web.Request) -> web.Response:
    return web.Response()


async def _model_info(request: web.Request) -> web.Response:
    return web.json_response({"model_path": "rehearsal", "architectures": ["DeepseekV3ForCausalLM"]})


async def _state(request: web.Request) -> web.Response:
    return web.json_response(vars(request.app[_SEEN]))


async def _abort(request: web.Request) -> web.Response:
    request.app[_SEEN].aborted.append((await request.json()).get("rid", ""))
    return web.Response()


async def _generate(request: web.Request) -> web.StreamResponse:
    seen = request.app[_SEEN]
    seen.requests += 1
    seen.open += 1
    try:
        raw = await request.text()
        seen.last_body, seen.last_headers = raw, dict(request.headers)
        body = json.loads(raw)
        n = body.get("n") or 1
        # As SGLang does: several choices get ids of its own making, one each.
        seen.last_ids = body["ids"] = [body["rid"]] if n == 1 else [uuid.uuid4().hex for _ in range(n)]
        text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        commands = dict(_COMMAND.findall(text if isinstance(text, str) else json.dumps(text)))
        if "refuse" in commands:
            return _flat(int(commands["refuse"]))
        if body.get("stream"):
            return await _stream(request, body, commands)
        return await _whole(request, body, commands)
    except ConnectionError:  # the gateway left, which is what many a test is about
        return web.Response()
    finally:
        seen.open -= 1


def _flat(status: int) -> web.Response:
    messages = {
        400: "The input (5000 tokens) is longer than the model's context length (4096 tokens).",
        422: "2 validation errors for ChatCompletionRequest\nmessages.0.role\n  Input should be 'user' [type=literal_error]",
        500: 'Internal server error: File "/sgl/srt/secret.py", line 1',
        503: "The request queue is full.",
    }
    message = messages.get(status, "refused")
    code = 400 if status == 422 else status
    flat = {"object": "error", "message": message, "type": "BadRequestError", "param": None, "code": code}
    return web.json_response({"error": "Unauthorized"} if status == 401 else flat, status=code)


def _reset(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


async def _whole(request: web.Request, body: dict[str, Any], commands: dict[str, str]) -> web.Response:
    if "die" in commands:
        _reset(request)
    if "stall" in commands:
        await asyncio.sleep(3600)
    if "garbage" in commands:
        return web.Response(text="<html>", content_type="text/html")
    count = int(commands.get("tokens", "8"))
    finish = "abort" if "abort" in commands else "stop"
    content = "".join(f"token {index} " for index in range(count))
    choices = [
        {"index": index, "message": {"role": "assistant", "content": content, "reasoning_content": None}, "finish_reason": finish}
        for index in range(body.get("n", 1))
    ]
    answer = {"id": body["ids"][0], "object": "chat.completion", "created": _CREATED, "model": body["model"], "choices": choices}
    return web.json_response({**answer, "usage": _usage(count), "x_unknown": {"kept": [1, 2.50, "\u00e9"]}})


def _usage(count: int) -> dict[str, Any]:
    return {"prompt_tokens": 12, "total_tokens": 12 + count, "completion_tokens": count, "prompt_tokens_details": None}


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def _error(code: int) -> bytes:
    error = {"object": "error", "message": "The request queue is full.", "type": "SERVICE_UNAVAILABLE", "param": None, "code": code}
    return b"data: " + json.dumps({"error": error}).encode() + b"\n\n"  # with spaces, as SGLang writes its errors


async def _stream(request: web.Request, body: dict[str, Any], commands: dict[str, str]) -> web.StreamResponse:
    seen = request.app[_SEEN]
    fault = next((name for name in _FAULTS if name in commands), "")
    at = int(commands.get(fault) or 0) if fault else -1
    if fault == "die" and at == 0:
        _reset(request)
        return web.Response()
    if fault == "stall" and at == 0:
        await asyncio.sleep(3600)
    response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    if "golden" in commands:
        return await _golden(request, response, commands)
    if "first-error" in commands:
        await response.write(_error(int(commands["first-error"])) + b"data: [DONE]\n\n")
        return response
    if "garbage" in commands:
        await response.write(b"\x00\xff this is no event stream\n")
        return response
    if "endless" in commands:
        for _ in range(1024):
            await response.write(b"data: " + b"x" * 65536)
        return response
    pace_s = float(commands.get("pace", "0"))
    events = _events(body, int(commands.get("tokens", "8")))
    for index, event in enumerate(events):
        if index == at:
            if fault == "die":
                _reset(request)
                return response
            if fault == "stall":
                await asyncio.sleep(3600)
            closing = {"abort": _finish(body, "abort"), "mid-error": _error(503), "cut": b"", "false-done": b""}[fault]
            if closing or fault == "false-done":
                await response.write(closing + b"data: [DONE]\n\n")
            return response
        await response.write(event)
        seen.events_sent += 1
        if pace_s:
            await asyncio.sleep(pace_s)
    return response


def _chunk(body: dict[str, Any], choices: list[dict[str, Any]], **more: Any) -> bytes:
    head = {
        "id": body["ids"][choices[0]["index"] if choices else 0],
        "object": "chat.completion.chunk",
        "created": _CREATED,
        "model": body["model"],
    }
    return _event({**head, "choices": choices, **more})


def _finish(body: dict[str, Any], reason: str, index: int = 0) -> bytes:
    choice = {"index": index, "delta": {"reasoning_content": None}, "logprobs": None, "finish_reason": reason, "matched_stop": None}
    return _chunk(body, [choice])


def _events(body: dict[str, Any], count: int) -> Iterator[bytes]:
    """Role chunk, tokens, finish, usage when asked for, `[DONE]`; made one by one, so that the first does not wait for the last."""
    choices = range(body.get("n") or 1)

    def delta(index: int, **words: Any) -> bytes:
        choice = {"index": index, "delta": {"reasoning_content": None, **words}, "logprobs": None, "finish_reason": None}
        return _chunk(body, [choice])

    yield from (delta(index, role="assistant", content="") for index in choices)
    yield from (delta(index, content=f"token {number} ") for number in range(count) for index in choices)
    yield from (_finish(body, "stop", index) for index in choices)
    if (body.get("stream_options") or {}).get("include_usage"):
        yield _chunk(body, [], usage=_usage(count))
    yield b"data: [DONE]\n\n"


async def _golden(request: web.Request, response: web.StreamResponse, commands: dict[str, str]) -> web.StreamResponse:
    recorded = (request.app[_GOLDEN] / f"{commands['golden']}.sse").read_bytes()
    size = int(commands.get("split", str(len(recorded))))
    for start in range(0, len(recorded), size):
        await response.write(recorded[start : start + size])
        await asyncio.sleep(0)
    return response
