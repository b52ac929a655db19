"""Every field and word of SGLang's HTTP interface that the backend relies on, by the file of the installed package that says it.

`test_http_contract.py` looks each of them up, so that raising the pin names what moved; and it holds this list against the backend's own
code, so that the list stays whole.
"""

from __future__ import annotations

from backends.sglang_dsv3 import shapes, translate
from backends.sglang_dsv3.continuation import exact

_HTTP, _OPENAI, _LOADS = "srt/entrypoints/http_server.py", "srt/entrypoints/openai/protocol.py", "srt/managers/load_snapshot.py"
_REQUESTS = "srt/managers/io_struct.py"

# Routes, by the file that declares them.
ROUTES = {
    _HTTP: [
        "/health_generate", "/ready", "/model_info", "/server_info", "/generate", "/abort_request", "/tokenize",
        "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/rerank", "/v1/score",
        "/parse_function_call",
    ],
    "srt/entrypoints/v1_loads.py": ["/v1/loads"],
}  # fmt: skip

# Members of classes: what we send, and what we read.
FIELDS: dict[tuple[str, str], list[str]] = {
    (_OPENAI, "ChatCompletionRequest"): [
        "messages", "model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "n", "rid", "cache_salt",
        "continue_final_message", "chat_template_kwargs", "reasoning_effort", "tools", "response_format", "logprobs", "top_logprobs",
        "seed", "min_tokens", "top_k", "min_p", "regex", "ebnf", "stop_regex", "no_stop_trim", "ignore_eos", "skip_special_tokens",
        "bootstrap_host", "bootstrap_port", "bootstrap_room", "input_ids", "separate_reasoning", "stream_reasoning", "tool_choice",
        "parallel_tool_calls",
    ],
    (_OPENAI, "CompletionRequest"): ["prompt", "rid", "cache_salt", "echo", "suffix", "best_of", "json_schema",
                                    "bootstrap_host", "bootstrap_port", "bootstrap_room"],
    (_OPENAI, "ResponsesRequest"): ["request_id", "input"],
    (_OPENAI, "StreamOptions"): ["include_usage", "continuous_usage_stats"],
    (_OPENAI, "TokenizeRequest"): ["messages", "model", "tools", "tool_choice", "chat_template_kwargs", "reasoning_effort",
                                   "continue_final_message", "prompt", "add_special_tokens"],
    (_OPENAI, "TokenizeResponse"): ["tokens"],
    (_OPENAI, "UsageInfo"): ["prompt_tokens", "completion_tokens", "prompt_tokens_details",
                            "completion_tokens_details", "reasoning_tokens"],
    (_OPENAI, "PromptTokensDetails"): ["cached_tokens"],
    (_OPENAI, "CompletionTokensDetails"): ["reasoning_tokens"],
    (_OPENAI, "ErrorResponse"): ["object", "message", "type", "param", "code"],
    (_OPENAI, "DeltaMessage"): ["content", "reasoning_content", "tool_calls"],
    (_OPENAI, "ChatCompletionResponseStreamChoice"): ["delta", "finish_reason", "matched_stop"],
    (_OPENAI, "CompletionResponseStreamChoice"): ["text", "finish_reason", "matched_stop"],
    (_OPENAI, "ChatCompletionStreamResponse"): ["created", "choices", "usage"],
    (_OPENAI, "ChatCompletionResponse"): ["choices", "usage"],
    (_REQUESTS, "GenerateReqInput"): ["input_ids", "sampling_params", "stream", "rid", "require_reasoning", "return_logprob",
                                     "return_text_in_logprobs", "logprob_start_len", "top_logprobs_num"],
    (_REQUESTS, "ParseFunctionCallReq"): ["text", "tools", "tool_call_parser"],
    (_REQUESTS, "AbortReq"): ["rid"],
    ("srt/sampling/sampling_params.py", "SamplingParams"): [*exact._SAME, *exact._RENAMED.values(), "max_new_tokens"],
    (_LOADS, "LoadSnapshot"): list(shapes.Load.__struct_fields__),
}  # fmt: skip

# Words in quotes: keys of answers that are built by hand, values, and texts that errors are known by.
WORDS: dict[str, list[str]] = {
    _HTTP: [
        "served_model_name",
        "model_path",
        "weight_version",
        "architectures",
        "tool_call_parser",
        "reasoning_parser",
        "has_image_understanding",
        "has_audio_understanding",
        "disaggregation_mode",
    ],
    "srt/managers/scheduler_components/memory_usage.py": ["weight", "kvcache", "token_capacity"],
    "srt/managers/scheduler_components/internal_state.py": ["memory_usage"],
    "srt/managers/tokenizer_manager.py": [
        "text",
        "output_ids",
        "meta_info",
        "finish_reason",
        "cached_tokens",
        "reasoning_tokens",
        "output_token_logprobs",
        "output_top_logprobs",
    ],
}

# Parameters that are refused because they are internal: each must still be one, or the refusal is about nothing.
INTERNAL = sorted(translate.INTERNAL_FIELDS)
