"""How DeepSeek's models write what they think and call, and how SGLang 0.5.23's parsers read it: what an answer's raw text must have
been.

The parsers take nothing away but the marks themselves (`<think>`, `</think>`, those of calls): no white space is stripped in streams.
"""

from __future__ import annotations

import msgspec

from backends.sglang_dsv3.shapes import Called, Delivered

THINK, THOUGHT = "<think>", "</think>"
# Reasoning parsers that look for these marks in text, and what interrupts thinking for each.
THINKING = {"deepseek-r1": "", "deepseek-v3": "<tool_call>"}
# Those whose template takes the thoughts of a message that goes on as they are, in a member of their own.
STRUCTURED = frozenset(["deepseek-v4", "deepseek-v41"])
# Where a call begins, for each tool call parser whose calls can be read as a whole by its engine.
CALLING = {
    "deepseekv3": ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
    "deepseekv31": ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
    # With the blank line before it, which is none of the words.
    "deepseekv32": ("\n\n<｜DSML｜function_calls>", "<｜DSML｜function_calls>", "<｜DSML｜invoke"),
}


class Format(msgspec.Struct, frozen=True):
    """Calls whose arguments are handed on as the model writes them, so that the raw text can be told from what was delivered."""

    # Around the name.
    begin: str
    named: str
    # After the arguments; `end` closes the call.
    written: str
    end: str


FORMATS = {
    "deepseekv3": Format("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n", "\n```", "<｜tool▁call▁end｜>"),
    "deepseekv31": Format("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "", "<｜tool▁call▁end｜>"),
}
# Between calls; V3's template has a line break there, V3.1's nothing.
_BETWEEN = {"deepseekv3": "\n", "deepseekv31": ""}


def spoken(given: Delivered, opened: bool, thoughts: bool = True) -> str:
    """The raw text of thoughts and words after a prompt that has `opened` the thinking or not; `thoughts`: whether they were told apart."""
    if not thoughts:
        return given.text
    goes_on = bool(given.text or given.calls)
    before = THINK if given.reasoning and not opened else ""
    return before + given.reasoning + (THOUGHT if goes_on and (opened or given.reasoning) else "") + given.text


def called(parser: str, calls: list[Called]) -> str:
    """The raw text of calls, the last one as far as it was delivered."""
    form = FORMATS[parser]
    whole = [form.begin + call.name + form.named + call.arguments + form.written + form.end for call in calls[:-1]]
    last = form.begin + calls[-1].name + form.named + calls[-1].arguments
    return "<｜tool▁calls▁begin｜>" + _BETWEEN[parser].join([*whole, last])
