"""The rules that answers are held to: what each looks at, and what breaks it.

Every rule errs towards silence: what the client has spoken of itself, what stands in code, in quotes or in a table is no fault of a host's.
docs/sentinel.md shows this table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import msgspec

from gateway.plugin import Endpoint, Markup
from gateway.sentinel import schemas
from gateway.sentinel.answers import Said, Unreadable, read
from gateway.sentinel.sample import Sample
from gateway.serving.kept import unpacked

# What is said of a host that breaks a rule; the order is that of the metrics and the documents.
RULES = {
    "tool_arguments": "malformed tool calls",
    "tool_schema": "tool calls that break their schema",
    "tool_markup": "tool calls left in the text",
    "reasoning_markup": "reasoning left in the text",
    "empty": "empty answers",
    "loop": "answers that repeat themselves to their end",
    "utf8": "answers with broken text",
}

# Of an answer's end so much is looked through for what it repeats; the longest piece that is looked for, how often it must come in a row,
# and over how many characters at least: more of what draws lines, tables and rows of data.
_TAIL = 8192
_PERIOD = 256
_TIMES = 16
_LOOP_CHARS, _DRAWN_CHARS = 256, 2048
_DRAWN = frozenset("-=_*~#.,:;·•─━═│| \t\r\n0+/\\<>[](){}")
# What stands for bytes that were no text, so often in a row.
_BROKEN = re.compile("\ufffd{3}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
# Code: fenced, to its end or that of the text, and inline.
_CODE = re.compile(r"(?ms)^[ \t>]*(`{3,}|~{3,}).*?(?:^[ \t>]*\1[`~]*[ \t]*$|\Z)|(`+)(?!`).*?(?<!`)\2(?!`)")
_QUOTES = frozenset("\"'\u201c\u2018\u00ab\u300c\u300e(")


class Found(msgspec.Struct, frozen=True):
    """What an answer was held to, what it broke and how, why its choices ended, and of a bad one what it says, for an example."""

    applied: list[str] = []
    broken: dict[str, str] = {}
    finishes: list[str] = []
    said: str = ""


def judge(sample: Sample) -> Found:
    """Hold an answer to every rule that it falls under; raises Unreadable for what is no answer."""
    raw = unpacked(sample.answer, sample.beginning, sample.end)
    broken: dict[str, str] = {}
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        broken["utf8"] = f"byte {error.start} is no UTF-8"
        raw = raw.decode(errors="replace").encode()
    try:
        choices = read(sample.endpoint, sample.stream, raw)
    except Unreadable:
        if not _SURROGATE.search(raw):
            raise
        broken["utf8"] = "half of a surrogate pair"
        choices = read(sample.endpoint, sample.stream, _SURROGATE.sub(rb"\\ufffd", raw))
    applied = {"utf8", *(rule for rule, applies in _APPLIES if applies(sample, choices))}
    for rule, how in _broken(sample, choices):
        if rule in applied:
            broken.setdefault(rule, how)
    finishes = [said.finish for said in choices]
    return Found([rule for rule in RULES if rule in applied], broken, finishes, shown(choices) if broken else "")


def _generates(sample: Sample, choices: list[Said]) -> bool:
    return bool(choices)


def _calls(sample: Sample, choices: list[Said]) -> bool:
    return any(said.calls for said in choices)


_APPLIES: tuple[tuple[str, Callable[[Sample, list[Said]], bool]], ...] = (
    ("tool_arguments", _calls),
    ("tool_schema", lambda sample, choices: bool(sample.tools) and _calls(sample, choices)),
    ("tool_markup", lambda sample, choices: bool(sample.markup.tools) and sample.endpoint is not Endpoint.COMPLETIONS),
    ("reasoning_markup", lambda sample, choices: bool(sample.markup.opens) and sample.endpoint is not Endpoint.COMPLETIONS),
    ("empty", lambda sample, choices: not sample.stops and any(said.finish == "stop" for said in choices)),
    ("loop", _generates),
)


def _broken(sample: Sample, choices: list[Said]) -> Iterator[tuple[str, str]]:
    tools = schemas.parameters(sample.tools) if sample.tools else {}
    for said in choices:
        yield from broken_calls(said, tools)
        if is_empty(said):
            yield "empty", "it ends by itself and says nothing"
        text = without_code(said.content)
        if marker := leaked_call(text, sample.markup):
            yield "tool_markup", f"{marker} in the text"
        if marker := _leaked_reasoning(text, sample.markup):
            yield "reasoning_markup", f"{marker} in the text"
        if said.finish == "length" and (piece := repeats(said.content) or repeats(said.reasoning)):
            yield "loop", f"{piece} characters over and over"
        if not sample.replaced and (_BROKEN.search(said.content) or _BROKEN.search(said.reasoning)):
            yield "utf8", "U+FFFD in a row"


def broken_calls(said: Said, tools: dict[str, object]) -> Iterator[tuple[str, str]]:
    """What is wrong with its calls of tools; `tools` where their schemas are to be asked."""
    for name, arguments in said.calls:
        try:
            given = msgspec.json.decode(arguments or "{}")
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
            yield "tool_arguments", "the arguments are no JSON"
            continue
        if not isinstance(given, dict):
            yield "tool_arguments", "the arguments are no object"
        elif tools and name not in tools:
            yield "tool_schema", "a tool that was not offered"
        elif tools and tools[name] is not None and (how := schemas.broken(tools[name], given)):
            yield "tool_schema", how


def is_empty(said: Said) -> bool:
    """Whether it ended by itself and says nothing, whatever it thought."""
    return said.finish == "stop" and not said.calls and not said.refusal and not said.content.strip()


def leaked_call(text: str, markup: Markup) -> str:
    """What of a call of a tool is left in a text without code; "" where nothing is."""
    return next((marker for marker in markup.tools if any(not _quoted(text, at) for at in _places(text, marker))), "")


def _leaked_reasoning(text: str, markup: Markup) -> str:
    """What begins the text as only reasoning begins, or ends reasoning that nothing has begun."""
    begins = text.lstrip()
    for marker in markup.opens:
        if begins.startswith(marker):
            return marker
    opened = any(marker in text for marker in markup.opens)
    return "" if opened else next((mark for mark in markup.closes if any(not _quoted(text, at) for at in _places(text, mark))), "")


def without_code(text: str) -> str:
    """A text without what stands in it as code."""
    return _CODE.sub("`", text)


def _places(text: str, marker: str) -> Iterator[int]:
    at = text.find(marker)
    while at >= 0:
        yield at
        at = text.find(marker, at + len(marker))


def _quoted(text: str, at: int) -> bool:
    return at > 0 and text[at - 1] in _QUOTES


def repeats(text: str) -> int:
    """How long the piece is that a text says over and over until its end; 0 where it does not."""
    tail = text[-_TAIL:]
    for period in range(1, _PERIOD + 1):
        size = max(_TIMES * period, _LOOP_CHARS)
        if size + period > len(tail):
            return 0
        if _has_period(tail, period, size):
            size = max(size, _DRAWN_CHARS) if _draws(tail[-period:]) else size
            if size + period <= len(tail) and _has_period(tail, period, size):
                return period
    return 0


def _has_period(tail: str, period: int, size: int) -> bool:
    return tail[-size:] == tail[-size - period : -period]


def _draws(piece: str) -> bool:
    """Whether it is of the kind of which lines, tables and rows of data are made: mostly no letters, or one of the marks for that."""
    return piece in _DRAWN if len(piece) == 1 else 2 * sum(map(str.isalpha, piece)) < len(piece)


def shown(choices: list[Said]) -> str:
    """Its beginning and its end, for people."""
    whole = "\n".join(
        part
        for said in choices
        for part in (said.reasoning and f"(reasoning) {said.reasoning}", said.content, *(f"{name}({args})" for name, args in said.calls))
        if part
    )
    return whole if len(whole) <= 2 * _SHOWN else f"{whole[:_SHOWN]} ... {whole[-_SHOWN:]}"


_SHOWN = 1000
