"""The sentinel's rules: what each finds in an answer, and that ten thousand good answers break none of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from backends.sglang_dsv3.markup import MARKUP
from gateway.plugin import Call, Endpoint
from gateway.sentinel import sample as samples
from gateway.sentinel.rules import RULES, judge
from gateway.sentinel.sample import Sample, sample
from gateway.serving.kept import Kept
from gateway.telemetry.record import Attempt, Record
from gateway.wire.body import peek

GOOD = 10_000


def of(call: dict[str, Any], answer: bytes | Kept, stream: bool, endpoint: Endpoint = Endpoint.CHAT, prompts: bool = False) -> Sample | str:
    """As a worker makes it, from a request's bytes and what its client was given."""
    record = Record({"type": "http", "method": "POST", "path": endpoint.value, "raw_path": b"/", "headers": [], "client": None})
    written = json.dumps(call)
    if "Go" in written:  # whose encoder escapes what is HTML
        written = written.replace("<", "\\u003c").replace(">", "\\u003e")
    asked = Call(endpoint, "chatcmpl-1", "m", peek(written.encode()), stream=stream)
    record.asks(asked)
    record.answer = answer
    record.attempts.append(Attempt(record, None, lambda host, verdict, why: None, "host", "weights", False, 0.0))
    return sample(record, asked, MARKUP, "dsv3", prompts)


def event(choice: dict[str, Any], ascii: bool = False) -> bytes:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "deepseek-v3"}
    chunk = {**head, "choices": [{"index": 0, "logprobs": None, "finish_reason": None, **choice}]}
    return b"data: " + json.dumps(chunk, separators=(",", ":"), ensure_ascii=ascii).encode() + b"\n\n"


def streamed(content: str, finish: str = "stop", calls: list[tuple[str, str]] | None = None, piece: int = 7, reasoning: str = "") -> Kept:
    """Events as SGLang writes them, kept as the relay keeps them."""
    events = [event({"delta": {"role": "assistant", "content": ""}})]
    events += [event({"delta": {"reasoning_content": reasoning[at : at + piece]}}) for at in range(0, len(reasoning), piece)]
    events += [event({"delta": {"reasoning_content": None, "content": content[at : at + piece]}}) for at in range(0, len(content), piece)]
    for number, (name, arguments) in enumerate(calls or ()):
        begun = {"index": number, "id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": ""}}
        events.append(event({"delta": {"tool_calls": [begun]}}))
        for at in range(0, len(arguments), piece):
            more = {"index": number, "function": {"arguments": arguments[at : at + piece]}}
            events.append(event({"delta": {"tool_calls": [more]}}))
    events += [event({"delta": {"reasoning_content": None}, "finish_reason": finish}), b"data: [DONE]\n\n"]
    kept = Kept()
    for number, one in enumerate(events):
        kept.fresh.append(one)
        if not number % 16:
            kept.pack()
    return kept


def broken(prompt: str, answer: bytes | Kept, tools: list[dict[str, Any]] | None = None, **more: Any) -> list[str]:
    found = of({"messages": [{"role": "user", "content": prompt}], **({"tools": tools} if tools else {}), **more}, answer, True)
    assert isinstance(found, Sample), found
    return list(judge(found).broken)


def tool(parameters: dict[str, Any], name: str = "do") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


