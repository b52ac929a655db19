"""SGLang's words into ours: what a call becomes on its way to the engine, and what the engine's errors become on theirs back.

Measured against SGLang 0.5.23. Its errors come in four shapes: flat `{"object": "error", "message", "code"}`, nested `{"error": {...}}`,
`{"error": "text"}` for its own key, and FastAPI's `{"detail": ...}`.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from gateway.errors import BadGateway, GatewayError, InvalidRequest, Unavailable
from gateway.plugin import AttemptFailed, Call, Verdict
from gateway.wire import body

# Fields that steer the engine's inside: another request's id, another rank, other weights, raw tokens, code to run.
INTERNAL_FIELDS = frozenset(
    [
        "rid",
        "extra_key",
        "cache_salt",
        "priority",
        "routed_dp_rank",
        "data_parallel_rank",
        "disagg_prefill_dp_rank",
        "bootstrap_host",
        "bootstrap_port",
        "bootstrap_room",
        "lora_path",
        "session_id",
        "session_params",
        "custom_logit_processor",
        "custom_params",
        "input_ids",
        "return_hidden_states",
        "return_routed_experts",
        "routed_experts_start_len",
        "return_input_ids_in_sglext",
        "return_output_ids_in_sglext",
        "return_sampling_mask",
    ]
)
# SGLang answers 400 to null here, OpenAI's API takes it for absent and the SDKs do send it.
_NO_NULL = ("n", "stream", "frequency_penalty", "presence_penalty", "parallel_tool_calls", "logprobs")

_CONTEXT = re.compile(r"longer than the model's context length|exceeds the model's maximum context length")
_TOO_MANY_TOKENS = re.compile(r"max_(completion_)?tokens is too large")
# A validation dump: "2 validation errors for ChatCompletionRequest\nmessages.0.role\n  Input should be ... [type=...]".
_VALIDATION = re.compile(r"validation errors? for \w+\s+([\w.\[\]`-]+)\s+(.*?)(?:\s*\[type=|\n|$)", re.DOTALL)
_PYDANTIC_LIST = re.compile(r"'loc':\s*\(([^)]*)\).*?'msg':\s*'([^']*)'", re.DOTALL)
_LEAK = re.compile(r"(/[\w.-]+){2,}|Traceback|File \"")


class _Usage(msgspec.Struct):
    include_usage: bool


def refuse_internal(call: Call) -> None:
    """Raises InvalidRequest for a field that only the operator may set."""
    for name in call.fields:
        if name in INTERNAL_FIELDS:
            raise InvalidRequest(f"Unsupported parameter: '{name}' is internal to the engine.", param=name, code="unsupported_parameter")


def engine_body(call: Call) -> bytes:
    """The body the engine gets: the client's own bytes, with our `rid` (its id for aborting), usage asked for in streams, nulls
    that it would refuse left out."""
    changes: dict[str, Any] = {"rid": call.id}
    fields = call.fields
    nulls = [name for name in _NO_NULL if name in fields and bytes(fields[name]) == b"null"]
    if nulls:
        fields = {name: value for name, value in fields.items() if name not in nulls}
    if call.stream:
        options = body.value(fields, "stream_options", dict[str, msgspec.Raw], "an object") or {}
        changes["stream_options"] = {**options, "include_usage": True}
    elif "stream_options" in fields:
        fields = {name: value for name, value in fields.items() if name != "stream_options"}
    return body.splice(fields, changes)


def failure(status: int, content: bytes) -> AttemptFailed:
    """An engine's error answer (status and body, or the error event of a stream) as what the core and the client need to know."""
    message = _message(content)
    detail = f"the engine answered {status}: {message[:500]}"
    if status in (401, 403):
        return AttemptFailed("refused", BadGateway("The engine refused the gateway's own key.", detail=detail))
    if status == 404:
        return AttemptFailed("refused", BadGateway("The engine does not serve this endpoint.", detail=detail))
    if 400 <= status < 500 and status not in (408, 429):
        return AttemptFailed("refused", _client_fault(message), Verdict.CLIENT_FAULT)
    if status in (408, 429, 503):
        busy = Unavailable("The engine is at capacity.", code="engine_overloaded", retry_after_s=2, detail=detail)
        return AttemptFailed("busy", busy, Verdict.BUSY)
    return AttemptFailed("broken", BadGateway("The engine failed to answer.", detail=detail))


def _client_fault(message: str) -> GatewayError:
    """Without a `detail`, which would be logged: what the engine says of a client's fault may quote the prompt."""
    if _CONTEXT.search(message):
        # LangChain looks for the code in the text, since openai-python 3 no longer puts it there.
        text = f"{message.strip()} (context_length_exceeded)"
        return InvalidRequest(text, param="messages", code="context_length_exceeded")
    if _TOO_MANY_TOKENS.search(message):
        return InvalidRequest(message, param="max_tokens", code="invalid_value")
    found = _PYDANTIC_LIST.search(message)
    if found:
        where = ".".join(part.strip(" '\"") for part in found[1].split(",") if part.strip(" '\"") not in ("", "body"))
        return InvalidRequest(f"Invalid '{where}': {found[2]}.", param=where or None, code="invalid_value")
    found = _VALIDATION.search(message)
    if found:
        where = found[1]
        return InvalidRequest(f"Invalid '{where}': {found[2].strip()}.", param=where, code="invalid_value")
    if _LEAK.search(message):
        message = "The engine refused this request as invalid."
    return InvalidRequest(message, code="invalid_value")


def _message(content: bytes) -> str:
    """The human part of any of the four shapes."""
    try:
        found: Any = msgspec.json.decode(content)
    except msgspec.DecodeError:
        return content[:200].decode("utf-8", "replace")
    while isinstance(found, dict):
        found = found.get("error") or found.get("message") or found.get("detail") or ""
    return str(found)
