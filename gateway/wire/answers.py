"""Answers as the OpenAPI document shows them: what OpenAI's SDKs call required. The gateway never decodes an answer into these; engines
may say more than they name, and it reaches the client."""

from __future__ import annotations

from typing import Literal

import msgspec

from gateway.wire.requests import Object

Struct = msgspec.Struct


class Usage(Struct):
    """Tokens as the engine counted them."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int | None = None
    prompt_tokens_details: Object | None = None
    completion_tokens_details: Object | None = None


class ToolCallFunction(Struct):
    """A call the model asks for; `arguments` is JSON in a string."""

    name: str
    arguments: str


class ToolCall(Struct):
    """One call of a tool."""

    id: str
    type: Literal["function"]
    function: ToolCallFunction


class AnswerMessage(Struct):
    """What the model said."""

    role: Literal["assistant"]
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class Choice(Struct):
    """One of `n` answers."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter", "function_call"]
    logprobs: Object | None = None


class ChatCompletion(Struct):
    """The answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class TextChoice(Struct):
    """One of `n` answers to one of the prompts."""

    index: int
    text: str
    finish_reason: str
    logprobs: Object | None = None


class TextCompletion(Struct):
    """The answer of `/v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class Embedding(Struct):
    """One vector, as numbers or as base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(Struct):
    """The answer of `/v1/embeddings`."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage


class Response(Struct):
    """The answer of `/v1/responses`."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: str
    output: list[Object]
    usage: Object | None = None


class MessageAnswer(Struct):
    """The answer of `/v1/messages`."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Object]
    stop_reason: str | None = None
    usage: Object | None = None


class InputTokens(Struct):
    """The answer of `/v1/responses/input_tokens`."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class TokenCount(Struct):
    """The answer of `/v1/messages/count_tokens`."""

    input_tokens: int


class Ranked(Struct):
    """One document with its score."""

    index: int
    score: float
    document: str | None = None


class Scores(Struct):
    """The answer of `/v1/score`: a row an item, a column a label."""

    object: str
    scores: list[list[float]]
    model: str


class Tokens(Struct):
    """The answer of `/tokenize`."""

    tokens: list[int | list[int]]
    count: int | list[int]
    max_model_len: int


class ModelInfo(Struct):
    """One served model. What is left out is not known (yet); where its hosts differ, the least.

    `max_model_len` and `context_length` are one number under the two names that clients look for: tokens of a prompt and its answer.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | msgspec.UnsetType = msgspec.UNSET
    context_length: int | msgspec.UnsetType = msgspec.UNSET
    capabilities: dict[str, bool] | msgspec.UnsetType = msgspec.UNSET


class ModelList(Struct):
    """Every model and alias."""

    object: Literal["list"]
    data: list[ModelInfo]


class AnthropicModel(Struct):
    """One served model, for who sends `anthropic-version`."""

    id: str
    type: Literal["model"]
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int | None = None
    max_tokens: int | None = None


class AnthropicModels(Struct):
    """A page of them."""

    data: list[AnthropicModel]
    has_more: bool
    first_id: str | None
    last_id: str | None


class LimitLeft(Struct):
    """One limit of the key that asks, of its team or of a model. Of a rate `left` is what may be used at once; null where it is not known
    (requests in flight, or while the store of limits does not answer)."""

    limit: Literal["rpm", "tpm", "max_in_flight", "tokens_per_day", "budget"]
    of: str
    per: Literal["minute", "day", "month", "now"]
    amount: float
    left: float | None = None
    unused_in_s: float | None = None


class DayUsed(Struct):
    """What the key that asks has used of one model on one day."""

    day: str
    model: str
    requests: int
    limited: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    delivered_tokens: int
    cost: float


class OwnUsage(Struct):
    """What the key that asks may use, what is left of it, and what it has used in the last month."""

    object: Literal["usage"]
    key: str
    team: str | None
    limits: list[LimitLeft]
    days: list[DayUsed]


class Health(Struct):
    """The gateway's own state."""

    status: Literal["alive", "ready"]
    detail: str | None = None
