"""Streams of models that no CPU engine runs, as the installed SGLang would write them: its own `OpenAIServingChat` and its own parsers, fed
with what the models write in the place of an engine. It runs in the engine's environment and imports nothing of ours.

    .venv-engine/bin/python tests/engine/record_families.py FOLDER

What the models write is the form that SGLang's detectors document (deepseekv32_detector.py, deepseekv4_detector.py, the `<think>` of
reasoning_parser.py). SGLang serves V4 through DeepSeek's own `deepseek-recipe`, which reads token ids with V4's tokenizer and is not run
here: V4 is recorded once through SGLang's text detectors for it, and once as SGLang shapes what that parser gives
(`token_output_sse_chunks`, arguments in pieces). Times are put to one moment; ids are what SGLang made of them, counted.
"""

# mypy: ignore-errors

import asyncio
import itertools
import re
import sys
import time
import uuid
from pathlib import Path
from unittest.mock import MagicMock

CREATED = 1795392000
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
    for name in ("get_weather", "get_news")
]
PARAMETER = '<｜DSML｜parameter name="{0}" string="{1}">{2}</｜DSML｜parameter>\n'


def calls(block: str) -> str:
    """Two tool calls as V3.2 (`function_calls`) and V4 (`tool_calls`) write them."""
    first = PARAMETER.format("city", "true", 'Berlin "Mitte"\nñ') + PARAMETER.format("days", "false", "3")
    second = PARAMETER.format("city", "true", "Paris")
    inner = f'<｜DSML｜invoke name="get_weather">\n{first}</｜DSML｜invoke>\n<｜DSML｜invoke name="get_news">\n{second}</｜DSML｜invoke>\n'
    return f"<｜DSML｜{block}>\n{inner}</｜DSML｜{block}>"


# Name -> tool parser, reasoning parser, what the template is told, whether there are tools, and what the model writes.
THOUGHT = "The user asks for two things.\nI call two tools."
RECORDINGS = {
    "v32-thinks": ("deepseekv32", "deepseek-v3", {"thinking": True}, False, f"{THOUGHT}</think>It rains, ñ 雨."),
    "v32-plain": ("deepseekv32", "deepseek-v3", {}, False, "It rains."),
    "v32-calls": ("deepseekv32", "deepseek-v3", {}, True, f"I look.\n\n{calls('function_calls')}"),
    "v32-thinks-and-calls": ("deepseekv32", "deepseek-v3", {"thinking": True}, True, f"{THOUGHT}</think>\n\n{calls('function_calls')}"),
    "v4-thinks": ("deepseekv4", "deepseek-v4", {"thinking": True}, False, f"{THOUGHT}</think>It rains, ñ 雨."),
    "v4-plain": ("deepseekv4", "deepseek-v4", {"thinking": False}, False, "It rains."),
    "v4-calls": ("deepseekv4", "deepseek-v4", {"thinking": False}, True, f"I look.\n\n{calls('tool_calls')}"),
    "v4-thinks-and-calls": ("deepseekv4", "deepseek-v4", {"thinking": True}, True, f"{THOUGHT}</think>\n\n{calls('tool_calls')}"),
    "v4-in-pieces": ("deepseekv4", "deepseek-v4", {"thinking": True}, True, ""),
}


def tokens(text: str) -> list[str]:
    """The text in pieces as a tokenizer would cut it: the marks that are one token stay whole."""
    return re.findall(r"｜DSML｜|</?think>|\s+|\w{1,4}|[^\w\s]", text)


