"""SGLang's errors as what the core and the client need to know of them.

Measured against SGLang 0.5.23. Its errors come in four shapes: flat `{"object": "error", "message", "code"}`, nested `{"error": {...}}`,
`{"error": "text"}` for its own key, and FastAPI's `{"detail": ...}`; in streams as events.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from backends.sglang_dsv3 import complaints
from backends.sglang_dsv3.cleaning import Cleaned, without_keys
from backends.sglang_dsv3.shapes import ErrorEvent, NamedError, Typed, error_decoder
from gateway.errors import BadGateway, GatewayError, InvalidRequest, NoSuchResponse, Unavailable, shortened
from gateway.plugin import BOUNDS, AttemptFailed, Call, Endpoint, Verdict
from gateway.wire import fields

_STATUS_OF = {"invalid_request_error": 400, "not_found_error": 404, "rate_limit_error": 429, "overloaded_error": 503}
_BUSY = re.compile(r"queue is full|higher priority request|timeout", re.IGNORECASE)
_CONTEXT = re.compile(
    r"longer than the model's context length|exceeds the model's maximum context length|This model's maximum context length is"
)
_CONTEXT_PARAMS = {Endpoint.COMPLETIONS: "prompt", Endpoint.EMBEDDINGS: "input", Endpoint.RESPONSES: "input"}
# What tokenizers say of half a surrogate pair, some of them as an error of their own.
_SURROGATE = re.compile(r"surrogates not allowed|Text(?:Encode)?Input(?:Sequence)? must be")
# What the engine calls parameters by itself, and as what a client knows them.
_INSIDE: Final = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
_TOOL = re.compile(r"tools\[(\d{1,9})\]\.function")
_NAME = re.compile(r"[a-z]\w*")
# Parameters of one word that a text names where it says the word.
_PLAIN: Final = frozenset(["temperature", "stop", "seed", "logprobs", "n", "echo", "suffix", "dimensions"])
# Where a grammar may have come from.
_GRAMMARS: Final = ("response_format", "text", "json_schema", "regex", "ebnf", "structural_tag", "tools")
# What is told where nothing that the engine said may be.
_REFUSED: Final = "The engine refused this request as invalid."
# So many words of the engine are kept for the log.
_LOGGED: Final = 500


def failure(status: int, content: bytes, call: Call) -> AttemptFailed:
    """An engine's error answer (status and body, or the error event of a stream) as what the core and the client need to know."""
    message, param = _message(content)
    detail = f"the engine answered {status}: {without_keys(message[:_LOGGED])}"
    if status in (401, 403):
        return AttemptFailed("refused", BadGateway("The engine refused the gateway's own key.", detail=detail))
    if status == 404 and call.endpoint is Endpoint.RESPONSES and "not found" in message and "previous_response_id" in call.fields:
        before = fields.short_text(call.fields, "previous_response_id")
        return AttemptFailed("refused", NoSuchResponse(before, "previous_response_id"), Verdict.OK)  # another host may have made it
    if status == 404:
        return AttemptFailed("refused", BadGateway("The engine does not serve this endpoint.", detail=detail))
    if (400 <= status < 500 and status not in (408, 429)) or _SURROGATE.search(message):
        return AttemptFailed("refused", _client_fault(message, param, call), Verdict.CLIENT_FAULT)
    if status in (408, 429, 503):
        busy = Unavailable("The engine is at capacity.", code="engine_overloaded", retry_after_s=2, detail=detail)
        return AttemptFailed("busy", busy, Verdict.BUSY)
    return AttemptFailed("broken", BadGateway("The engine failed to answer.", detail=detail))


def error_of(event: bytes, call: Call) -> AttemptFailed | None:
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
    return failure(status if 400 <= status < 600 else 500, content, call)


def named_error(content: bytes, call: Call) -> AttemptFailed:
    """The error of a named event, or of a response that failed: Anthropic's types name a status, SGLang's responses only speak."""
    content = content.removeprefix(b"data: ").strip()
    try:
        found = msgspec.json.decode(content, type=ErrorEvent)
    except msgspec.DecodeError:
        found = ErrorEvent()
    error = found.error or (found.response.error if found.response is not None else None) or NamedError()
    status = _STATUS_OF.get(error.type or "", 503 if _BUSY.search(error.message or "") else 500)
    return failure(status, msgspec.json.encode({"error": {"message": error.message or "no reason given"}}), call)


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


