"""How many engines a target takes: users who each get so many tokens a second, and their first one in time."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from backends.sglang_dsv3.engine.plan import roofline
from backends.sglang_dsv3.engine.plan.roofline import Work

# What published deployments reach of the roofline, the least and the most of them (docs/capacity.md): of decoding, and of the arithmetic of
# prompts.
REACHED = ((0.19, 0.16), (0.36, 0.58))
REACHED_SOURCE = "published (the least and the most of the deployments in docs/capacity.md)"
_MOST = 1 << 20


class Target(NamedTuple):
    """Seconds to the first token, tokens a second for each user, users at once."""

    ttft_s: float
    speed: float
    users: int


class Fleet(msgspec.Struct, frozen=True):
    """`users_*`: of one engine, by what bounds them; `prefill_share`: of its time; what is expected of an engine with so many users."""

    ttft_s: float
    tokens_per_s: float
    users: int
    prompt_tokens: int
    answer_tokens: int
    users_by_speed: int
    users_by_memory: int
    users_by_first_token: int
    users_per_engine: int
    engines: int
    gpus: int
    expected_ttft_s: float
    expected_tokens_per_s: float
    prefill_share: float
    reached_decode: float
    reached_prefill: float


_PARTS = (
    ("ttft", re.compile(r"ttft\s+(\d+(?:\.\d+)?)\s*(ms|s)\Z")),
    ("speed", re.compile(r"(\d+(?:\.\d+)?)\s*(?:tok|tokens)/s\Z")),
    ("users", re.compile(r"(\d+)\s*users?\Z")),
)


def parsed(text: str) -> Target:
    """`ttft 2s, 30 tok/s, 200 users`; raises ValueError with what is accepted."""
    found: dict[str, float] = {}
    for part in text.lower().split(","):
        for name, pattern in _PARTS:
            if (match := pattern.match(part.strip())) is not None:
                found[name] = float(match[1]) / (1000 if name == "ttft" and match[2] == "ms" else 1)
                break
        else:
            raise ValueError(f"--target: '{part.strip()}' is not understood; accepted: 'ttft 2s, 30 tok/s, 200 users'")
    for name, said in (("ttft", "ttft 2s"), ("speed", "30 tok/s"), ("users", "200 users")):
        if not 0 < found.get(name, 0.0) <= _MOST:
            raise ValueError(f"--target: '{text}' has no '{said}' (above 0); accepted: 'ttft 2s, 30 tok/s, 200 users'")
    return Target(found["ttft"], found["speed"], int(found["users"]))


def sized(work: Work, kv_tokens: int, target: Target, prompt: int, answer: int) -> list[Fleet]:
    """Engines that meet a target, where they reach the least of the roofline that somebody has published, and where they reach the most.
    Prompts and answers are as long as said, nothing is cached; each user asks again at once. Prefill takes turns with decoding, and a
    prompt waits as long as in a queue with one server and even work (M/D/1)."""
    return [_sized(work, kv_tokens, target, prompt, answer, reached) for reached in REACHED]


def _sized(work: Work, kv_tokens: int, target: Target, prompt: int, answer: int, reached: tuple[float, float]) -> Fleet:
    def meets(users: int, speed: bool, first: bool) -> bool:
        rate, ttft, share = _expected(work, users, target, prompt, answer, reached)
        return share < 1 and (not speed or rate >= target.speed) and (not first or ttft <= target.ttft_s)

    by_speed = _largest(lambda users: meets(users, True, False))
    by_first = _largest(lambda users: meets(users, False, True))
    by_memory = kv_tokens // (prompt + answer)
    each = min(by_speed, by_first, by_memory)
    engines = -(-target.users // each) if each else 0
    rate, ttft, share = _expected(work, min(each, -(-target.users // max(1, engines))) or 1, target, prompt, answer, reached)
    return Fleet(
        target.ttft_s, target.speed, target.users, prompt, answer, by_speed, by_memory, by_first, each, engines, engines * work.layout.tp,
        ttft, rate, share, *reached,
    )  # fmt: skip


def _expected(work: Work, users: int, target: Target, prompt: int, answer: int, reached: tuple[float, float]) -> tuple[float, float, float]:
    """Tokens a second of each user, seconds to the first one, and the share of time that prompts take."""
    step = roofline.step(work, users, prompt + answer // 2).ms / 1e3 / reached[0]
    one = roofline.prompt_flops(work.shape, prompt) / (work.flops * reached[1])
    share = users * target.speed / answer * one
    if share >= 1:
        return 0.0, float("inf"), share
    return (1 - share) / step, one * (1 + share / (2 * (1 - share))) + step, share


def _largest(meets: Callable[[int], bool]) -> int:
    """The most users for which it holds, 0 where it does for none; it holds for fewer where it holds for more."""
    if not meets(1):
        return 0
    low, high = 1, 2
    while high < _MOST and meets(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low
