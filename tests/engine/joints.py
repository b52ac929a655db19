"""SGLang's own parsers and encoders, asked line by line; runs in the engine's environment and imports nothing of ours.

    .venv-engine/bin/python tests/engine/joints.py        a JSON object a line, answered by one

`parse`: what a stream's parsers give for each piece of a model's text, the end included; `calls`: what `/parse_function_call` finds in a
text; `encode`: V3.2's prompt of messages; `accepts`: whether xgrammar lets a text through.
"""

# mypy: ignore-errors

import json
import sys

NAMES = ("get_weather", "get_news")


def tools():
    from sglang.srt.entrypoints.openai.protocol import Function, Tool

    return [Tool(type="function", function=Function(name=name, parameters={"type": "object", "properties": {}})) for name in NAMES]


def parse(reasoning, called, thinking, beginning, pieces):
    """As `_generate_stream_content` does it: thoughts first, what is left goes to the detector of calls."""
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
    from sglang.srt.function_call.function_call_parser import FunctionCallParser
    from sglang.srt.parser.reasoning_parser import ReasoningParser

    messages = [{"role": "user", "content": "Hello"}]
    if beginning is not None:
        messages.append({"role": "assistant", "content": beginning})
    request = ChatCompletionRequest(model="x", messages=messages, continue_final_message=beginning is not None)
    thoughts = ReasoningParser(reasoning, True, thinking, request) if reasoning else None
    detector = FunctionCallParser(tools(), called) if called else None
    found = []
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        thought, words = thoughts.parse_stream_chunk(piece) if thoughts else ("", piece)
        if thoughts and last:
            more_thought, more_words = thoughts.parse_stream_end()
            thought, words = (thought or "") + (more_thought or ""), (words or "") + (more_words or "")
        calls = []
        if detector:
            words, calls = detector.parse_stream_chunk(words or "")
            if last:
                more_words, more_calls = detector.parse_stream_end()
                words, calls = (words or "") + more_words, list(calls) + more_calls
        given = [{"index": call.tool_index, "name": call.name, "arguments": call.parameters} for call in calls]
        found.append({"thought": thought or "", "words": words or "", "calls": given})
    return found


def calls(parser, text):
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    words, found = FunctionCallParser(tools(), parser).parse_non_stream(text)
    return {"normal_text": words, "calls": [{"name": call.name, "parameters": call.parameters} for call in found]}


def accepts(grammar, text):
    from xgrammar import Grammar
    from xgrammar.testing import _is_grammar_accept_string

    return _is_grammar_accept_string(Grammar.from_ebnf(grammar), text)


def encode(messages, thinking):
    from sglang.srt.entrypoints.openai import encoding_dsv32

    return encoding_dsv32.encode_messages(messages, thinking_mode="thinking" if thinking else "chat")


if __name__ == "__main__":
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(globals()[asked.pop("what")](**asked)), flush=True)
