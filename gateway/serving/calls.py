"""From a request's bytes to a Call: one table of what the gateway knows of each endpoint, and one way through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.errors import InvalidRequest
from gateway.plugin import BOUNDS, Call, Endpoint
from gateway.wire import answers, body, requests
from gateway.wire.error import Shape
from gateway.wire.trace import new_id

# Content types a JSON body is accepted under; the SDKs send the first, curl -d without a header the last.
_JSON_TYPES = (b"", b"application/json", b"application/x-www-form-urlencoded")
_messages = msgspec.json.Decoder(list[msgspec.Raw])
_DEPRECATED = {"functions": "tools", "function_call": "tool_choice"}


@dataclass(frozen=True)
class Spec:
    """One endpoint as data.

    `request` says what its bodies hold, `answer` what comes back where it is no stream; `operation` is its `gen_ai.operation.name`,
    `prompt` where the words of a prompt stand, `id_prefix` begins the public id, `shape` whose words its errors are told in;
    `generates`: tokens come out, not only in. What bounds them is in `plugin.BOUNDS`, since backends need it too.
    """

    request: type[msgspec.Struct]
    answer: Any
    operation: str
    prompt: tuple[str, ...]
    id_prefix: str = "call-"
    generates: bool = False
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
    ),
    Endpoint.COMPLETIONS: Spec(
        requests.CompletionRequest,
        answers.TextCompletion,
        operation="text_completion",
        prompt=("prompt",),
        id_prefix="cmpl-",
        generates=True,
    ),
    Endpoint.EMBEDDINGS: Spec(requests.EmbeddingsRequest, answers.EmbeddingList, operation="embeddings", prompt=("input",)),
    Endpoint.RESPONSES: Spec(
        requests.ResponsesRequest,
        answers.Response,
        operation="responses",
        prompt=("input", "instructions", "tools"),
        id_prefix="resp_",
        generates=True,
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
    Endpoint.RERANK: Spec(requests.RerankRequest, list[answers.Ranked], operation="rerank", prompt=("query", "documents", "instruct")),
    Endpoint.SCORE: Spec(requests.ScoreRequest, answers.Scores, operation="score", prompt=("query", "items")),
    Endpoint.TOKENIZE: Spec(requests.TokenizeRequest, answers.Tokens, operation="tokenize", prompt=("prompt", "messages")),
}
# By path, for those who know a request before its endpoint.
SHAPES = {endpoint.value: spec.shape for endpoint, spec in SPECS.items()}
OPERATIONS = {endpoint.value: spec.operation for endpoint, spec in SPECS.items()}
_decoders = {endpoint: msgspec.json.Decoder(spec.request) for endpoint, spec in SPECS.items()}


def parse(endpoint: Endpoint, raw: bytes, content_type: bytes = b"") -> Call:
    """A Call from a body's bytes; raises InvalidRequest naming the parameter that is wrong.

    Explicit nulls of known parameters count as absent, as in OpenAI's API, and go no further: not every engine takes them.
    """
    if content_type.split(b";", 1)[0].strip().lower() not in _JSON_TYPES:
        raise InvalidRequest("The content type must be application/json.", code="invalid_content_type")
    fields = body.peek(raw)
    for name, instead in _DEPRECATED.items():
        if body.given(fields, name):
            raise InvalidRequest(f"'{name}' is not supported any more: use '{instead}'.", param=name, code="unsupported_parameter")
    # What an endpoint does not have reads as None: the struct decides which parameters there are.
    request: Any = body.decode(raw, _decoders[endpoint])
    for name in [name for name, value in fields.items() if name in request.__struct_fields__ and bytes(value) == b"null"]:
        del fields[name]
    if getattr(request, "top_logprobs", None) and getattr(request, "logprobs", True) is not True:
        raise InvalidRequest("'top_logprobs' needs 'logprobs': true.", param="top_logprobs", code="invalid_value")
    prompts = _count_prompts(request.prompt) if endpoint is Endpoint.COMPLETIONS else 1
    options = getattr(request, "stream_options", None)
    return Call(
        endpoint=endpoint,
        id=SPECS[endpoint].id_prefix + new_id(),
        model=request.model,
        fields=fields,
        stream=getattr(request, "stream", None) or False,
        show_usage=options is not None and options.include_usage is True,
        choices=(getattr(request, "n", None) or 1) * prompts,
        prompts=prompts,
    )


def bounding(call: Call) -> str:
    """The parameter by which a call bounds its answer, or ""."""
    return next((name for name in BOUNDS.get(call.endpoint, ()) if name in call.fields), "")


def bound(call: Call) -> int | None:
    """How many tokens an answer may have by the call's own word."""
    name = bounding(call)
    return int(bytes(call.fields[name])) if name else None


def leading(call: Call) -> bytes:
    """What an answer's prefix cache depends on first: the messages up to the first user's, or the beginning of the prompt."""
    if call.endpoint not in (Endpoint.CHAT, Endpoint.MESSAGES):
        return b"".join(bytes(call.fields.get(name, b""))[:1024] for name in ("prompt", "input", "instructions"))
    found = bytes(call.fields.get("system", b""))
    for message in _messages.decode(call.fields["messages"]):
        found += bytes(message)
        if b'"user"' in found:
            break
    return found


def _count_prompts(prompt: str | list[Any]) -> int:
    """How many prompts a completion request holds: a text or a list of token ids is one, a list of those is many."""
    return len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
