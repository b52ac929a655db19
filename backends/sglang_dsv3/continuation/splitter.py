"""A model's raw text, told apart as SGLang's parsers do it in chat: what it thinks, what it says, and the calls it writes.

For answers over token ids, which no parser of the engine's has gone over. What may be the beginning of a mark is held back until it is one
or not; from the first mark of a call on everything is held, for the engine's own detector to read.
"""

from __future__ import annotations

from backends.sglang_dsv3.continuation.markup import CALLING, THINK, THINKING, THOUGHT


class Splitter:
    """`thinking`: whether the text begins in the middle of thoughts, as after a prompt that opened them."""

    def __init__(self, reasoning: str, tools: str, thinking: bool) -> None:
        self.reasoning, self.tools = reasoning, tools
        self._interrupts = THINKING.get(reasoning, "")
        self._marks = CALLING.get(tools, ())
        self.thinking = bool(reasoning) and (thinking or reasoning == "deepseek-r1")
        self._stripped = False
        # What may yet become a mark of thoughts; or of a call.
        self._buffer = ""
        self._maybe = ""
        # The raw text from the first mark of a call on.
        self.calls = ""

    def copy(self) -> Splitter:
        """The same, to go on from."""
        other = Splitter(self.reasoning, self.tools, False)
        other.thinking, other._stripped = self.thinking, self._stripped
        other._buffer, other._maybe, other.calls = self._buffer, self._maybe, self.calls
        return other

    def feed(self, text: str) -> tuple[str, str]:
        """Thoughts and words that this and what was held come to."""
        if not self.reasoning:
            return "", self._without_calls(text)
        thoughts, words = self._told_apart(text)
        return thoughts, self._without_calls(words)

    def finish(self) -> tuple[str, str]:
        """What is still held when the text ends here, and is no mark then."""
        rest, self._buffer = self._buffer, ""
        if self.thinking:
            return rest.removeprefix(THINK), ""
        words = self._without_calls(rest) + self._maybe
        self._maybe = ""
        return "", words

    def _told_apart(self, text: str) -> tuple[str, str]:
        self._buffer += text
        now = self._buffer
        for mark in (THINK, THOUGHT, self._interrupts):
            if mark != now and mark.startswith(now):
                return "", ""
        if not self._stripped and THINK in now:
            now = self._buffer = now.replace(THINK, "", 1)
            self._stripped = self.thinking = True
        if not self.thinking:
            self._buffer = ""
            return "", now
        thoughts, mark, words = now.partition(THOUGHT)
        if not mark and self._interrupts:
            thoughts, mark, words = now.partition(self._interrupts)
            words = mark + words
        if mark:
            self._buffer, self.thinking = "", False
            return thoughts, words
        held = max(_beginning(now, mark) for mark in (THOUGHT, self._interrupts, "" if self._stripped else THINK))
        self._buffer = now[len(now) - held :]
        return now[: len(now) - held], ""

    def _without_calls(self, words: str) -> str:
        if not self._marks or not words:
            return words
        if self.calls:
            self.calls += words
            return ""
        now = self._maybe + words
        places = [place for place in (now.find(mark) for mark in self._marks) if place >= 0]
        if places:
            self._maybe, self.calls = "", now[min(places) :]
            return now[: min(places)]
        held = max(_beginning(now, mark) for mark in self._marks)
        self._maybe = now[len(now) - held :]
        return now[: len(now) - held]


def _beginning(text: str, mark: str) -> int:
    """How many of the last characters may be the beginning of a mark."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[len(text) - length :]):
            return length
    return 0
