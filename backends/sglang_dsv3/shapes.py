"""What is read of SGLang's JSON, and nothing more: every other member is skipped undecoded."""

from __future__ import annotations

from typing import Any

import msgspec

# /model_info, /v1/models and /v1/loads


class ModelInfo(msgspec.Struct):
    """What of `/model_info` matters here."""

    architectures: list[str] | None = None
    served_model_name: str | None = None
    model_path: str | None = None
    weight_version: str | None = None
    # "null", "prefill" or "decode"; None where this engine does not tell.
    disaggregation_mode: str | None = None
    # What it can do; UNSET where this engine does not tell.
    tool_call_parser: str | msgspec.UnsetType | None = msgspec.UNSET
    reasoning_parser: str | msgspec.UnsetType | None = msgspec.UNSET
    has_image_understanding: bool | msgspec.UnsetType | None = msgspec.UNSET
    has_audio_understanding: bool | msgspec.UnsetType | None = msgspec.UNSET


class Card(msgspec.Struct):
    """One model of the engine's own `/v1/models`; adapters have no length."""

    max_model_len: int | None = None


class Cards(msgspec.Struct):
    """All of them."""

    data: list[Card] = []


class Load(msgspec.Struct):
    """One data-parallel rank of `/v1/loads`."""

    dp_rank: int = 0
    max_running_requests: int = 0
    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    token_usage: float = 0.0
    cache_hit_rate: float = 0.0
    gen_throughput: float = 0.0


class Loads(msgspec.Struct):
    """All of it."""

    loads: list[Load] = []


class MachineGpu(msgspec.Struct):
    """A GPU in the `/status` of the agent beside an engine; memory in bytes."""

    index: int
    utilisation: float | None = None
    memory_used: int | None = None
    memory_total: int | None = None
    temperature: float | None = None
    power: float | None = None
    ecc_uncorrected: int | None = None
    throttled: list[str] | None = None


class Machine(msgspec.Struct):
    """The machine there; bytes."""

    memory_used: int = 0
    memory_total: int = 0
    swap_used: int | None = None
    disk_free: int | None = None
    gpus: list[MachineGpu] = []


class AgentStatus(msgspec.Struct):
    """What of the agent's `/status` becomes numbers."""

    state: str = ""
    machine: Machine | None = None


# Usage


class CompletionDetails(msgspec.Struct):
    """`completion_tokens_details`."""

    reasoning_tokens: int | None = None


class PromptDetails(msgspec.Struct):
    """`prompt_tokens_details`."""

    cached_tokens: int | None = None


class EngineUsage(msgspec.Struct):
    """Chat's and completions' names, and those of responses and messages, which count cached tokens apart."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None
    reasoning_tokens: int | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    input_tokens_details: PromptDetails | None = None
    cache_read_input_tokens: int | None = None


class WithUsage(msgspec.Struct):
    """Where the usage may stand: in the answer, or in the answer inside an event."""

    usage: EngineUsage | None = None
    response: WithUsage | None = None
    message: WithUsage | None = None


# Errors


class NamedError(msgspec.Struct):
    """An error with a type, as Anthropic's events have it."""

    type: str | None = None
    message: str | None = None


class Failed(msgspec.Struct):
    """A response that failed."""

    error: NamedError | None = None


class ErrorEvent(msgspec.Struct):
    """Where an error may stand in an event with a name."""

    error: NamedError | None = None
    response: Failed | None = None


class Typed(msgspec.Struct):
    """An event that says its own name."""

    type: str | None = None


class MaybeError(msgspec.Struct):
    """Where an error may stand in a stream of chunks: in a member of its own, or as the event itself."""

    error: Any = None
    object: Any = None
    code: Any = None


class AnswerChoice(msgspec.Struct):
    """One choice of a JSON answer."""

    finish_reason: str | None = None


class Answer(msgspec.Struct):
    """What is read of a JSON answer, whatever its endpoint."""

    usage: EngineUsage | None = None
    choices: list[AnswerChoice] | None = None
    status: str | None = None


# Chunks that were delivered, and what continues them


