"""SGLang's errors as what the core and the client need to know of them.

Measured against SGLang 0.5.23. Its errors come in four shapes: flat `{"object": "error", "message", "code"}`, nested `{"error": {...}}`,
`{"error": "text"}` for its own key, and FastAPI's `{"detail": ...}`; in streams as events.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from backends.sglang_dsv3.shapes import ErrorEvent, NamedError, error_decoder
from gateway.errors import BadGateway, GatewayError, InvalidRequest, Unavailable
from gateway.plugin import AttemptFailed, Endpoint, Verdict

_STATUS_OF = {"invalid_request_error": 400, "not_found_error": 404, "rate_limit_error": 429, "overloaded_error": 503}
_BUSY = re.compile(r"queue is full|higher priority request|timeout", re.IGNORECASE)
_CONTEXT = re.compile(r"longer than the model's context length|exceeds the model's maximum context length")
_TOO_MANY_TOKENS = re.compile(r"max_(completion_)?tokens is too large")
_CONTEXT_PARAMS = {Endpoint.COMPLETIONS: "prompt", Endpoint.EMBEDDINGS: "input", Endpoint.RESPONSES: "input"}
# A validation dump: "2 validation errors:\n  {'type': 'missing', 'loc': ('body', 'messages', 0, 'role'), 'msg': 'Field required', ...".
_DUMP = re.compile(r"""'loc': \((.*?)\), 'msg': (?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)")""")
# The same as pydantic prints it: "1 validation error for ChatCompletionRequest\nmessages.0.role\n  Input should be ... [type=...".
_PRINTED = re.compile(r"validation errors? for \w+\s+([\w.\[\]`-]+)\s+(.*?)(?:\s*\[type=|\n|$)", re.DOTALL)
_STEP = re.compile(r"'((?:[^'\\]|\\.)*)'|(\d+)")
# Steps of a place that are the engine's own: classes, validators, branches of a union.
_INNER_STEP = re.compile(r"[^a-z0-9_]|^(str|int|float|bool|dict|list)$")
# Where grammars are compiled: "[17:33:11] /project/cpp/json_schema_converter.cc:4175: Unsupported type".
_SOURCE = re.compile(r"(\[[\d:]+\] )?/\S+?:\d+: ")
_LEAK = re.compile(r"(/[\w.-]+){2,}|Traceback|File \"")


def failure(status: int, content: bytes, endpoint: Endpoint = Endpoint.CHAT) -> AttemptFailed:
    """An engine's error answer (status and body, or the error event of a stream) as what the core and the client need to know."""
    message = _message(content)
    detail = f"the engine answered {status}: {message[:500]}"
    if status in (401, 403):
        return AttemptFailed("refused", BadGateway("The engine refused the gateway's own key.", detail=detail))
    if status == 404:
        return AttemptFailed("refused", BadGateway("The engine does not serve this endpoint.", detail=detail))
    if 400 <= status < 500 and status not in (408, 429):
        return AttemptFailed("refused", _client_fault(message, endpoint), Verdict.CLIENT_FAULT)
    if status in (408, 429, 503):
        busy = Unavailable("The engine is at capacity.", code="engine_overloaded", retry_after_s=2, detail=detail)
        return AttemptFailed("busy", busy, Verdict.BUSY)
    return AttemptFailed("broken", BadGateway("The engine failed to answer.", detail=detail))


def _client_fault(message: str, endpoint: Endpoint) -> GatewayError:
    """Without a `detail`, which would be logged: what the engine says of a client's fault may quote the prompt."""
    if _CONTEXT.search(message):
        # LangChain looks for the code in the text, since openai-python 3 no longer puts it there.
        text = f"{message.strip()} (context_length_exceeded)"
        return InvalidRequest(text, param=_CONTEXT_PARAMS.get(endpoint, "messages"), code="context_length_exceeded")
    if _TOO_MANY_TOKENS.search(message):
        return InvalidRequest(message, param="max_tokens", code="invalid_value")
    found = _validation(message)
    if found is not None:
        where, what = found
        return InvalidRequest(f"Invalid value for '{where}': {what}." if where else f"{what}.", param=where or None, code="invalid_value")
    message = _SOURCE.sub("", message).strip()
    if _LEAK.search(message):
        message = "The engine refused this request as invalid."
    return InvalidRequest(message, param="response_format" if "grammar" in message else None, code="invalid_value")


