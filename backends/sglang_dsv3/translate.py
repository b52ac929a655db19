"""Our words into SGLang's: what a call becomes on its way to the engine. Measured against SGLang 0.5.23."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import msgspec

from gateway.errors import InvalidRequest
from gateway.plugin import BOUNDS, Call, Endpoint, Terms
from gateway.wire import body
from gateway.wire.fields import flag, integer

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
# A client's own idea of its priority is not asked for unless the operator allows it; one that sends it is served like everybody.
# `session_id` is OpenRouter's name for what binds calls to a host, which the core has read; SGLang would look for a session of its own.
_IGNORED_FIELDS = ("priority", "session_id")
# Where the engine takes the id that an abort needs; the other endpoints' work ends with their connection.
_ID_FIELDS = {Endpoint.CHAT: "rid", Endpoint.COMPLETIONS: "rid", Endpoint.RESPONSES: "request_id"}

# Whose streams are chunks, with options.
_CHUNKS = frozenset([Endpoint.CHAT, Endpoint.COMPLETIONS])
# Where it takes a priority, and which of two goes first is the operator's choice of flags: higher numbers, unless
# `--schedule-low-priority-values-first` is set. What comes without one is last, so every call gets one.
_PRIORITISED = frozenset([Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES, Endpoint.EMBEDDINGS])
_LOWEST = 9
# Where it takes words of ours that keep one caller's prompts apart in the prefix cache.
_SALTED = _CHUNKS

# What is asked of every stream: its usage at the end, and of one that may have to be continued with every event.
_COUNTED = {"include_usage": True}
_COUNTING = {"include_usage": True, "continuous_usage_stats": True}
_ENCODED = {False: body.encode(_COUNTED), True: body.encode(_COUNTING)}
_encoder = msgspec.json.Encoder()
_FALSE = msgspec.Raw(b"false")
_options = msgspec.json.Decoder(dict[str, msgspec.Raw])


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
    if INTERNAL_FIELDS.isdisjoint(call.fields):
        return
    for name in call.fields:
        if name in INTERNAL_FIELDS and name not in allowed and call.fields[name] != _FALSE:
            raise InvalidRequest(f"Unsupported parameter: '{name}' is internal to the engine.", param=name, code="unsupported_parameter")


def refuse_background(call: Call) -> None:
    """Raises InvalidRequest for an answer that is made when nobody is there to count it any more."""
    if call.endpoint is Endpoint.RESPONSES and not call.stream and flag(call.fields, "background"):
        message = "Unsupported parameter: 'background' is not served where use is counted, since its tokens would not be: use 'stream'."
        raise InvalidRequest(message, param="background", code="unsupported_parameter")


def priority(terms: Terms, order: str) -> int:
    """The caller's class in SGLang's numbers. They lie so close together that nobody's running request is preempted for another's: that
    takes a difference of more than 10 (`--priority-scheduling-preemption-threshold`)."""
    return terms.priority if order == "lower_first" else _LOWEST - terms.priority


def _own_priority(sent: dict[str, Any], terms: Terms, order: str) -> int:
    """The same, or behind it what the client itself asks for, down to the last class."""
    most, own = priority(terms, order), integer(sent, "priority")
    return min(max(own, most), _LOWEST) if order == "lower_first" else max(min(own, most), 0)


def engine_body(call: Call, terms: Terms, served_name: str | None = None, allowed: Container[str] = (), order: str | None = None) -> bytes:
    """The body the engine gets: the client's own bytes, with our id (for aborting), the core's bound where the client names none, usage
    asked for in streams (and given once, at the end), the engine's own name for the model where it takes no other, and where its queue goes
    by priority (`order`) that of the caller's class."""
    endpoint, fields = call.endpoint, call.fields
    sent: dict[str, Any] = dict(fields)
    for name in _IGNORED_FIELDS:
        if name in sent and name not in allowed:
            del sent[name]
    if order is not None and endpoint in _PRIORITISED:
        sent["priority"] = _own_priority(sent, terms, order) if "priority" in sent else priority(terms, order)
    if endpoint in _ID_FIELDS:
        sent[_ID_FIELDS[endpoint]] = call.id
    if served_name is not None:
        sent["model"] = served_name
    if terms.salt and endpoint in _SALTED and "cache_salt" not in fields:
        sent["cache_salt"] = terms.salt
    if terms.bound is not None and endpoint in BOUNDS and not any(name in fields for name in BOUNDS[endpoint]):
        sent[BOUNDS[endpoint][0]] = terms.bound
    if endpoint in _CHUNKS:
        if not call.stream:
            sent.pop("stream_options", None)
        elif "stream_options" in fields:
            options = _options.decode(fields["stream_options"])
            options.pop("continuous_usage_stats", None)
            sent["stream_options"] = {**options, **(_COUNTING if terms.keep else _COUNTED)}
        else:
            sent["stream_options"] = _ENCODED[bool(terms.keep)]
    return _encoder.encode(sent)