class Engine:
    """What `OpenAIServingChat` asks of a tokenizer manager, with one answer."""

    def __init__(self, tool_call_parser: str, reasoning_parser: str, text: str) -> None:
        self._values = {"tool_call_parser": tool_call_parser, "reasoning_parser": reasoning_parser}
        self._pieces = tokens(text) or [""] * len(PIECES)
        self.tokenizer = MagicMock()
        self.model_config = MagicMock()
        self.model_config.get_default_sampling_params.return_value = {}
        self.server_args = MagicMock(tool_call_parser=tool_call_parser, reasoning_parser=reasoning_parser)

    def config_value(self, name: str) -> object:
        return self._values.get(name)

    async def generate_request(self, adapted: object, raw: object):
        thought = next((number for number, piece in enumerate(self._pieces, 1) if piece == "</think>"), 0)
        for count in range(1, len(self._pieces) + 1):
            last = count == len(self._pieces)
            meta = {
                "id": "chatcmpl-recorded",
                "prompt_tokens": 42,
                "completion_tokens": count,
                "reasoning_tokens": min(count, thought),
                "cached_tokens": 21,
                "weight_version": "default",
                "finish_reason": {"type": "stop", "matched": 1} if last else None,
            }
            yield {"index": 0, "text": "".join(self._pieces[:count]), "output_ids": list(range(count)), "meta_info": meta}


# What a parser of token ids gives, step by step: thoughts, words, and pieces of a call (its name comes with the first).
PIECES: list[dict[str, object]] = [
    *({"reasoning": piece} for piece in tokens(THOUGHT)),
    *({"content": piece} for piece in tokens("I look. ñ 雨")),
    {"call": (0, "get_weather", "")},
    *({"call": (0, None, piece)} for piece in tokens('{"city": "Berlin", "days": 3}')),
    {"call": (1, "get_news", "")},
    *({"call": (1, None, piece)} for piece in tokens('{"city": "Paris"}')),
]


async def in_pieces(*, content, index, request, created, has_tool_calls, **more):
    """In the place of `_generate_stream_content`."""
    from sglang.srt.entrypoints.openai.chat_encoding_adapters import token_output_sse_chunks
    from sglang.srt.entrypoints.openai.protocol import FunctionResponse, ToolCall

    step = PIECES[content["meta_info"]["completion_tokens"] - 1]
    calls = []
    if "call" in step:
        has_tool_calls[index] = True
        number, name, arguments = step["call"]
        function = FunctionResponse(name=name, arguments=arguments)
        calls = [ToolCall(id=f"call_{number}" if name else None, index=number, function=function)]
    fields = {"chunk_id": "chatcmpl-recorded", "created": created, "model": request.model, "index": index, "usage": None, "logprobs": None}
    said = {"reasoning": step.get("reasoning", ""), "content": step.get("content", "")}
    for chunk in token_output_sse_chunks(**fields, **said, tool_calls=calls):
        yield chunk


class Off:
    """Settings that nobody has set."""

    def __getattr__(self, name: str) -> None:
        return None


async def recorded(tool_call_parser: str, reasoning_parser: str, told: dict[str, object], with_tools: bool, text: str) -> str:
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat

    template = MagicMock(reasoning_config=None, force_reasoning=False)
    OpenAIServingChat._build_chat_encoding_adapter = lambda self: None
    serving = OpenAIServingChat(Engine(tool_call_parser, reasoning_parser, text), template)
    if not text:
        serving._generate_stream_content = in_pieces
    request = ChatCompletionRequest(
        model="deepseek-v3",
        messages=[{"role": "user", "content": "What is the weather like?"}],
        stream=True,
        stream_options={"include_usage": True},
        chat_template_kwargs=told,
        tools=TOOLS if with_tools else None,
    )
    return "".join([event async for event in serving._generate_chat_stream(MagicMock(), request, None)])


def main() -> None:
    from sglang.srt import runtime_context

    # No server's settings: every one of them is off.
    runtime_context.RuntimeContext.config_bag = lambda self, name: Off()
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    time.time = lambda: CREATED
    for name, given in RECORDINGS.items():
        numbers = itertools.count(1)
        uuid.uuid4 = lambda numbers=numbers: uuid.UUID(int=next(numbers) << 96)
        (folder / f"{name}.sse").write_bytes(asyncio.run(recorded(*given)).encode())


if __name__ == "__main__":
    main()