def _validation(message: str) -> tuple[str, str] | None:
    """Place and reason out of a validation dump: of many complaints (one for each branch of each union) those that go deepest."""
    found = [(_place(match[1]), match[2] or match[3]) for match in _DUMP.finditer(message)]
    if not found:
        printed = _PRINTED.search(message)
        if printed is None:
            return None
        found = [(_place(", ".join(repr(int(step) if step.isdigit() else step) for step in printed[1].split("."))), printed[2].strip())]
    deepest = max((place for place, _ in found), key=lambda place: place.count(".") + place.count("["))
    reasons = dict.fromkeys(what.removeprefix("Value error, ").rstrip(".") for place, what in found if place == deepest)
    return deepest, ", or ".join(list(reasons)[:6])


def _place(steps: str) -> str:
    """A place as OpenAI writes it, `messages[0].role`, from the steps of a dump."""
    place = ""
    for name, index in _STEP.findall(steps):
        if index:
            place += f"[{index}]"
        elif name != "body" and not _INNER_STEP.search(name):
            place += f".{name}" if place else name
    return place


def _message(content: bytes) -> str:
    """The human part of any of the shapes."""
    try:
        found: Any = msgspec.json.decode(content)
    except msgspec.DecodeError:
        return content[:200].decode("utf-8", "replace")
    while isinstance(found, dict):
        found = found.get("error") or found.get("message") or found.get("detail") or ""
    return str(found)


def named_error(content: bytes, endpoint: Endpoint) -> AttemptFailed:
    """The error of a named event, or of a response that failed: Anthropic's types name a status, SGLang's responses only speak."""
    content = content.removeprefix(b"data: ").strip()
    try:
        found = msgspec.json.decode(content, type=ErrorEvent)
    except msgspec.DecodeError:
        found = ErrorEvent()
    error = found.error or (found.response.error if found.response is not None else None) or NamedError()
    status = _STATUS_OF.get(error.type or "", 503 if _BUSY.search(error.message or "") else 500)
    return failure(status, msgspec.json.encode({"error": {"message": error.message or "no reason given"}}), endpoint)


def error_of(event: bytes, endpoint: Endpoint) -> AttemptFailed | None:
    """The error that an event of a stream of chunks is, if it is one; its `code` is the status SGLang would have answered with."""
    content = event[6:]
    found = error_decoder.decode(content)
    error = found.error
    if error is None:
        if found.object != "error":
            return None
        code = found.code
    else:
        code = error.get("code") if isinstance(error, dict) else None
    try:
        status = int(code) if isinstance(code, int | str) else 500
    except ValueError:  # a word
        status = 500
    return failure(status if 400 <= status < 600 else 500, content, endpoint)


def nonsense(detail: str) -> AttemptFailed:
    """What came makes no sense."""
    return AttemptFailed("broken", BadGateway("The engine sent nonsense.", detail=detail))


def aborted() -> AttemptFailed:
    """The engine gave up on a request by itself; `abort` is outside OpenAI's finish reasons and is never passed on."""
    error = Unavailable("The engine aborted this request.", code="engine_aborted", retry_after_s=2)
    return AttemptFailed("aborted", error, Verdict.BUSY)


def cut(detail: str) -> AttemptFailed:
    """The answer ended before it was finished."""
    return AttemptFailed("cut", BadGateway("The engine's answer ended before it was finished.", detail=detail))
