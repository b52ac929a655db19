"""The server: one handler for both endpoints, events as SGLang writes them, faults as the prompt commands."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import re
import struct
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from backends.sglang_dsv3.rehearsal import bad, kept, pairs, spoken
from backends.sglang_dsv3.rehearsal.cache import PrefixCache

_COMMAND = re.compile(r"\[\[([\w-]+) ?([\w.-]*)\]\]")
_FAULTS = ("die", "cut", "stall", "false-done", "abort", "mid-error")
_CREATED = 1795392000
# What the server calls its model; /v1/responses takes no other name.
SERVED = "rehearsed"
# Endpoints that answer in one piece, with what they answer.
_PLAIN: dict[str, Any] = {
    "/v1/embeddings": {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.25, -1.5]}]},
    "/v1/rerank": [{"score": 0.9, "document": "a", "index": 0}],
    "/v1/score": {"object": "scoring", "scores": [[0.75, 0.25]]},
    "/v1/messages/count_tokens": {"input_tokens": 21},
    "/tokenize": {"tokens": [271, 78], "count": 2, "max_model_len": 16384},
}


class Seen:
    """What a test may ask about afterwards."""

    def __init__(self) -> None:
        self.requests = 0
        self.open = 0
        self.events_sent = 0
        self.asked: dict[str, int] = {}
        self.generations_probed = 0
        self.ready = 200
        self.hung = False
        self.deaf = False
        # Refuses with 500, or with the status that this is.
        self.failing: bool | int = False
        self.max_running_requests = 100_000
        # What `/v1/loads` says, in place of that.
        self.loads: list[dict[str, Any]] | None = None
        self.weight_version = "default"
        # Half of a pair: see `pairs`.
        self.role = ""
        # Tokens of prompts that it keeps, and says so in the usage of chats; none: it says nothing.
        self.caching = 0
        # Shares of answers that are bad, by rule: see `bad`.
        self.bad: dict[str, float] = {}
        # What `/model_info` says beside it, and the context length of `/v1/models`.
        self.info: dict[str, Any] = {}
        self.max_model_len = 16384
        self.aborted: list[str] = []
        # Completion tokens made, whoever read them.
        self.generated = 0
        # The same by prompt, and how many requests there were of each.
        self.made: dict[str, int] = {}
        self.last_body = ""
        self.last_ids: list[str] = []
        self.last_headers: dict[str, str] = {}


_SEEN = web.AppKey("seen", Seen)
_DUE = web.AppKey("due", bad.Due)
_CACHE = web.AppKey("cache", PrefixCache)
_GOLDEN = web.AppKey("golden", Path)


def application(golden: Path | None = None, speaks: bool = False) -> web.Application:
    """The whole server; `golden` is the folder of recorded streams, `speaks`: see `spoken`."""
    app = web.Application(client_max_size=256 << 20)
    app[_SEEN] = Seen()
    app[_CACHE] = PrefixCache()
    app[_DUE] = bad.Due()
    if golden is not None:
        app[_GOLDEN] = golden
    app.router.add_post("/v1/chat/completions", _generate)
    app.router.add_post("/v1/completions", _generate)
    app.router.add_post("/v1/responses", _generate)
    app.router.add_post("/v1/messages", _generate)
    if speaks:
        app[_SEEN].info = dict(spoken.INFO)
        spoken.add(app)
    for path in _PLAIN:
        if not speaks or path != "/tokenize":
            app.router.add_post(path, _plain)
    app.router.add_post("/abort_request", _abort)
    app.router.add_get("/ready", _ready)
    app.router.add_get("/model_info", _model_info)
    app.router.add_get("/v1/models", _models)
    app.router.add_get("/v1/loads", _loads)
    kept.add(app)
    pairs.add(app)
    app.router.add_get("/health_generate", _health_generate)
    app.router.add_post("/rehearsal", _set)
    app.router.add_get("/rehearsal", _state)
    return app


async def _ready(request: web.Request) -> web.Response:
    return web.Response(status=request.app[_SEEN].ready)


async def _loads(request: web.Request) -> web.Response:
    seen = request.app[_SEEN]
    load = {"dp_rank": 0, "num_running_reqs": seen.open, "num_waiting_reqs": 0, "max_running_requests": seen.max_running_requests}
    return web.json_response({"loads": seen.loads or [load]})


async def _health_generate(request: web.Request) -> web.Response:
    seen = request.app[_SEEN]
    seen.generations_probed += 1
    return web.Response(status=503 if seen.hung else 200)


async def _set(request: web.Request) -> web.Response:
    """How the server behaves from now on, whatever the prompts say: `ready`, `hung`, `deaf` (to commands), `failing`,
    `max_running_requests`, `loads`, `weight_version`, `role`, `caching`, `bad`, `info`, `max_model_len`."""
    for name, value in (await request.json()).items():
        setattr(request.app[_SEEN], name, value)
        if name == "caching":
            request.app[_CACHE].forget(value)
    return web.Response()


async def _model_info(request: web.Request) -> web.Response:
    return web.json_response(
        {
            "model_path": "rehearsal",
            "served_model_name": SERVED,
            "architectures": ["DeepseekV3ForCausalLM"],
            "weight_version": request.app[_SEEN].weight_version,
            "disaggregation_mode": request.app[_SEEN].role or "null",
            **request.app[_SEEN].info,
        }
    )


async def _models(request: web.Request) -> web.Response:
    card = {"id": SERVED, "object": "model", "created": _CREATED, "owned_by": "sglang", "max_model_len": request.app[_SEEN].max_model_len}
    return web.json_response({"object": "list", "data": [card]})


async def _state(request: web.Request) -> web.Response:
    return web.json_response(vars(request.app[_SEEN]))


async def _abort(request: web.Request) -> web.Response:
    request.app[_SEEN].aborted.append((await request.json()).get("rid", ""))
    return web.Response()


async def _generate(request: web.Request) -> web.StreamResponse:
    seen = request.app[_SEEN]
    seen.requests += 1
    seen.open += 1
    body: dict[str, Any] = {"made": 0}
    text: Any = ""
    try:
        raw = await request.text()
        seen.last_body, seen.last_headers = raw, dict(request.headers)
        body |= json.loads(raw)
        if request.path == "/v1/responses" and body["model"] != SERVED:
            error = {
                "message": f"The model '{body['model']}' does not exist",
                "type": "invalid_request_error",
                "param": "model",
                "code": 404,
            }
            return web.json_response({"error": error}, status=404)
        if (refusal := kept.refusal(request.app, body)) is not None:
            return refusal
        n = body.get("n") or 1
        # As SGLang does: several choices get ids of its own making, one each.
        rid = body.get("rid") or body.get("request_id") or f"msg_{uuid.uuid4().hex}"
        seen.last_ids = body["ids"] = [rid] if n == 1 else [uuid.uuid4().hex for _ in range(n)]
        try:
            raw_text = ""
            if spoken.VOCABULARY in request.app and request.path == "/v1/chat/completions":
                messages, raw_text, body["opened"] = spoken.given(request.app, body)
                text, body["done"] = messages[-1]["content"], 0
            else:
                text, body["done"] = _asked(body)
        except (AttributeError, LookupError, TypeError):  # messages that are none: SGLang's models refuse them
            return _flat(422)
        text = text if isinstance(text, str) else json.dumps(text)
        if seen.caching and "messages" in body:
            body["prompt_tokens"], body["cached_tokens"] = request.app[_CACHE].ask(body.get("cache_salt"), body["messages"])
        commands = pairs.commands_of(seen.role, dict(_COMMAND.findall(text)))
        if "opened" in body:
            body["script"] = spoken.script(commands, body["opened"])
            if (done := spoken.after(body["script"], raw_text)) is None:
                return _flat(400, f"nobody has said {raw_text!r}")
            body["done"] = done
        seen.asked[text] = seen.asked.get(text, 0) + 1
        if seen.asked[text] > int(commands.get("times", seen.asked[text])):
            commands = {}
        if seen.hung:
            await asyncio.sleep(3600)
        if seen.deaf:
            commands = {}
        if seen.failing:
            return _flat(500 if seen.failing is True else seen.failing)
        if body["done"]:  # what broke the first half off was the first host's own affair
            commands = {name: value for name, value in commands.items() if name in ("tokens", "wide", "pace", *spoken.COMMANDS)}
        body["tail"] = "w" * int(commands.get("wide", "0"))
        if "refuse" in commands:
            return _flat(int(commands["refuse"]))
        if seen.role:
            if why := await pairs.take_part(request.app, seen.role, body, seen.aborted):
                return _flat(int(why[:3]), why[4:])
            if seen.role == "prefill":
                commands["tokens"] = "1"
        if "rehearsal_answer" in body:
            kind = "text/event-stream" if body.get("stream") else "application/json"
            return web.Response(body=body["rehearsal_answer"].encode(), content_type=kind, charset="utf-8")
        if (answer := bad.answer(request.path, body, commands.get("bad"), seen.bad, request.app[_DUE])) is not None:
            return answer
        if body.get("stream"):
            return await _stream(request, body, commands)
        return await _whole(request, body, commands)
    except ConnectionError:  # the gateway left, which is what many a test is about
        return web.Response()
    finally:
        seen.open -= 1
        seen.generated += body["made"]
        seen.made[text] = seen.made.get(text, 0) + body["made"]


def _stopped(request: web.Request, body: dict[str, Any]) -> bool:
    """Whether somebody asked to abort this answer; the ids of several choices must all be asked for."""
    return set(body["ids"]) <= set(request.app[_SEEN].aborted)


_TOKENS = re.compile(r"token \d+ ")


def _asked(body: dict[str, Any]) -> tuple[Any, int]:
    """The prompt, and how many tokens of its answer are there already (an answer that is continued)."""
    if "messages" not in body:
        prompt = body.get("prompt", body.get("input"))
        return prompt, len(_TOKENS.findall(prompt)) if isinstance(prompt, str) else 0
    messages = body["messages"]
    if body.get("continue_final_message"):
        return messages[-2].get("content"), len(_TOKENS.findall(messages[-1]["content"]))
    return messages[-1].get("content"), 0


async def _plain(request: web.Request) -> web.Response:
    seen = request.app[_SEEN]
    seen.requests += 1
    seen.last_body, seen.last_headers = await request.text(), dict(request.headers)
    commands = dict(_COMMAND.findall(seen.last_body))
    if "refuse" in commands:
        return _flat(int(commands["refuse"]))
    answer = _PLAIN[request.path]
    if request.path == "/tokenize":  # as many as usages say, and a token for each that its answers are made of
        asked = json.loads(seen.last_body)
        count = 12 if "messages" in asked else len(_TOKENS.findall(str(asked.get("prompt")))) or 2
        answer = {**answer, "tokens": [271, 78, *range(count - 2)][:count], "count": count}
    if request.path == "/v1/embeddings" and json.loads(seen.last_body).get("encoding_format") == "base64":
        packed = base64.b64encode(struct.pack("<2f", *answer["data"][0]["embedding"])).decode()
        answer = {**answer, "data": [{**answer["data"][0], "embedding": packed}]}
    return web.json_response({**answer, "model": json.loads(seen.last_body)["model"], "usage": _usage(0)} if "object" in answer else answer)


def _flat(status: int, message: str = "") -> web.Response:
    messages = {
        400: "The input (5000 tokens) is longer than the model's context length (4096 tokens).",
        422: "2 validation errors for ChatCompletionRequest\nmessages.0.role\n  Input should be 'user' [type=literal_error]",
        500: 'Internal server error: File "/sgl/srt/secret.py", line 1',
        503: "The request queue is full.",
    }
    message = message or messages.get(status, "refused")
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
    asked = int(commands.get("tokens", "8"))
    count = min(asked, body.get("max_completion_tokens") or body.get("max_tokens") or asked)
    finish = "abort" if "abort" in commands else "stop"
    pace_s = float(commands.get("pace", "0"))
    for number in range(count):
        body["made"] += body.get("n") or 1
        if pace_s:
            await asyncio.sleep(pace_s)
            if _stopped(request, body):
                count, finish = number + 1, "abort"
                break
    content = "".join(f"token {index} {body['tail']}" for index in range(count))
    if request.path == "/v1/responses":
        response = _response(body, "failed" if "abort" in commands else "completed", content, count)
        kept.keep(request.app, response)
        return web.json_response(response)
    if request.path == "/v1/messages":
        return web.json_response(
            {**_message(body, content), "stop_reason": "end_turn", "usage": {"input_tokens": 12, "output_tokens": count}}
        )
    said = {"text": content} if "prompt" in body else {"message": {"role": "assistant", "content": content, "reasoning_content": None}}
    choices = [{"index": index, **said, "finish_reason": finish} for index in range(body.get("n", 1))]
    kind = "text_completion" if "prompt" in body else "chat.completion"
    answer = {"id": body["ids"][0], "object": kind, "created": _CREATED, "model": body["model"], "choices": choices}
    answer |= {"usage": _usage(count * (body.get("n") or 1), body), "x_unknown": {"kept": [1, 2.50, "\u00e9"]}}
    version = request.app[_SEEN].weight_version
    answer["metadata"] = {"weight_version": version, "weight_versions": [{"version": version, "start": 0, "end": count}]}
    return web.json_response(answer, dumps=partial(json.dumps, separators=(",", ":")))


def _usage(count: int, body: dict[str, Any] | None = None) -> dict[str, Any]:
    asked, details = 12, None
    if body is not None and "prompt_tokens" in body:
        asked, details = body["prompt_tokens"], {"cached_tokens": body["cached_tokens"]}
    return {"prompt_tokens": asked, "total_tokens": asked + count, "completion_tokens": count, "prompt_tokens_details": details}


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
    await asyncio.sleep(float(commands.get("late", "0")))
    response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    if "golden" in commands:
        return await _golden(request, response, commands)
    if "first-error" in commands:
        await response.write((_named_failure(request.path) or _error(int(commands["first-error"]))) + b"data: [DONE]\n\n")
        return response
    if "garbage" in commands:
        await response.write(b"\x00\xff this is no event stream\n")
        return response
    if "endless" in commands:
        for _ in range(1024):
            await response.write(b"data: " + b"x" * 65536)
        return response
    pace_s = float(commands.get("pace", "0"))
    chunks = _spoken_events if "script" in body else _events
    made = {"/v1/responses": _response_events, "/v1/messages": _message_events}.get(request.path, chunks)
    events = made(body, int(commands.get("tokens", "8")))
    for index, event in enumerate(events):
        if index == at:
            if fault == "die":
                _reset(request)
                return response
            if fault == "stall":
                await asyncio.sleep(3600)
            closing = _named_failure(request.path) or {"abort": _finish(body, "abort"), "mid-error": _error(503)}.get(fault, b"")
            if fault == "cut":
                return response
            if closing or fault == "false-done":
                await response.write(closing + b"data: [DONE]\n\n")
            return response
        await response.write(event)
        seen.events_sent += 1
        if pace_s:
            await asyncio.sleep(pace_s)
            if _stopped(request, body) and request.path in ("/v1/chat/completions", "/v1/completions"):
                usage = _chunk(body, [], usage=_usage(body["made"]))
                await response.write(_finish(body, "abort") + usage + b"data: [DONE]\n\n")
                return response
    return response


def _chunk(body: dict[str, Any], choices: list[dict[str, Any]], **more: Any) -> bytes:
    head = {
        "id": body["ids"][choices[0]["index"] if choices else 0],
        "object": "text_completion" if "prompt" in body else "chat.completion.chunk",
        "created": _CREATED,
        "model": body["model"],
    }
    return _event({**head, "choices": choices, **more})


def _finish(body: dict[str, Any], reason: str, index: int = 0) -> bytes:
    empty: dict[str, Any] = {"text": ""} if "prompt" in body else {"delta": {"reasoning_content": None}}
    choice = {"index": index, **empty, "logprobs": None, "finish_reason": reason, "matched_stop": None}
    return _chunk(body, [choice])


def _events(body: dict[str, Any], count: int) -> Iterator[bytes]:
    """Role chunk, tokens, finish, usage when asked for, `[DONE]`; made one by one, so that the first does not wait for the last."""
    choices = range(body.get("n") or 1)

    def delta(index: int, used: dict[str, Any] | None = None, **words: Any) -> bytes:
        said = {"text": words["content"]} if "prompt" in body else {"delta": {"reasoning_content": None, **words}}
        choice = {"index": index, **said, "logprobs": None, "finish_reason": None}
        return _chunk(body, [choice], **(used or {}))

    yield from (delta(index, role="assistant", content="") for index in choices)
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or count
    left = min(count - body["done"], limit)
    counting = bool((body.get("stream_options") or {}).get("continuous_usage_stats"))
    for number in range(body["done"], body["done"] + left):
        used = {"usage": _usage(number + 1 - body["done"], body)} if counting else {}
        for index in choices:
            body["made"] += 1
            yield delta(index, used, content=f"token {number} {body['tail']}")
    yield from (_finish(body, "stop" if left == count - body["done"] else "length", index) for index in choices)
    count = left
    if (body.get("stream_options") or {}).get("include_usage"):
        yield _chunk(body, [], usage=_usage(count * len(choices), body))
    yield b"data: [DONE]\n\n"


def _spoken_events(body: dict[str, Any], _: int) -> Iterator[bytes]:
    """The same of an answer with thoughts and calls; a token that adds nothing takes its time all the same."""
    made, start, finish = 0, body["done"], "stop"
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or len(body["script"])
    options = body.get("stream_options") or {}

    def said(delta: dict[str, Any]) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        used = {"usage": _usage(made, body)} if made and options.get("continuous_usage_stats") else {}
        return _chunk(body, [choice], **used)

    yield said({"role": "assistant", "content": "", "reasoning_content": None})
    for delta in spoken.deltas(body["script"], start, body, body["opened"]):
        if made == limit:
            finish = "length"
            break
        made += 1
        body["made"] += 1
        if delta is not None:
            finish = "tool_calls" if "tool_calls" in delta else finish
            yield said(delta)
    yield _finish(body, finish)
    if options.get("include_usage"):
        yield _chunk(body, [], usage=_usage(made, body))
    yield b"data: [DONE]\n\n"


async def _golden(request: web.Request, response: web.StreamResponse, commands: dict[str, str]) -> web.StreamResponse:
    recorded = (request.app[_GOLDEN] / f"{commands['golden']}.sse").read_bytes()
    size = int(commands.get("split", str(len(recorded))))
    for start in range(0, len(recorded), size):
        await response.write(recorded[start : start + size])
        await asyncio.sleep(0)
    return response


def _named(name: str, **fields: Any) -> bytes:
    return f"event: {name}\n".encode() + _event({"type": name, **fields})


def _named_failure(path: str) -> bytes:
    """How the endpoints with named events say that the engine gave up."""
    if path == "/v1/responses":
        error = {"code": "server_error", "message": "The request queue is full."}
        return _named("response.failed", response={"status": "failed", "error": error}, sequence_number=9)
    if path == "/v1/messages":
        return _named("error", error={"type": "overloaded_error", "message": "The request queue is full."})
    return b""


def _response(body: dict[str, Any], status: str, text: str, count: int) -> dict[str, Any]:
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "phase": "final_answer"}
    output = [{**item, "content": [{"type": "output_text", "text": text, "annotations": []}]}] if text else []
    head = {"id": body["ids"][0], "object": "response", "created_at": _CREATED, "model": body["model"], "output": output, "status": status}
    usage = {"input_tokens": 12, "output_tokens": count, "total_tokens": 12 + count, "input_tokens_details": {"cached_tokens": 4}}
    error = {"code": "server_error", "message": "The request queue is full."} if status == "failed" else None
    head["incomplete_details"] = {"reason": "max_output_tokens"} if status == "incomplete" else None
    return {**head, "usage": usage, "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "error": error, "metadata": {}}


def _response_events(body: dict[str, Any], count: int) -> Iterator[bytes]:
    number = itertools.count()

    def said(name: str, **fields: Any) -> bytes:
        return _named(f"response.{name}", **fields, sequence_number=next(number))

    begun = {**_response(body, "in_progress", "", 0), "usage": None}
    yield said("created", response=begun)
    yield said("in_progress", response=begun)
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    # As SGLang does: two tokens less than were asked for.
    left = min(count, (body.get("max_output_tokens") or count + 2) - 2)
    text = "".join(f"token {index} {body['tail']}" for index in range(left))
    whole = _response(body, "completed" if left == count else "incomplete", text, left)
    (item,) = whole["output"] or [{"content": [{"type": "output_text", "text": ""}]}]
    yield said("output_item.added", item={**item, "content": [], "status": "in_progress"}, output_index=0)
    yield said("content_part.added", part={**item["content"][0], "text": ""}, **place)
    for index in range(left):
        body["made"] += 1
        yield said("output_text.delta", delta=f"token {index} {body['tail']}", logprobs=[], **place)
    yield said("output_text.done", text=text, logprobs=[], **place)
    yield said("content_part.done", part=item["content"][0], **place)
    yield said("output_item.done", item=item, output_index=0)
    yield said(whole["status"], response=whole)


def _message(body: dict[str, Any], text: str) -> dict[str, Any]:
    content = [{"type": "text", "text": text}] if text else []
    return {"id": body["ids"][0], "type": "message", "role": "assistant", "content": content, "model": body["model"]}


def _message_events(body: dict[str, Any], count: int) -> Iterator[bytes]:
    yield _named(
        "message_start", message={**_message(body, ""), "usage": {"input_tokens": 8, "output_tokens": 0, "cache_read_input_tokens": 4}}
    )
    yield _named("content_block_start", index=0, content_block={"type": "text", "text": ""})
    left = min(count, body.get("max_tokens") or count)
    for number in range(left):
        body["made"] += 1
        yield _named("content_block_delta", index=0, delta={"type": "text_delta", "text": f"token {number} {body['tail']}"})
    yield _named("content_block_stop", index=0)
    yield _named("message_delta", delta={"stop_reason": "end_turn" if left == count else "max_tokens"}, usage={"output_tokens": left})
    yield _named("message_stop")
