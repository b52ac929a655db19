"""JSON answers of the engine, whole: what they used, why they ended, and as what the client gets them."""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec

from backends.sglang_dsv3 import failures
from backends.sglang_dsv3.shapes import EngineUsage, WithUsage, answer_decoder, raw_decoder, usage_decoder
from gateway.plugin import Call, Endpoint, Usage

Edit = Callable[[bytes], bytes]

_ID = re.compile(rb'^\{"id":"([^"]*)"')
# Which weights gave which tokens, as SGLang says it at the end of a chat: an array, where OpenAI's metadata are texts and nothing else.
# Clients that look at types warn of it (openai-python, wherever an answer is dumped) or refuse the answer.
_VERSIONS = b'"weight_versions":['
_STRING = rb'"(?:[^"\\\x00-\x1f]|\\.)*"'
_METADATA = re.compile(rb'("metadata":\{"weight_version":%s,"weight_versions":)(\[(?:[^]"\x00-\x1f]|%s)*\])' % (_STRING, _STRING))


def whole(content: bytes, call: Call, served_name: str | None = None) -> tuple[bytes, Usage | None, list[str]]:
    """A JSON answer as the client gets it, its usage, and why its choices ended; raises AttemptFailed when the engine gave up on it, or
    when it is no JSON."""
    usage: Usage | None = None
    reasons: list[str] = []
    try:
        found = answer_decoder.decode(content)
    except msgspec.ValidationError:
        _check(content)  # an answer of another shape, which is nobody's business
    except (msgspec.DecodeError, RecursionError) as error:
        raise failures.nonsense(f"no JSON: {error}") from None
    else:
        reasons = [choice.finish_reason for choice in found.choices or () if choice.finish_reason is not None]
        if "abort" in reasons:
            raise failures.aborted()
        if call.endpoint is Endpoint.RESPONSES and found.status == "failed":
            raise failures.named_error(content, call)
        usage = _usage(found.usage, None)
    if call.endpoint is Endpoint.CHAT and _VERSIONS in content:
        content = _METADATA.sub(_as_text, content, count=1)
    if call.choices > 1:  # SGLang gives several choices ids of its own making
        content = _ID.sub(b'{"id":"%s"' % call.id.encode(), content, count=1)
    if served_name is not None:
        content = renaming(served_name, call.model)(content)
    return content, usage, reasons


def _as_text(found: re.Match[bytes]) -> bytes:
    return found[1] + b'"' + found[2].replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'


def _check(content: bytes) -> None:
    try:
        raw_decoder.decode(content)
    except (msgspec.DecodeError, RecursionError) as error:
        raise failures.nonsense(f"no JSON: {error}") from None


def usage_of(content: bytes, before: Usage | None = None) -> Usage | None:
    """The usage in an answer or an event, if it holds one; counts that it leaves out are those of `before`."""
    try:
        found: WithUsage | None = usage_decoder.decode(content)
    except msgspec.DecodeError:
        return before
    while found is not None and found.usage is None:
        found = found.response or found.message
    return _usage(found.usage, before) if found is not None else before


def _usage(usage: EngineUsage | None, before: Usage | None) -> Usage | None:
    if usage is None:
        return before
    known = before or Usage()
    details = usage.prompt_tokens_details or usage.input_tokens_details
    cached = usage.cache_read_input_tokens if usage.cache_read_input_tokens is not None else known.cached_tokens
    of_completion = usage.completion_tokens_details
    reasoning = of_completion.reasoning_tokens if of_completion is not None else usage.reasoning_tokens
    return Usage(
        prompt_tokens=usage.prompt_tokens or usage.input_tokens + (usage.cache_read_input_tokens or 0) or known.prompt_tokens,
        completion_tokens=usage.completion_tokens or usage.output_tokens or known.completion_tokens,
        cached_tokens=details.cached_tokens if details is not None else cached,
        reasoning_tokens=reasoning or None,
    )


def renaming(served_name: str, name: str) -> Edit:
    """Exchanges the engine's own name for the model with the client's, where it stands first (a quote inside a string is escaped)."""
    found = re.compile(rb'"model":\s*' + re.escape(msgspec.json.encode(served_name)))
    instead = b'"model":' + msgspec.json.encode(name)
    return lambda content: found.sub(lambda _: instead, content, count=1)
