"""An answer cut after every piece of it, and what the next engine is given, by SGLang's own parsers and encoders: V3, R1, V3.1, V3.2.

What a client has been given up to the cut becomes the beginning of the next prompt; it must be the model's own raw text, to the letter, and
what the next engine's parsers make of the rest must join on to it.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from backends.sglang_dsv3.continuation import joint, markup, resume, unfinished
from backends.sglang_dsv3.continuation.splitter import Splitter
from backends.sglang_dsv3.engine import environment_folder
from backends.sglang_dsv3.shapes import Continuation, Parsers, parsed_decoder
from gateway.plugin import Call, Endpoint, Terms
from gateway.wire import body
from tests.support.processes import ROOT, environment

PYTHON = environment_folder(ROOT) / "bin" / "python"
MARKS = re.compile(r"<｜[^｜]+｜>|</?think>|</?｜DSML｜|\s+|\w{1,3}|[^\w\s]")
THOUGHT = "Hm, a < b?\nThen <thi"
WORDS = "\n\nI look: a < b."
V31 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
    '{"city": "Berlin \\"Mitte\\" ñ",\n "days": [1, 2]}<｜tool▁call▁end｜>'
    "<｜tool▁call▁begin｜>get_news<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
V3 = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Berlin"}\n```<｜tool▁call▁end｜>\n'
    '<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_news\n```json\n{"days": 3}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
V32 = (
    '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">Berlin</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
)
# Reasoning parser, tool call parser, whether the prompt has opened the thinking, and what the model writes then.
CASES: dict[str, tuple[str, str, bool, str]] = {
    "V3, words": ("", "", False, WORDS),
    "V3, calls": ("", "deepseekv3", False, "Look:" + V3),
    "R1, whose prompt ends in <think>": ("deepseek-r1", "", True, THOUGHT + "</think>" + WORDS),
    "R1, which opens its thoughts itself": ("deepseek-r1", "", False, "<think>\n" + THOUGHT + "</think>" + WORDS),
    "V3.1, thinking off": ("deepseek-v3", "", False, WORDS),
    "V3.1, thoughts": ("deepseek-v3", "", True, THOUGHT + "</think>" + WORDS + " </thin"),
    "V3.1, no thoughts after all": ("deepseek-v3", "", True, "</think>" + WORDS),
    "V3.1, tools on offer": ("deepseek-v3", "deepseekv31", False, WORDS),
    "V3.1, calls": ("deepseek-v3", "deepseekv31", False, WORDS + V31),
    "V3.1, thoughts and calls": ("deepseek-v3", "deepseekv31", True, THOUGHT + "</think>" + V31),
    "V3.2, thoughts, words and a call": ("deepseek-v3", "deepseekv32", True, THOUGHT + "</think>" + WORDS + V32),
}


class SGLang:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, what: str, **asked: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"what": what, **asked}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="module")
def sglang() -> Iterator[SGLang]:
    env = {**environment(), "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
    command = [PYTHON, ROOT / "tests" / "engine" / "joints.py"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env) as process:
        yield SGLang(process)
        assert process.stdin is not None
        process.stdin.close()


def call(tools: str, thinking: bool) -> Call:
    fields = {"messages": [{"role": "user", "content": "Hello"}], "chat_template_kwargs": {"thinking": thinking}}
    if tools:
        fields["tools"] = [{"type": "function", "function": {"name": name}} for name in ("get_weather", "get_news")]
    return Call(Endpoint.CHAT, "c", "m", {name: body.encode(value) for name, value in fields.items()}, True)


def events(steps: list[dict[str, Any]]) -> bytes:
    """The events in which a client is given that."""
    out = []
    for step in steps:
        deltas = [{"reasoning_content": step["thought"]}] if step["thought"] else []
        deltas += [{"content": step["words"]}] if step["words"] else []
        for piece in step["calls"]:
            begun = {"id": f"call_{piece['index']}"} if piece["name"] else {}
            function = {"name": piece["name"], "arguments": piece["arguments"]}
            deltas.append({"tool_calls": [{"index": piece["index"], **begun, "function": function}]})
        out += [b"data: " + json.dumps({"created": 1, "choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n" for delta in deltas]
    return b"".join(out)


def summed(steps: list[dict[str, Any]]) -> tuple[str, str, list[tuple[str, Any]]]:
    found = resume.read(events(steps))
    assert found.sound
    return found.reasoning, found.text, [(call.name, json.loads(call.arguments)) for call in found.calls]


@pytest.mark.parametrize("case", CASES)
def test_cut_after_every_piece(sglang: SGLang, case: str) -> None:
    reasoning, tools, opened, text = CASES[case]
    pieces = MARKS.findall(text)
    assert "".join(pieces) == text
    parsers = {"reasoning": reasoning or None, "called": tools or None, "thinking": opened}
    steps = sglang("parse", **parsers, beginning=None, pieces=pieces)
    whole = summed(steps)
    assert whole[2] or not tools or "offer" in case
    asked, ended = call(tools, opened), 0
    for cut in range(len(pieces)):
        delivered = events(steps[:cut])
        again = resume.resume(asked, Terms(), delivered, None, Parsers(reasoning, tools))
        given = resume.read(delivered)
        if again is None:
            assert tools == "deepseekv32"
            assert given.calls, "only a call of this form ends here"
            ended += 1
            continue
        assert isinstance(again, Call)
        beginning = markup.spoken(given, opened)
        if not given.calls:
            assert text.startswith(beginning), "the model's own words"
            rest = MARKS.findall(text[len(beginning) :])
            later = sglang("parse", **parsers, beginning=beginning or None, pieces=rest)
            assert summed(steps[:cut] + later) == whole, beginning
            continue
        beginning += markup.called(tools, given.calls)
        assert text.startswith(beginning)
        assert isinstance(again.continues, Continuation)
        stream = joint.Joint(again, Terms())
        for piece in MARKS.findall(text[len(beginning) :]):
            delivered += stream.feed(chunk({"content": piece}, None))
        delivered += stream.feed(chunk({}, "stop") + b"data: [DONE]\n\n")
        question = json.loads(stream.asks)
        delivered += stream.answered(json.dumps(sglang("calls", parser=tools, text=question["text"])).encode())
        assert stream.failure is None, beginning
        assert stream.complete
        found = resume.read(delivered)
        assert (found.reasoning, found.text, [(call.name, json.loads(call.arguments)) for call in found.calls]) == whole, beginning
        assert len({call.id for call in found.calls}) == len(found.calls)
    assert bool(ended) == (tools == "deepseekv32")


def chunk(delta: dict[str, Any], finish: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: " + msgspec.json.encode({"id": "c", "created": 1, "model": "m", "choices": [choice]}) + b"\n\n"


@pytest.mark.parametrize("case", CASES)
def test_told_apart_as_sglang_does(sglang: SGLang, case: str) -> None:
    """What goes over token ids has no parser of the engine's: ours gives the same, and holds calls for the engine's."""
    reasoning, tools, opened, text = CASES[case]
    parsers = {"reasoning": reasoning or None, "called": tools or None, "thinking": opened}
    thoughts, words, calls = summed(sglang("parse", **parsers, beginning=None, pieces=MARKS.findall(text)))
    splitter, told = Splitter(reasoning, tools, opened), ["", ""]
    for piece in MARKS.findall(text):
        splitter = splitter.copy()  # as if another engine went on with every piece
        told = [before + more for before, more in zip(told, splitter.feed(piece), strict=True)]
    told = [before + more for before, more in zip(told, splitter.finish(), strict=True)]
    assert told[0] == thoughts
    assert told[1] == words
    found = parsed_decoder.decode(json.dumps(sglang("calls", parser=tools, text=splitter.calls))).calls if splitter.calls else []
    assert [(call.name, json.loads(call.parameters)) for call in found] == calls


@pytest.mark.parametrize("thinking", [True, False])
def test_v32s_prompts_end_in_the_mark(sglang: SGLang, thinking: bool) -> None:
    """As do V3.1's; V3's end in `<｜Assistant｜>`, R1's in that or in `<think>` and a line break."""
    mark = "<think>" if thinking else "</think>"
    messages: list[dict[str, Any]] = [{"role": "system", "content": ""}, {"role": "user", "content": "Hello"}]
    assert sglang("encode", messages=messages, thinking=thinking).endswith(f"<｜User｜>Hello<｜Assistant｜>{mark}")
    thought = [*messages, {"role": "assistant", "content": "Hi", "reasoning_content": "Hm"}, {"role": "user", "content": "And?"}]
    prompt = sglang("encode", messages=thought, thinking=thinking)
    assert "Hm" not in prompt, "thoughts of answers before are dropped, which is why those of this one go behind the prompt"
    assert prompt.endswith(f"<｜Assistant｜>{mark}")


def test_the_rest_of_an_object_is_let_through_wherever_it_broke_off(sglang: SGLang) -> None:
    text = ' {"a": [1, -2.50e+3, {}, [], "x\\n\\u00e9 \\"ñ", true], "b" :{"c":null , "d": false}, "e": 0.5E7, "f": -0 } '
    json.loads(text)
    for cut in range(1, len(text) - 1):
        grammar, rest = unfinished.rest(text[:cut]), text[cut:].rstrip()
        assert sglang("accepts", grammar=grammar, text=rest), (text[:cut], grammar.partition("\n")[0])
        assert not sglang("accepts", grammar=grammar, text=rest + "}"), text[:cut]
        assert not sglang("accepts", grammar=grammar, text=rest[:-1]), text[:cut]
    assert unfinished.rest(text) == ""
