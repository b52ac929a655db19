"""A guard against growing slower that is no timed test: how many Python-level calls, and how much memory at once, a fixed request takes
through the whole stack, from the bytes at the server's protocol to the bytes at the host's, against bench/budget.json.

A call costs 50 to 100 ns (2026-11-24). Whoever needs more raises the budget in the same commit and says what for; who needs less lowers it:

    python -m tests.unit.test_budget      prints what is taken now, in the file's own form
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from tests.support import raw
from tests.support.memory_net import Gateway, Loop
from tests.support.processes import ROOT

pytestmark = pytest.mark.pure

BUDGET = ROOT / "bench" / "budget.json"
CHAT = "/v1/chat/completions"
# The event loop's own turns (uvloop's are C) and this test's.
HARNESS = ("/asyncio/base_events.py", "/asyncio/events.py", "/selectors.py", "/memory_net.py", "/test_budget.py")
# What runs a few times a second, whatever the requests.
TICKS = ("_look",)
# Below this share of the budget it is the budget that is wrong.
SLACK = 0.97


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(body), body)


def event(choices: str, more: str = "") -> bytes:
    head = '"id":"chatcmpl-0","object":"chat.completion.chunk","created":1,"model":"deepseek-v3"'
    return chunk(f'data: {{{head},"choices":[{choices}]{more}}}\n\n'.encode())


TOKEN = event('{"index":0,"delta":{"reasoning_content":null,"content":" hello"},"logprobs":null,"finish_reason":null,"matched_stop":null}')
FINISH = event('{"index":0,"delta":{"reasoning_content":null},"logprobs":null,"finish_reason":"stop","matched_stop":null}')
USAGE = event("", ',"usage":{"prompt_tokens":9,"total_tokens":15,"completion_tokens":6,"prompt_tokens_details":null,"reasoning_tokens":0}')
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
WHOLE = json.dumps(
    {
        "id": "x", "object": "chat.completion", "created": 1, "model": "deepseek-v3",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello " * 40}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 40, "total_tokens": 49},
    }
).encode()  # fmt: skip


def answer(request: bytes, events: int) -> list[bytes]:
    if b'"stream":true' not in request:
        return [b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(WHOLE) + WHOLE]
    return [STREAM_HEAD, *[TOKEN] * events, FINISH + USAGE + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"]


def request(**more: Any) -> bytes:
    content = json.dumps(raw.chat("Explain quantum computing. " * 20, max_tokens=64, **more), separators=(",", ":")).encode()
    return raw.request("POST", CHAT, content, {"connection": "keep-alive", "authorization": "Bearer sk-bench"})


@contextlib.contextmanager
def a_line_per_request() -> Iterator[None]:
    """The log as it runs, and not to pytest's handlers, which come anew with every phase of a test."""
    log = logging.getLogger("penstock.request")
    before = log.level, log.handlers, log.propagate
    log.setLevel(logging.INFO)
    log.handlers, log.propagate = [logging.NullHandler()], False
    try:
        yield
    finally:
        log.setLevel(before[0])
        log.handlers, log.propagate = before[1:]


class Stack:
    """The gateway, and what an exchange with it takes."""

    def __init__(self) -> None:
        self._loop = Loop()
        self._gateway = Gateway(self._loop)

    def close(self) -> None:
        self._gateway.close()

    def _exchange(self, stream: bool, events: int) -> Callable[[], bytes]:
        self._loop.answer = lambda sent: answer(sent, events)
        sent = request(stream=True) if stream else request()
        return lambda: self._gateway.exchange(sent, b"0\r\n\r\n" if stream else WHOLE[-20:])

    @a_line_per_request()
    def calls(self, stream: bool, events: int = 0) -> int:
        """Python functions entered, coroutines resumed, and C functions called; the least of three, since a second that begins within
        one of them is not the exchange's."""
        exchange = self._exchange(stream, events)
        for _ in range(3):
            got = exchange()
        assert got.startswith(b"HTTP/1.1 200 OK")
        assert got.count(b'"content":" hello"') == events
        count, counts = 0, list[int]()

        def watch(frame: FrameType, kind: str, argument: object) -> None:
            nonlocal count
            if kind in ("call", "c_call") and not frame.f_code.co_filename.endswith(HARNESS) and frame.f_code.co_name not in TICKS:
                count += 1

        for _ in range(3):
            count = 0
            gc.disable()
            sys.setprofile(watch)
            try:
                exchange()
            finally:
                sys.setprofile(None)
                gc.enable()
            counts.append(count)
        return min(counts)

    @a_line_per_request()
    def peak_bytes(self, stream: bool, events: int = 0) -> int:
        """The most memory that an exchange holds at once beyond what was there before; the least of three, since a dictionary that
        happens to grow in one of them is not the exchange's."""
        exchange = self._exchange(stream, events)
        for _ in range(3):
            exchange()
        gc.collect()
        tracemalloc.start()
        try:
            peaks = []
            for _ in range(3):
                before, _ = tracemalloc.get_traced_memory()
                tracemalloc.reset_peak()
                exchange()
                peaks.append(tracemalloc.get_traced_memory()[1] - before)
            return min(peaks)
        finally:
            tracemalloc.stop()

    def taken(self) -> dict[str, int]:
        """What bench/budget.json holds."""
        few, many = self.calls(True, 10), self.calls(True, 110)
        return {
            "json_calls": self.calls(False),
            "stream_calls": few - (many - few) // 10,
            "event_calls": (many - few) // 100,
            "json_peak_bytes": self.peak_bytes(False),
            "stream_peak_bytes": self.peak_bytes(True, 100),
        }


@pytest.fixture
def stack() -> Iterator[Stack]:
    found = Stack()
    yield found
    found.close()


def test_a_request_stays_within_its_budget(stack: Stack) -> None:
    budget, taken = json.loads(BUDGET.read_text()), stack.taken()
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    over = {name: (taken[name], budget[name]) for name in taken if taken[name] > budget[name]}
    assert not over, f"(taken, budget): {over}"
    if python == budget["python"]:  # others inline more
        under = {name: (taken[name], budget[name]) for name in taken if name.endswith("calls") and taken[name] < budget[name] * SLACK}
        assert not under, f"lower the budget, (taken, budget): {under}"


def test_counting_is_repeatable_and_notices_a_few_calls_an_event(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    from gateway.serving import watch

    first, again = stack.taken(), stack.taken()
    assert {name: value for name, value in first.items() if name.endswith("calls")} == {
        name: value for name, value in again.items() if name.endswith("calls")
    }
    found: dict[str, Any] = {"plain": watch.Watch.to_engine}
    exec(compile("def slower(watch, until):\n    plain(watch, until)\n    len('')", "elsewhere.py", "exec"), found)
    monkeypatch.setattr(watch.Watch, "to_engine", found["slower"])
    assert stack.taken()["event_calls"] >= first["event_calls"] + 2


if __name__ == "__main__":
    print(json.dumps({"python": f"{sys.version_info.major}.{sys.version_info.minor}", **Stack().taken()}, indent=2))