CITY = tool({"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]})
LEAK = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>do<｜tool▁sep｜>{"city": "Rome"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'


@pytest.mark.parametrize(
    ("rule", "answer"),
    [
        ("tool_arguments", streamed("", "tool_calls", [("do", '{"city": "Ro')])),
        ("tool_arguments", streamed("", "tool_calls", [("do", '["Rome"]')])),
        ("tool_arguments", streamed("", "tool_calls", [("do", '{"city": "Rome"}{"city": "Rome"}')])),
        ("tool_schema", streamed("", "tool_calls", [("do", '{"town": "Rome"}')])),
        ("tool_schema", streamed("", "tool_calls", [("do", '{"city": 7}')])),
        ("tool_schema", streamed("", "tool_calls", [("undo", '{"city": "Rome"}')])),
        ("tool_schema", streamed("", "tool_calls", [("do", "")])),
        ("tool_markup", streamed(LEAK)),
        ("tool_markup", streamed('I will look. <｜DSML｜function_calls>\n<｜DSML｜invoke name="do">')),
        ("reasoning_markup", streamed("<think>\nThey ask for Rome.\n</think>\n\nIt is sunny.")),
        ("reasoning_markup", streamed("They ask for Rome.</think>It is sunny.")),
        ("empty", streamed("")),
        ("empty", streamed(" \n")),
        ("empty", streamed("", reasoning="They ask for Rome.")),
        ("loop", streamed("!" * 300, "length")),
        ("loop", streamed("It is sunny. " + "and it is warm " * 40, "length")),
        ("loop", streamed("", "length", reasoning="Wait, let me check that again.\n" * 30)),
        ("loop", streamed("天气很好，" * 80, "length")),
        ("utf8", streamed("It is \ufffd\ufffd\ufffd sunny.")),
    ],
)
def test_each_rule_finds_what_it_is_for_and_no_other_does(rule: str, answer: Kept) -> None:
    assert broken("How is the weather?", answer, [CITY]) == [rule]


def test_bytes_that_are_no_text() -> None:
    raw = event({"delta": {"content": "It is @ sunny."}}).replace(b"@", b"\xe4\xbd") + event({"delta": {}, "finish_reason": "stop"})
    half = event({"delta": {"content": "It is @ sunny."}}).replace(b"@", b"\\ud83d") + event({"delta": {}, "finish_reason": "stop"})
    assert broken("hi", raw) == ["utf8"]
    assert broken("hi", half) == ["utf8"]


def test_what_the_client_speaks_of_itself_is_no_leak() -> None:
    for asked in ("Why does R1 write <think>?", "What is </think>, says Go"):
        assert broken(asked, streamed("Because of its template: thoughts end with </think> there.")) == []
    assert broken("Show me <｜tool▁calls▁begin｜>", streamed(LEAK), [CITY]) == []
    assert broken("Replace \ufffd, please", streamed("\ufffd\ufffd\ufffd")) == []
    assert broken("What is U+FFFD?", streamed("It looks so: \ufffd")) == []


def test_what_the_client_bounds_itself_is_not_empty() -> None:
    assert broken("hi", streamed(""), stop=["\n"]) == []
    assert broken("hi", streamed("", "length")) == []


def test_a_schema_that_is_none_says_nothing_of_the_answer() -> None:
    call = streamed("", "tool_calls", [("do", '{"city": "Rome"}')])
    deep: dict[str, Any] = {}
    for _ in range(400):
        deep = {"properties": {"city": deep}}
    for schema in (
        {"type": "strng"}, {"$ref": "http://127.0.0.1:1/x"}, {"$ref": "#/nowhere"}, {"$ref": "#"}, deep,
        {"properties": {"city": {"pattern": "(?<=a)(b+)+$"}}},
    ):  # fmt: skip
        assert broken("hi", call, [tool(schema)]) == [], schema
    slow = {"properties": {"city": {"type": "string", "pattern": "^(a+)+$"}}}
    assert broken("hi", streamed("", "tool_calls", [("do", json.dumps({"city": "a" * 5000 + "!"}))]), [tool(slow)]) == ["tool_schema"]


def test_a_prompt_is_in_no_sample_unless_it_may_be() -> None:
    call = {"messages": [{"role": "user", "content": "the secret of the house"}], "tools": [CITY]}
    for prompts in (False, True):
        found = of(call, streamed(""), True, prompts=prompts)
        assert isinstance(found, Sample)
        assert (b"the secret of the house" in bytes(repr(found), "utf-8")) is prompts


def test_what_is_too_large_is_left_out() -> None:
    large = b"x" * (samples.MAX_ANSWER_BYTES + 1)
    assert of({"messages": []}, large, False) == "large"
    assert of({"messages": [{"role": "user", "content": "x" * samples.MAX_SAID_BYTES}]}, streamed("x"), True) == "large"


# Good answers, in the variety that clients ask for.

WORDS = ["the", "model", "reads", "a", "prompt", "and", "writes", "what", "follows", "token", "after", "until", "it", "has", "said", "all"]
CHINESE = "模型读取提示然后一个接一个地写出后面的内容直到说完所有要说的话今天天气很好我们去公园散步吧"
EMOJI = ["😀", "👩‍👩‍👧", "🇩🇪", "✅", "🚀", "é", "ﷺ", "한국어", "العربية", "\u200b", "𝕏"]


def prose(chance: random.Random) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(chance.randrange(3, 120))).capitalize() + "."


def chinese(chance: random.Random) -> str:
    return "".join(chance.choice(CHINESE) for _ in range(chance.randrange(5, 200))) + "。"


def emoji(chance: random.Random) -> str:
    return " ".join(chance.choice(EMOJI) for _ in range(chance.randrange(1, 60)))


def table(chance: random.Random) -> str:
    columns = chance.randrange(2, 8)
    rows = [["0" if chance.random() < 0.7 else str(chance.randrange(100)) for _ in range(columns)] for _ in range(chance.randrange(3, 80))]
    lines = ["| " + " | ".join(f"column {number}" for number in range(columns)) + " |", "|" + "---|" * columns]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def zeros(chance: random.Random) -> str:
    return "[" + ",\n ".join("[" + ", ".join(["0"] * 24) + "]" for _ in range(chance.randrange(4, 24))) + "]"


def listed(chance: random.Random) -> str:
    return "\n".join(f"{number}. {chance.choice(['Buy milk', 'Call Anna', 'TODO'])}" for number in range(1, chance.randrange(20, 200)))


def code(chance: random.Random) -> str:
    fence = chance.choice(["```", "~~~", "````"])
    inside = chance.choice(
        [
            'prompt = "<think>\\n" + question + "</think>"',
            "text = re.sub(r'<think>.*?</think>', '', text)",
            f"TOKENS = {LEAK!r}",
            "<think>\nA thought.\n</think>",
            "for x in range(10):\n    print(x)",
        ]
    )
    return f"{prose(chance)}\n\n{fence}python\n{inside}\n{fence}\n\n{prose(chance)}"


def inline(chance: random.Random) -> str:
    return f"Models mark their thoughts with `<think>` and `</think>`; calls with ``<｜tool▁calls▁begin｜>``. {prose(chance)}"


def tags(chance: random.Random) -> str:
    return f'{prose(chance)} They stand between <think> and </think>, and "</think>" ends them. {prose(chance)}'


def jsons(chance: random.Random) -> str:
    return json.dumps({"reasoning": prose(chance), "markers": ["<think>", "</think>"], "rows": [{"a": 1}] * chance.randrange(1, 60)})


def drawn(chance: random.Random) -> str:
    return f"{prose(chance)}\n{chance.choice('-=_*~') * chance.randrange(3, 900)}\n{prose(chance)}"


def unfinished_code(chance: random.Random) -> str:
    return f"{prose(chance)}\n```text\n<think>\n" + prose(chance)


def svg(chance: random.Random) -> str:
    return "<svg>" + "".join(f'<circle cx="{n}" cy="{n * 7 % 90}" r="4"/>' for n in range(chance.randrange(5, 80))) + "</svg>"


def refrain(chance: random.Random) -> str:
    return "\n".join([prose(chance), *["La la la, la la la, la la la la la"] * chance.randrange(2, 9), prose(chance)])


KINDS: list[Callable[[random.Random], str]] = [
    prose, chinese, emoji, table, zeros, listed, code, inline, tags, jsons, drawn, unfinished_code, svg, refrain,
]  # fmt: skip


def arguments(schema: dict[str, Any], chance: random.Random) -> Any:
    """A value that keeps to a schema of the kinds below."""
    if "enum" in schema:
        return chance.choice(schema["enum"])
    if "anyOf" in schema:
        return arguments(chance.choice(schema["anyOf"]), chance)
    match schema.get("type"):
        case "object":
            needed = schema.get("required", [])
            return {
                name: arguments(of, chance) for name, of in schema.get("properties", {}).items() if name in needed or chance.random() < 0.5
            }
        case "array":
            return [arguments(schema["items"], chance) for _ in range(chance.randrange(schema.get("minItems", 0), 5))]
        case "integer":
            return chance.randrange(schema.get("minimum", 0), 100)
        case "number":
            return chance.random() * 50
        case "boolean":
            return chance.random() < 0.5
        case "null":
            return None
        case "string":
            return "2026-11-28" if "pattern" in schema else chance.choice([prose, chinese, emoji, code, jsons])(chance)
    return chance.choice([None, 1, "x", [], {}])


def schema(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    scalars: list[dict[str, Any]] = [
        {"type": "string"}, {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"}, {"type": "integer", "minimum": 1}, {"type": "number"},
        {"type": "boolean"}, {"enum": ["c", "f", 3]}, {"anyOf": [{"type": "string"}, {"type": "null"}]}, {},
    ]  # fmt: skip
    if depth and (depth > 3 or chance.random() < 0.7):
        return chance.choice(scalars)
    if depth and chance.random() < 0.4:
        return {"type": "array", "items": schema(chance, depth + 1), "minItems": 1}
    names = chance.sample(["city", "days", "unit", "query", "options", "größe", "路径", "a b"], chance.randrange(0, 5))
    found: dict[str, Any] = {"type": "object", "properties": {name: schema(chance, depth + 1) for name in names}}
    if chance.random() < 0.5:
        found["additionalProperties"] = False
    return {**found, "required": [name for name in names if chance.random() < 0.6]}


def good(count: int) -> Iterator[tuple[str, list[dict[str, Any]], Kept]]:
    chance = random.Random(17)
    for number in range(count):
        piece = chance.choice([1, 4, 7, 7, 40, 40, 4000, 4000])
        tools = [tool(schema(chance), f"tool_{index}") for index in range(chance.randrange(1, 5))] if number % 2 else []
        reasoning = prose(chance) if chance.random() < 0.3 else ""
        if tools and chance.random() < 0.6:
            calls = []
            for _ in range(chance.randrange(1, 4)):
                function = chance.choice(tools)["function"]
                value = arguments(function["parameters"], chance)
                calls.append((function["name"], json.dumps(value, ensure_ascii=chance.random() < 0.5)))
            said = prose(chance) if chance.random() < 0.3 else ""
            yield "Do it.", tools, streamed(said, "tool_calls", calls, piece, reasoning)
        else:
            said = chance.choice(KINDS)(chance)
            finish = "stop" if chance.random() < 0.8 else "length"
            if finish == "length":
                said = said[: chance.randrange(1, len(said) + 1)]
            yield "Write something.", tools, streamed(said, finish, None, piece, reasoning)


def test_ten_thousand_good_answers_break_no_rule() -> None:
    judged, count = dict.fromkeys(RULES, 0), 0
    for prompt, tools, answer in good(GOOD + 200):
        found = of({"messages": [{"role": "user", "content": prompt}], **({"tools": tools} if tools else {})}, answer, True)
        if not isinstance(found, Sample):  # a letter an event, and very many of them
            assert found == "large"
            assert len(answer.answer().body) > samples.MAX_ANSWER_BYTES
            continue
        said = judge(found)
        count += 1
        assert not said.broken, (said, found.answer[:3000])
        for rule in said.applied:
            judged[rule] += 1
    assert count >= GOOD
    assert all(often > GOOD / 10 for often in judged.values()), judged
