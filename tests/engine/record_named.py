"""The same streams as Anthropic's messages and OpenAI's responses have them: SGLang's own `AnthropicServing` and `OpenAIServingResponses`
around the engine of `record_families`. It runs in the engine's environment and imports nothing of ours.

    .venv-engine/bin/python tests/engine/record_named.py FOLDER
"""

# mypy: ignore-errors

import asyncio
import itertools
import sys
import time
import uuid
from pathlib import Path
from unittest.mock import MagicMock

from record_families import CREATED, RECORDINGS, TOOLS, Engine, Off, in_pieces

MODEL = "deepseek-v3"
# Of the recordings, those of V3.2 (a tool call at once) and the one in pieces; responses are not shaped by a parser of token ids.
MESSAGES = ("v32-plain", "v32-thinks", "v32-calls", "v32-thinks-and-calls", "v4-in-pieces")
RESPONSES = ("v32-plain", "v32-thinks", "v32-calls", "v32-thinks-and-calls")


def around(kind, tool_call_parser, reasoning_parser, text):
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat

    OpenAIServingChat._build_chat_encoding_adapter = lambda self: None
    serving = kind(Engine(tool_call_parser, reasoning_parser, text), MagicMock(reasoning_config=None, force_reasoning=False))
    if not text:
        serving._generate_stream_content = in_pieces
    return serving


async def messages(tool_call_parser, reasoning_parser, told, with_tools, text) -> str:
    from sglang.srt.entrypoints.anthropic.serving import AnthropicServing
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat

    serving = AnthropicServing(around(OpenAIServingChat, tool_call_parser, reasoning_parser, text))
    request = ChatCompletionRequest(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the weather like?"}],
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        chat_template_kwargs=told,
        tools=TOOLS if with_tools else None,
    )
    stream = serving._generate_anthropic_stream(MagicMock(), request, MagicMock(model=MODEL), None)
    return "".join([event async for event in stream])


async def responses(tool_call_parser, reasoning_parser, told, with_tools, text, **more) -> str:
    from sglang.srt.entrypoints.openai.protocol import RequestResponseMetadata, ResponsesRequest
    from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses

    serving = around(OpenAIServingResponses, tool_call_parser, reasoning_parser, text)
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS] if with_tools else []
    request = ResponsesRequest(
        model=MODEL,
        input="What is the weather like?",
        stream=True,
        chat_template_kwargs=told,
        tools=tools,
        request_id="resp_recorded",
        **more,
    )
    stream = serving.responses_stream_generator_non_harmony(
        request,
        {},
        serving.tokenizer_manager.generate_request(None, None),
        MODEL,
        MagicMock(),
        RequestResponseMetadata(request_id=request.request_id),
        CREATED,
        require_reasoning=bool(told.get("thinking")),
    )
    return "".join([event async for event in stream])


def main() -> None:
    from sglang.srt import runtime_context

    # No server's settings: every one of them is off.
    runtime_context.RuntimeContext.config_bag = lambda self, name: Off()
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    time.time = lambda: CREATED
    told = {"reasoning": {"summary": "auto"}, "include": ["reasoning.encrypted_content"]}
    work = {f"messages-{name}": (messages, name, {}) for name in MESSAGES}
    work |= {f"responses-{name}": (responses, name, {}) for name in RESPONSES}
    work["responses-v32-thinks-summed-up"] = (responses, "v32-thinks", told)
    for file, (record, name, more) in work.items():
        numbers = itertools.count(1)
        uuid.uuid4 = lambda numbers=numbers: uuid.UUID(int=next(numbers) << 96)
        (folder / f"{file}.sse").write_bytes(asyncio.run(record(*RECORDINGS[name], **more)).encode())


if __name__ == "__main__":
    main()
