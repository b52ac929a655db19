"""Request bodies, one struct an endpoint: what the gateway checks before an engine sees it, and what the OpenAPI document is made of.

A struct names what is known, in OpenAI's terms; it never keeps anything out: fields it does not name pass to the engine as they came.
A null counts as absent.
Ranges are OpenAI's (openai-python 3.54.0's types and its API reference); where SGLang 0.5.23 is narrower it says so itself.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Raw

Struct = msgspec.Struct

# An object that is not looked into: only the engine can judge it.
Object = dict[str, Raw]

Name = Annotated[str, Meta(min_length=1)]
ModelName = Annotated[str, Meta(min_length=1, description="A served model or alias, as `/v1/models` lists them.")]
Temperature = Annotated[float, Meta(ge=0, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Choices = Annotated[int, Meta(ge=1, le=128, description="How many answers to one prompt.")]
Tokens = Annotated[int, Meta(ge=1, lt=2**31)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
Stop = str | Annotated[list[str], Meta(max_length=4)]
LogitBias = dict[Annotated[str, Meta(pattern="^[0-9]+$", description="A token id.")], Annotated[float, Meta(ge=-100, le=100)]]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Prompts = Annotated[list[str | int | list[int]], Meta(min_length=1, description="Texts, the tokens of one text, or lists of tokens.")]
Metadata = Annotated[dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)]


class StreamOptions(Struct):
    """What a stream carries besides its text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Part(Struct):
    """One part of a message's content."""

    type: Name


class Message(Struct):
    """One message. Which roles and parts a model understands is its engine's word."""

    role: Annotated[Name, Meta(description="developer, system, user, assistant or tool.")]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Object] | None = None
    tool_call_id: str | None = None


class FunctionName(Struct):
    """Names a function."""

    name: Name


class Function(FunctionName):
    """A function the model may call; `parameters` is a JSON schema."""

    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None


class Tool(Struct):
    """A tool; engines know functions only."""

    type: Literal["function"]
    function: Function


class NamedTool(Struct):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionName


class Format(Struct):
    """The form an answer must have."""

    type: Name
    json_schema: Object | None = None


class _Sampling(Struct, kw_only=True):
    """What chat and plain completions share."""

    model: ModelName
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    max_tokens: Tokens | None = None
    n: Choices | None = None
    presence_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    user: str | None = None


class ChatRequest(_Sampling, kw_only=True):
    """Continue a chat. `POST /v1/chat/completions`, OpenAI's 37 parameters."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    audio: Object | None = None
    function_call: None = None
    functions: None = None
    logprobs: bool | None = None
    max_completion_tokens: Tokens | None = None
    metadata: Metadata | None = None
    modalities: list[str] | None = None
    moderation: Object | None = None
    parallel_tool_calls: bool | None = None
    prediction: Object | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Object | None = None
    prompt_cache_retention: str | None = None
    reasoning_effort: str | float | None = None
    response_format: Format | None = None
    safety_identifier: Annotated[str, Meta(max_length=128)] | None = None
    service_tier: str | None = None
    store: bool | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    tools: list[Tool] | None = None
    top_logprobs: TopLogprobs | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    web_search_options: Object | None = None


class CompletionRequest(_Sampling, kw_only=True):
    """Continue a text. `POST /v1/completions`."""

    prompt: str | Prompts
    best_of: Choices | None = None
    echo: bool | None = None
    logprobs: TopLogprobs | None = None
    max_tokens: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    suffix: str | None = None


class EmbeddingsRequest(Struct, kw_only=True):
    """Turn texts into vectors. `POST /v1/embeddings`."""

    model: ModelName
    input: str | Prompts
    dimensions: Tokens | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None


class ResponsesRequest(Struct, kw_only=True):
    """Continue a conversation in OpenAI's newer shape. `POST /v1/responses`; `background` and `previous_response_id` are for engines that
    keep answers."""

    model: ModelName
    input: str | list[Object]
    background: bool | None = None
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    metadata: Metadata | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    text: Object | None = None
    tools: list[Object] | None = None
    top_logprobs: TopLogprobs | None = None
    top_p: Share | None = None


class MessagesRequest(Struct, kw_only=True):
    """Continue a chat in Anthropic's shape. `POST /v1/messages`."""

    model: ModelName
    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Tokens
    metadata: Object | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    system: str | list[Part] | None = None
    temperature: Temperature | None = None
    tools: list[Object] | None = None
    top_k: int | None = None
    top_p: Share | None = None


class InputTokensRequest(Struct, kw_only=True):
    """Count the tokens of what a response would begin with. `POST /v1/responses/input_tokens`."""

    model: ModelName
    input: str | list[Object] | None = None
    instructions: str | None = None
    text: Object | None = None
    tools: list[Object] | None = None


class CountTokensRequest(Struct, kw_only=True):
    """Count the tokens of a prompt in Anthropic's shape. `POST /v1/messages/count_tokens`."""

    model: ModelName
    messages: Annotated[list[Message], Meta(min_length=1)]
    output_config: Object | None = None
    system: str | list[Part] | None = None
    thinking: Object | None = None
    tool_choice: Object | None = None
    tools: list[Object] | None = None


class RerankRequest(Struct, kw_only=True):
    """Put documents in the order of how well they answer a query. `POST /v1/rerank`."""

    model: ModelName
    query: str | list[Part]
    documents: Annotated[list[str | list[Part]], Meta(min_length=1)]
    instruct: str | None = None
    return_documents: bool | None = None
    top_n: Tokens | None = None


class ScoreRequest(Struct, kw_only=True):
    """Score how probable each label is after query and item. `POST /v1/score`."""

    model: ModelName
    query: str | list[int] | None = None
    items: str | list[str | list[int]]
    label_token_ids: list[int | list[int]] | None = None
    apply_softmax: bool | None = None
    item_first: bool | None = None


class TokenizeRequest(Struct, kw_only=True):
    """Turn a prompt, or messages under the chat template, into token ids. `POST /tokenize`."""

    model: ModelName
    prompt: str | list[str] | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
