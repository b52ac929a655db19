"""Made traces for `bench.routing`: who asks what and when, as conversations. Lengths are in tokens, drawn so that means are the ones named.

- chat: one of four system messages (800), 2 to 12 turns of 40 to 200 words, answers of 250, half a minute to read and write.
- agents: one of three system messages with tools (6,000), 5 to 30 steps that each bring a tool's result (900), a second apart; the
  client names its session (`prompt_cache_key`), as coding agents do.
- documents: one of 300 (4,000), asked for by Zipf's law, one to three questions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# Letters of a text for a token; of JSON it is a little more.
LETTERS = 4


@dataclass
class Conversation:
    """Begins at `at_s`; `turns` are what its user says, with the lengths of the answers; `pause_s` lies before each but the first."""

    at_s: float
    system: str
    turns: list[tuple[str, int]]
    pause_s: list[float]
    more: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)


def text(chance: random.Random, tokens: float) -> str:
    """So many tokens that nobody else has said."""
    size = max(2, int(tokens * LETTERS))
    return chance.randbytes(size // 2 + 1).hex()[:size]


def _starts(chance: random.Random, rate: float, length_s: float) -> Iterator[float]:
    at_s = chance.expovariate(rate)
    while at_s < length_s:
        yield at_s
        at_s += chance.expovariate(rate)


def chat(chance: random.Random, rate: float, length_s: float) -> list[Conversation]:
    """People."""
    systems = [text(chance, 800) for _ in range(4)]
    found = []
    for at_s in _starts(chance, rate, length_s):
        count = chance.randint(2, 12)
        turns = [(text(chance, chance.uniform(50, 250)), int(chance.uniform(50, 450))) for _ in range(count)]
        found.append(Conversation(at_s, chance.choice(systems), turns, [chance.expovariate(1 / 30) for _ in turns]))
    return found


def agents(chance: random.Random, rate: float, length_s: float) -> list[Conversation]:
    """Programs that work."""
    systems = [text(chance, 6000) for _ in range(3)]
    found = []
    for number, at_s in enumerate(_starts(chance, rate, length_s)):
        count = chance.randint(5, 30)
        turns = [(text(chance, chance.expovariate(1 / 900)), int(chance.uniform(30, 200))) for _ in range(count)]
        pauses = [chance.expovariate(1.0) for _ in turns]
        found.append(Conversation(at_s, chance.choice(systems), turns, pauses, {"prompt_cache_key": f"run-{number}"}))
    return found


def documents(chance: random.Random, rate: float, length_s: float) -> list[Conversation]:
    """Questions about texts."""
    known = [text(chance, 4000) for _ in range(300)]
    weights = [1 / (rank + 1) for rank in range(len(known))]
    found = []
    for at_s in _starts(chance, rate, length_s):
        turns = [(text(chance, chance.uniform(20, 80)), int(chance.uniform(50, 250))) for _ in range(chance.randint(1, 3))]
        (system,) = chance.choices(known, weights)
        found.append(Conversation(at_s, system, turns, [chance.expovariate(1 / 20) for _ in turns]))
    return found


# Conversations a second at which four of the simulated hosts prefill for a third to a half of the time under `two_choices`.
TRACES = {"chat": (chat, 2.5), "agents": (agents, 0.3), "documents": (documents, 5.0)}