def _client_fault(message: str, param: str | None, call: Call) -> GatewayError:
    """Its `detail`, which is logged, holds only what was taken out of the text: what the engine says of a client's fault may quote the
    prompt."""
    if _SURROGATE.search(message):
        return InvalidRequest("The request holds half of a surrogate pair, which is no character.", param=param, code="invalid_value")
    found = complaints.explained(message)
    if found is not None:
        return _invalid(*found, call)
    cleaned = Cleaned(_in_the_clients_words(message, call), call.fields)
    detail = f"taken out of the engine's words: {', '.join(cleaned.removed)}"[:_LOGGED] if cleaned.removed else None
    text = cleaned.text if cleaned.says_something or (cleaned.text and not cleaned.removed) else _REFUSED
    if _CONTEXT.search(message):
        # LangChain looks for the code in the text, since openai-python 3 no longer puts it there.
        text = f"{text.removesuffix(' None')} (context_length_exceeded)"
        return InvalidRequest(text, param=_CONTEXT_PARAMS.get(call.endpoint, "messages"), code="context_length_exceeded", detail=detail)
    return InvalidRequest(text, param=param or _param(text, call), code="invalid_value", detail=detail)


def _invalid(where: str, what: str, call: Call) -> GatewayError:
    """What a validation found wrong; of an engine's own texts there may be some inside."""
    cleaned = Cleaned(what, call.fields)
    if not where:
        return InvalidRequest(f"{cleaned.text}.", param=_param(what, call), code="invalid_value")
    if what == "Field required" and (kind := _kind_of_tool(where, call)):
        message = f"Invalid value for '{kind[0]}': the engine takes tools of type 'function' in a chat, got '{kind[1]}'."
        return InvalidRequest(message, param=kind[0], code="unsupported_value")
    if what == "Field required":
        return InvalidRequest(f"Missing required parameter: '{where}'.", param=where, code="missing_required_parameter")
    return InvalidRequest(f"Invalid value for '{where}': {cleaned.text}.", param=where, code="invalid_value")


def _kind_of_tool(where: str, call: Call) -> tuple[str, str] | None:
    """Of a tool that the engine does not take because it is no function: where its type stands, and what it says."""
    found = _TOOL.fullmatch(where)
    if found is None or "tools" not in call.fields:
        return None
    try:
        kind = msgspec.json.decode(call.fields["tools"], type=list[Typed])[int(found[1])].type
    except (msgspec.MsgspecError, IndexError):
        return None
    return (f"tools[{found[1]}].type", shortened(kind)) if kind not in (None, "function") else None


def _in_the_clients_words(message: str, call: Call) -> str:
    """Names of the engine's own for what the client has sent under another."""
    for inside, outside in _INSIDE.items():
        if inside in message and inside not in call.fields:
            names = (*BOUNDS.get(call.endpoint, ()), outside) if inside == "max_new_tokens" else (outside,)
            message = message.replace(inside, next((name for name in names if name in call.fields), outside))
    # SGLang speaks of one of the two names of a bound, whichever it was sent.
    bounds = BOUNDS.get(call.endpoint, ())
    sent = next((name for name in bounds if name in call.fields), "")
    for name in bounds:
        if sent and name not in call.fields:
            message = re.sub(rf"\b{name}\b", sent, message)
    return message


def _param(text: str, call: Call) -> str | None:
    """The parameter that a text speaks of: the first of the client's that it names."""
    if "grammar" in text:
        return next((name for name in _GRAMMARS if name in call.fields), None)
    return next((name for name in _NAME.findall(text) if name in call.fields and ("_" in name or name in _PLAIN)), None)


def words(content: bytes) -> str:
    """The human part of an engine's error."""
    return _message(content)[0]


def _message(content: bytes) -> tuple[str, str | None]:
    """The human part of any of the shapes, and the parameter where it names one."""
    try:
        found: Any = msgspec.json.decode(content)
    except msgspec.DecodeError:
        return content[:200].decode("utf-8", "replace"), None
    param: Any = None
    while isinstance(found, dict):
        param = found.get("param") or param
        found = found.get("error") or found.get("message") or found.get("detail") or ""
    return str(found), param if isinstance(param, str) else None
