"""From a request's bytes to a Call: one table of what the gateway knows of each endpoint, and one way through it.

The engine judges a request. Here only that is read which the gateway must know itself, and it is read as the engine reads it (`lax`): who
serves it, whether it is a stream, how many answers it asks for and how long they may be. OpenAI's own rules are kept on demand (`strict`).
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.errors import InvalidRequest, NoSuchResponse, UnknownUrl
from gateway.plugin import BOUNDS, Call, Endpoint
from gateway.wire import answers, body, fields, requests
from gateway.wire.body import Fields
from gateway.wire.error import Shape
from gateway.wire.spelling import Names
from gateway.wire.strict import DEPRECATED, Rules
from gateway.wire.structure import Prompts
from gateway.wire.trace import new_id

# Content types a JSON body is accepted under; the SDKs send the first, curl -d without a header the last.
_JSON_TYPES = (b"", b"application/json", b"application/x-www-form-urlencoded")
_NULL = msgspec.Raw(b"null")
MODELS_PATH = "/v1/models"
# How many answers to one prompt; the bound is OpenAI's.
MAX_CHOICES = 128
_MAX_TOKENS = (1 << 31) - 1
# Unknown parameters of one request that are looked at for a slip.
_MAX_UNKNOWN = 8


@dataclass(frozen=True)
class Spec:
    """One endpoint as data.

    `request` says what its bodies hold, `answer` what comes back where it is no stream; `operation` is its `gen_ai.operation.name`,
    `prompt` where the words of a prompt stand, `id_prefix` begins the public id, `shape` whose words its errors are told in;
    `generates`: tokens come out, not only in. What bounds them is in `plugin.BOUNDS`, since backends need it too; `least` is the smallest
    bound that an engine takes; `zero_is_unset`: it takes one of 0 for none at all; `computes`: a model works on it, which is what limits
    on tokens are about; `keeps`: its answers may be asked for again, by whom they were made for.
    """

    request: type[msgspec.Struct]
    answer: Any
    operation: str
    prompt: tuple[str, ...]
    id_prefix: str = "call-"
    generates: bool = False
    least: int = 1
    zero_is_unset: bool = False
    computes: bool = True
    keeps: bool = False
    shape: Shape = Shape.OPENAI

    @property
    def streams(self) -> bool:
        """Whether a client may ask for events."""
        return "stream" in self.request.__struct_fields__


SPECS = {
    Endpoint.CHAT: Spec(
        requests.ChatRequest,
        answers.ChatCompletion,
        operation="chat",
        prompt=("messages", "tools"),
        id_prefix="chatcmpl-",
        generates=True,
        zero_is_unset=True,
    ),
    Endpoint.COMPLETIONS: Spec(
        requests.CompletionRequest,
        answers.TextCompletion,
        operation="text_completion",
        prompt=("prompt",),
        id_prefix="cmpl-",
        generates=True,
        least=0,
    ),
    Endpoint.EMBEDDINGS: Spec(requests.EmbeddingsRequest, answers.EmbeddingList, operation="embeddings", prompt=("input",)),
    Endpoint.RESPONSES: Spec(
        requests.ResponsesRequest,
        answers.Response,
        operation="responses",
        prompt=("input", "instructions", "tools"),
        id_prefix="resp_",
        generates=True,
        keeps=True,
        shape=Shape.RESPONSES,
    ),
    Endpoint.MESSAGES: Spec(
        requests.MessagesRequest,
        answers.MessageAnswer,
        operation="messages",
        prompt=("system", "messages", "tools"),
        id_prefix="msg_",
        generates=True,
        shape=Shape.ANTHROPIC,
    ),
    Endpoint.INPUT_TOKENS: Spec(
        requests.InputTokensRequest,
        answers.InputTokens,
        operation="count_tokens",
        prompt=("input", "instructions", "tools"),
        computes=False,
    ),
    Endpoint.COUNT_TOKENS: Spec(
        requests.CountTokensRequest,
        answers.TokenCount,
        operation="count_tokens",
        prompt=("system", "messages", "tools"),
        computes=False,
        shape=Shape.ANTHROPIC,
    ),
    Endpoint.RERANK: Spec(requests.RerankRequest, list[answers.Ranked], operation="rerank", prompt=("query", "documents", "instruct")),
    Endpoint.SCORE: Spec(requests.ScoreRequest, answers.Scores, operation="score", prompt=("query", "items")),
    Endpoint.TOKENIZE: Spec(requests.TokenizeRequest, answers.Tokens, operation="tokenize", prompt=("prompt", "messages"), computes=False),
}
# By path, for those who know a request before its endpoint.
SHAPES = {endpoint.value: spec.shape for endpoint, spec in SPECS.items()}
OPERATIONS = {endpoint.value: spec.operation for endpoint, spec in SPECS.items()}
# Whose answers may be asked for again.
KEPT = frozenset(endpoint for endpoint, spec in SPECS.items() if spec.keeps)
# The id of such an answer: random, and then whose it is.
_KEPT_ID = re.compile(r"resp_([0-9a-f]{32})([0-9a-f]{16})")
# The longest first: /chat/completions ends in /completions.
_PATHS = sorted([*SHAPES, MODELS_PATH], key=len, reverse=True)
# What may be repeated of a host's name that a client sent.
_HOST = re.compile(r"[A-Za-z0-9._:\[\]-]{1,255}")
_REQUIRED = {
    endpoint: tuple(field.name for field in msgspec.structs.fields(spec.request) if field.required) for endpoint, spec in SPECS.items()
}
_KNOWN = {endpoint: frozenset(spec.request.__struct_fields__) for endpoint, spec in SPECS.items()}
_NAMES = {endpoint: Names(known) for endpoint, known in _KNOWN.items()}
_RULES = {endpoint: Rules(spec.request) for endpoint, spec in SPECS.items()}


def parse(endpoint: Endpoint, raw: bytes, content_type: bytes = b"", strict: bool = False) -> Call:
    """A Call from a body's bytes; raises InvalidRequest naming the parameter that is wrong. A large body wants `parse_large`.

    A null counts as absent and goes no further: not every engine takes it. What is read here goes on in its plain form, `"4"` as `4`.
    """
    found = _parameters(endpoint, raw, content_type, strict)
    prompts = 1
    if endpoint is Endpoint.COMPLETIONS:
        several = Prompts(memoryview(found["prompt"]))
        while several.look():
            pass
        prompts = several.count
    return _call(endpoint, found, prompts)


async def parse_large(endpoint: Endpoint, raw: bytes, content_type: bytes = b"", strict: bool = False) -> Call:
    """`parse` for a body of more than `structure.LARGE_BYTES` (as `body.read` gives it), with turns for others in between."""
    found = _parameters(endpoint, raw, content_type, strict)
    await asyncio.sleep(0)
    prompts = 1
    if endpoint is Endpoint.COMPLETIONS:
        several = Prompts(memoryview(found["prompt"]))
        while several.look():
            await asyncio.sleep(0)
        prompts = several.count
    call = _call(endpoint, found, prompts)
    await asyncio.sleep(0)
    return call


def _parameters(endpoint: Endpoint, raw: bytes, content_type: bytes, strict: bool) -> Fields:
    if content_type != b"application/json" and content_type.split(b";", 1)[0].strip().lower() not in _JSON_TYPES:
        raise InvalidRequest("The content type must be application/json.", code="invalid_content_type")
    found = body.peek(raw)
    if _NULL in found.values():
        found = {name: value for name, value in found.items() if value != _NULL}
    for name in _REQUIRED[endpoint]:
        if name not in found:
            raise InvalidRequest(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    if strict:
        _RULES[endpoint].check(raw, found)
    return found


def _call(endpoint: Endpoint, found: Fields, prompts: int) -> Call:
    spec, known = SPECS[endpoint], _KNOWN[endpoint]
    model = fields.short_text(found, "model")
    if "messages" in _REQUIRED[endpoint]:
        fields.array(found, "messages")
    if endpoint is Endpoint.CHAT:
        _check_chat(found)
    _check_bound(endpoint, spec, found)
    return Call(
        endpoint=endpoint,
        id=spec.id_prefix + new_id(),
        model=model,
        fields=found,
        stream="stream" in found and "stream" in known and fields.flag(found, "stream"),
        show_usage="stream_options" in found and "stream_options" in known and fields.shows_usage(found),
        choices=prompts * _choices(found) if "n" in found and "n" in known else prompts,
        prompts=prompts,
    )


def owned(call: Call, owner: str) -> Call:
    """The same call under a public id that belongs to this owner (a key's name); raises NoSuchResponse where it goes on from an answer that
    does not."""
    if "previous_response_id" in call.fields:
        before = fields.short_text(call.fields, "previous_response_id")
        if not is_owned(before, owner):
            raise NoSuchResponse(before, "previous_response_id")
    return msgspec.structs.replace(call, id=call.id + _mark(call.id.rpartition("_")[2], owner))


def is_owned(id: str, owner: str) -> bool:
    """Whether an answer of this id was made for this owner. The id itself says so, to every worker and gateway alike: an engine knows an
    answer by the whole of it, so who changes the mark in it asks for another answer."""
    found = _KEPT_ID.fullmatch(id)
    return found is not None and found[2] == _mark(found[1], owner)


def _mark(random: str, owner: str) -> str:
    return hashlib.sha256(f"response {random} of {owner}".encode()).hexdigest()[:16]


def near_miss(call: Call) -> str:
    """What was probably meant by parameters that the endpoint does not have, in words fit for a header; "" where nothing is to be said."""
    known = _KNOWN[call.endpoint]
    if known.issuperset(call.fields):
        return ""
    names = _NAMES[call.endpoint]
    unknown = [name for name in call.fields if name not in known]
    found = [(name, near) for name in unknown[:_MAX_UNKNOWN] if (near := names.near(name)) and near not in call.fields]
    return "; ".join(f"unknown parameter '{name}', did you mean '{near}'?" for name, near in found)


def unknown_url(method: str, path: str, scheme: str, host: str) -> UnknownUrl:
    """The answer to a request for a path that does not exist; `host` as the client named it. Says how to set a client right that added
    `/v1` once too often, or not at all."""
    base = f"{scheme}://{host if _HOST.fullmatch(host) else 'HOST'}"
    steps = [step for step in path.split("/") if step]
    while steps and steps[0] == "v1":
        steps.pop(0)
    if not steps:
        return UnknownUrl(method, path, f"The API is below {base}/v1: set base_url to that.")
    for known in _PATHS:
        wanted = known.removeprefix("/v1").strip("/").split("/")
        if steps[-len(wanted) :] == wanted or (steps[: len(wanted)] == wanted and not path.startswith(f"{known}/")):
            # Anthropic's SDKs add /v1 themselves.
            root = base if SHAPES.get(known) is Shape.ANTHROPIC or not known.startswith("/v1") else f"{base}/v1"
            return UnknownUrl(method, path, f"It is served at {known}: set base_url to {root}.")
    return UnknownUrl(method, path)


def bounding(call: Call) -> str:
    """The parameter by which a call bounds its answer, or ""."""
    return next((name for name in BOUNDS.get(call.endpoint, ()) if name in call.fields), "")


def bound(call: Call) -> int | None:
    """How many tokens an answer may have by the call's own word."""
    name = bounding(call)
    return int(bytes(call.fields[name])) if name else None


def _check_chat(found: Fields) -> None:
    """What an engine lets pass without a word, and without doing it."""
    if "functions" in found and fields.is_empty_array(found, "functions"):
        del found["functions"]
    if "function_call" in found and bytes(found["function_call"]) in (b'"none"', b'"auto"'):
        del found["function_call"]
    for name, instead in DEPRECATED.items():
        if name in found:
            raise InvalidRequest(f"'{name}' is not supported any more: use '{instead}'.", param=name, code="unsupported_parameter")


def _check_bound(endpoint: Endpoint, spec: Spec, found: Fields) -> None:
    """Of an endpoint's bounds the first that is set counts."""
    for name in BOUNDS.get(endpoint, ()):
        if name in found:
            tokens = fields.integer(found, name)
            if not tokens and spec.zero_is_unset:
                del found[name]
                continue
            if tokens < spec.least:
                raise fields.at_least(name, spec.least)
            if tokens > _MAX_TOKENS:
                raise fields.at_most(name, _MAX_TOKENS)
            break


def _choices(found: Fields) -> int:
    choices = fields.integer(found, "n")
    if choices < 1:
        raise fields.at_least("n", 1)
    if choices > MAX_CHOICES:
        raise fields.at_most("n", MAX_CHOICES)
    return choices