class Called(msgspec.Struct):
    """A tool call as far as a client has it."""

    id: str = ""
    name: str = ""
    arguments: str = ""


class Delivered(msgspec.Struct):
    """What a client has been given of an answer."""

    text: str = ""
    reasoning: str = ""
    calls: list[Called] = []
    created: int = 0
    chunks: int = 0
    finished: bool = False
    # Tokens that were generated after what the client has: one that ended the answer.
    unshown: int = 0
    usage_shown: bool = False
    sound: bool = True


class Parsers(msgspec.Struct, frozen=True):
    """What an engine was started with to read its model's text: `--reasoning-parser` and `--tool-call-parser`; empty for none."""

    reasoning: str = ""
    tools: str = ""


class Continuation(msgspec.Struct, frozen=True):
    """What the events of a continued answer take over from those before: when it began, and what was used. `prompt_tokens` 0: nothing was
    given yet, and the prompt is what the next engine says."""

    created: int
    prompt_tokens: int
    completion_tokens: int
    # None where the engine does not tell; and whether there can be no more of them.
    reasoning_tokens: int | None = None
    thought_over: bool = False
    # Of a chat: what the next engine has to have before it goes on, and how it is to read it; None where nothing was given yet.
    given: Delivered | None = None
    parsers: Parsers | None = None


class CalledFunction(msgspec.Struct):
    """Of a tool call."""

    name: str | None = None
    arguments: str | None = None


class CallDelta(msgspec.Struct):
    """What a chunk adds to a tool call."""

    index: int = 0
    id: str | None = None
    function: CalledFunction | None = None


class Delta(msgspec.Struct):
    """What a chunk adds."""

    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] | None = None


class Choice(msgspec.Struct):
    """Chat's choices and those of completions."""

    delta: Delta = msgspec.field(default_factory=Delta)
    text: str | None = None
    finish_reason: str | None = None
    # What ended it: a token's id, or a text.
    matched_stop: Any = None


class Chunk(msgspec.Struct):
    """One event of a stream of chunks."""

    created: int = 0
    choices: list[Choice] = []
    usage: Any = None


class Message(msgspec.Struct):
    """The last message of a call."""

    role: str = ""
    content: Any = None


# /tokenize and /generate


class Finish(msgspec.Struct):
    """Why `/generate` ended."""

    type: str


class Meta(msgspec.Struct):
    """What it says beside the text."""

    finish_reason: Finish | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    # Of every token so far: its logarithm, its id, its text; and for each those that were likely.
    output_token_logprobs: list[tuple[float | None, int, str | None]] | None = None
    output_top_logprobs: list[list[tuple[float | None, int, str | None]] | None] | None = None


class GenerateEvent(msgspec.Struct):
    """One event of it: everything so far, not what is new."""

    text: str
    output_ids: list[int]
    meta_info: Meta


class Tokens(msgspec.Struct):
    """What `/tokenize` answers."""

    tokens: list[int]


class ManyTokens(msgspec.Struct):
    """The same for several texts."""

    tokens: list[list[int]]


# /parse_function_call


class ParsedCall(msgspec.Struct):
    """A call that the engine's own detector has found."""

    name: str | None = None
    parameters: str = ""


class Parsed(msgspec.Struct):
    """All of them."""

    calls: list[ParsedCall] = []


answer_decoder = msgspec.json.Decoder(Answer)
typed_decoder = msgspec.json.Decoder(Typed)
error_decoder = msgspec.json.Decoder(MaybeError)
members_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
raw_decoder = msgspec.json.Decoder(msgspec.Raw)
usage_decoder = msgspec.json.Decoder(WithUsage)
chunk_decoder = msgspec.json.Decoder(Chunk)
raws_decoder = msgspec.json.Decoder(list[msgspec.Raw])
generate_decoder = msgspec.json.Decoder(GenerateEvent)
tokens_decoder = msgspec.json.Decoder(Tokens)
many_tokens_decoder = msgspec.json.Decoder(ManyTokens)
parsed_decoder = msgspec.json.Decoder(Parsed)
