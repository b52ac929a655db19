"""SGLang's words into ours: what a call becomes on its way to the engine, and what the engine's errors become on theirs back.

Measured against SGLang 0.5.23. Its errors come in four shapes: flat `{"object": "error", "message", "code"}`, nested `{"error": {...}}`,
`{"error": "text"}` for its own key, and FastAPI's `{"detail": ...}`.
"""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any

import msgspec

from gateway.errors import BadGateway, GatewayError, InvalidRequest, Unavailable
from gateway.plugin import AttemptFailed, Call, Endpoint, Verdict
from gateway.wire import body

# Parameters that steer the engine's inside: another request's id, another rank, other weights, raw tokens, code to run, raw tensors out.
INTERNAL_FIELDS = frozenset(
    [
        "rid",
        "request_id",
        "extra_key",
        "cache_salt",
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
        "embed_override_token_id",
        "embed_overrides",
        "query_embed_overrides",
        "item_embed_overrides",
        "return_hidden_states",
        "return_pooled_hidden_states",
        "return_routed_experts",
        "routed_experts_start_len",
        "return_cached_tokens_details",
        "return_spec_tokens_details",
        "return_prompt_token_ids",
        "return_token_ids",
        "return_meta_info",
        "return_input_ids_in_sglext",
        "return_output_ids_in_sglext",
        "return_sampling_mask",
        "sampling_logprobs_mode",
    ]
)
# A client's own idea of its priority is not asked for; one that sends it is served like everybody.
_IGNORED_FIELDS = frozenset(["priority"])
# Where the engine takes the id that an abort needs; the other endpoints' work ends with their connection.
_ID_FIELDS = {Endpoint.CHAT: "rid", Endpoint.COMPLETIONS: "rid", Endpoint.RESPONSES: "request_id"}

# Where it takes words of ours that keep one caller's prompts apart in the prefix cache.
_SALTED = frozenset([Endpoint.CHAT, Endpoint.COMPLETIONS])

_CONTEXT = re.compile(r"longer than the model's context length|exceeds the model's maximum context length")
_TOO_MANY_TOKENS = re.compile(r"max_(completion_)?tokens is too large")
_CONTEXT_PARAMS = {Endpoint.COMPLETIONS: "prompt", Endpoint.EMBEDDINGS: "input", Endpoint.RESPONSES: "input"}
# A validation dump: "2 validation errors:\n  {'type': 'missing', 'loc': ('body', 'messages', 0, 'role'), 'msg': 'Field required', ...".
_DUMP = re.compile(r"""'loc': \((.*?)\), 'msg': (?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)")""")
# The same as pydantic prints it: "1 validation error for ChatCompletionRequest\nmessages.0.role\n  Input should be ... [type=...".
_PRINTED = re.compile(r"validation errors? for \w+\s+([\w.\[\]`-]+)\s+(.*?)(?:\s*\[type=|\n|$)", re.DOTALL)
_FALSE = msgspec.Raw(b"false")
_options = msgspec.json.Decoder(dict[str, msgspec.Raw])
_STEP = re.compile(r"'((?:[^'\\]|\\.)*)'|(\d+)")
# Steps of a place that are the engine's own: classes, validators, branches of a union.
_INNER_STEP = re.compile(r"[^a-z0-9_]|^(str|int|float|bool|dict|list)$")
# Where grammars are compiled: "[17:33:11] /project/cpp/json_schema_converter.cc:4175: Unsupported type".
_SOURCE = re.compile(r"(\[[\d:]+\] )?/\S+?:\d+: ")
_LEAK = re.compile(r"(/[\w.-]+){2,}|Traceback|File \"")


def abort_ids(call: Call) -> list[str]:
    """The ids under which the engine knows a call; none where it made up its own."""
    if call.endpoint not in _ID_FIELDS:
        return []
    return [call.id] if call.prompts == 1 else [f"{call.id}_{index}" for index in range(call.prompts)]


def needs_served_name(call: Call) -> bool:
    """Whether the engine takes no other model name than its own: `/v1/responses` checks it, and a colon would mean a LoRA adapter."""
    return call.endpoint is Endpoint.RESPONSES or ":" in call.model


def refuse_internal(call: Call, allowed: Container[str] = ()) -> None:
    """Raises InvalidRequest for a parameter that only the operator may set, or allow. `false` asks for nothing."""
    for name in call.fields:
        if name in INTERNAL_FIELDS and name not in allowed and call.fields[name] != _FALSE:
            raise InvalidRequest(f"Unsupported parameter: '{name}' is internal to the engine.", param=name, code="unsupported_parameter")


def engine_body(call: Call, served_name: str | None = None) -> bytes:
    """The body the engine gets: the client's own bytes, with our id (for aborting), usage asked for in streams (and given once, at the
    end), and the engine's own name for the model where it takes no other."""
    changes: dict[str, Any] = {}
    fields = call.fields
    if not _IGNORED_FIELDS.isdisjoint(fields):
        fields = {name: value for name, value in fields.items() if name not in _IGNORED_FIELDS}
    if call.endpoint in _ID_FIELDS:
        changes[_ID_FIELDS[call.endpoint]] = call.id
    if served_name is not None:
        changes["model"] = served_name
    if call.salt and call.endpoint in _SALTED and "cache_salt" not in fields:
        changes["cache_salt"] = call.salt
    if call.endpoint in (Endpoint.CHAT, Endpoint.COMPLETIONS):
        if call.stream:
            options = _options.decode(fields["stream_options"]) if "stream_options" in fields else {}
            options.pop("continuous_usage_stats", None)
            changes["stream_options"] = {**options, "include_usage": True, **({"continuous_usage_stats": True} if call.keep else {})}
        elif "stream_options" in fields:
            fields = {name: value for name, value in fields.items() if name != "stream_options"}
    return body.splice(fields, changes)


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
