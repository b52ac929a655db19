"""How many tokens a request will take, before anybody has counted them: learned for each model from what its engines report.

Estimates decide what is reserved, never what is charged in the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from gateway.errors import ConfigError
from gateway.wire.body import Fields

# Of English prose in DeepSeek-V3's tokenizer, roughly; what is learned takes its place after a few answers.
BYTES_PER_TOKEN = 4.0
# What an answer is thought to take while nothing is known of the model.
FIRST_GUESS = 256
# Of the percentile's estimate, by which share an answer moves it: in the end, and before that by one over the number of answers.
_STEP = 0.05
# A share of what was learned is forgotten with every answer, so that half of it is some 70 answers old.
_KEEP = 0.99
# Encoding runs at about 2 MB/s; what takes longer than a millisecond goes to a thread.
_INLINE_BYTES = 2048


class Estimator:
    """What is known of one model's tokens."""

    def __init__(self, tokenizer: Path | None = None, where: str = "") -> None:
        self._bytes = BYTES_PER_TOKEN * 100
        self._tokens = 100.0
        self._answers = 0
        self._p90 = float(FIRST_GUESS)
        self._encode = _encoder(tokenizer, where) if tokenizer is not None else None

    @property
    def counts(self) -> bool:
        """Whether a tokenizer is configured, so that prompts are counted and not guessed."""
        return self._encode is not None

    def guess(self, size: int) -> int:
        """Tokens of a prompt of so many bytes."""
        return int(size * self._tokens / self._bytes) + 1

    async def count(self, fields: Fields, names: Sequence[str], size: int) -> int:
        """Tokens of a prompt whose words stand in the fields of these names (the chat template's own few are not in it)."""
        assert self._encode is not None
        words = _words([msgspec.json.decode(fields[name]) for name in names if name in fields])
        if size <= _INLINE_BYTES:
            return self._encode(words)
        return await asyncio.to_thread(self._encode, words)

    def completion(self, choices: int, bound: int | None) -> int:
        """Tokens of an answer: the 90th percentile of this model's, so that a large bound alone costs nothing."""
        usual = int(self._p90) + 1
        return choices * (usual if bound is None or bound > usual else bound)

    def learn(self, size: int, prompt_tokens: int, completion_tokens: int) -> None:
        """One answer's true figures; `completion_tokens` is for one choice."""
        if prompt_tokens > 0 and size > 0:
            self._bytes = self._bytes * _KEEP + size
            self._tokens = self._tokens * _KEEP + prompt_tokens
        # Where one answer in ten is longer the steps up and down are as large (Robbins and Monro's approximation).
        if not self._answers:
            self._p90 = float(completion_tokens)
        self._answers += 1
        step = self._p90 / (self._answers + 1) if self._answers < 1 / _STEP else self._p90 * _STEP
        self._p90 += 0.9 * step if completion_tokens > self._p90 else -0.1 * step
        if self._p90 < 1.0:
            self._p90 = 1.0


def prompt_bytes(fields: Fields, names: Sequence[str]) -> int:
    """Of the fields that hold a prompt's words."""
    size = 0
    for name in names:
        value = fields.get(name)
        if value is not None:
            size += len(memoryview(value))
    return size


def _words(value: Any) -> str:
    """Everything a prompt says, keys and structure left out."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return " ".join(_words(inner) for inner in value.values())
    if isinstance(value, list):
        return " ".join(_words(inner) for inner in value)
    return str(value)


def _encoder(path: Path, where: str) -> Callable[[str], int]:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigError(where, "needs the package `tokenizers`: pip install 'penstock[tokenizer]'") from None
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare ones
        raise ConfigError(where, f"cannot be read as a tokenizer: {error}") from None
    return lambda words: len(tokenizer.encode(words, add_special_tokens=False).ids) + 1
