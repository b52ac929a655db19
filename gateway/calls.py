"""From a request's bytes to a Call: what the gateway must know, and nothing more."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec

from gateway.errors import InvalidRequest
from gateway.plugin import Call, Endpoint
from gateway.wire import body

_ID_PREFIX = {Endpoint.CHAT: "chatcmpl-", Endpoint.COMPLETIONS: "cmpl-"}
_CONTENT = {Endpoint.CHAT: "messages", Endpoint.COMPLETIONS: "prompt"}
# OpenAI's own bound on n.
_MAX_N = 128
# Content types a JSON body is accepted under; the SDKs send the first, curl -d without a header the last.
_JSON_TYPES = (b"", b"application/json", b"application/x-www-form-urlencoded")


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


def parse(endpoint: Endpoint, raw: bytes, content_type: bytes = b"") -> Call:
    """A Call from a body's bytes; raises InvalidRequest naming the parameter that is wrong.

    Explicit nulls count as absent, as in OpenAI's API.
    """
    if content_type.split(b";", 1)[0].strip().lower() not in _JSON_TYPES:
        raise InvalidRequest("The content type must be application/json.", code="invalid_content_type")
    fields = body.peek(raw)
    model = body.value(fields, "model", str, "a string")
    if not model:
        raise _missing("model", "the name of a served model")
    content = _CONTENT[endpoint]
    if content not in fields:
        raise _missing(content, "a list of messages" if endpoint is Endpoint.CHAT else "a string or a list")
    prompts = 1 if endpoint is Endpoint.CHAT else _count_prompts(fields[content])
    n = body.value(fields, "n", int, "an integer")
    if n is not None and not 1 <= n <= _MAX_N:
        raise InvalidRequest(f"Invalid value for 'n': {n}. Accepted: 1 to {_MAX_N}.", param="n", code="invalid_value")
    stream = body.value(fields, "stream", bool, "true or false") or False
    options = body.value(fields, "stream_options", _StreamOptions, "an object with include_usage")
    return Call(
        endpoint=endpoint,
        id=_ID_PREFIX[endpoint] + uuid.uuid4().hex,
        model=model,
        fields=fields,
        stream=stream,
        show_usage=bool(options and options.include_usage),
        choices=(n or 1) * prompts,
        prompts=prompts,
    )


def _missing(name: str, expected: str) -> InvalidRequest:
    return InvalidRequest(f"Missing required parameter: '{name}' ({expected}).", param=name, code="missing_required_parameter")


def _count_prompts(raw: msgspec.Raw) -> int:
    """How many prompts a completion request holds: a string or a list of token ids is one, a list of those is many."""
    if not bytes(raw).lstrip().startswith(b"["):
        return 1
    prompts: list[Any] = msgspec.json.decode(raw)
    return len(prompts) if prompts and isinstance(prompts[0], str | list) else 1
