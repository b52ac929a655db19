"""Streams as SGLang 0.5.23 writes them: the client gets exactly the same bytes wherever the engine's writes happen to be cut."""

from __future__ import annotations

import json
from typing import Any

import pytest

from backends.sglang_dsv3 import stream
from gateway.plugin import AttemptFailed, Call, Endpoint, Terms, Usage
from gateway.serving import calls
from tests.support.processes import GOLDEN

USER = [{"role": "user", "content": "hi"}]
SHOW = {"stream_options": {"include_usage": True}}
# Recorded stream -> endpoint, further fields, the usage that is learnt. The first two and the failures were made by the wheel's own
# serializers with a stubbed engine, the others by the engine itself with the tiny checkpoint.
WHOLE: dict[str, tuple[Endpoint, dict[str, Any], Usage]] = {
    "chat-stream-plain": (Endpoint.CHAT, {"messages": USER, **SHOW}, Usage(12, 19, None, 6)),
    "chat-stream-full": (Endpoint.CHAT, {"messages": USER, **SHOW}, Usage(12, 19, None, 6)),
    "chat-two-choices": (Endpoint.CHAT, {"messages": USER, "n": 2, **SHOW}, Usage(5, 6, 4)),
    "completions": (Endpoint.COMPLETIONS, {"prompt": "hi", **SHOW}, Usage(2, 3, 0)),
    "responses": (Endpoint.RESPONSES, {"input": "hi"}, Usage(5, 1, 0)),
    "messages": (Endpoint.MESSAGES, {"messages": USER, "max_tokens": 3}, Usage(5, 3, 4)),
}
# Recorded failure -> how many events the client gets before it, its cause, and the status it would have had.
FAILED = {
    "chat-stream-abort": (2, "aborted", 503),
    "chat-stream-error-midstream": (2, "busy", 503),
    "chat-stream-error-valueerror": (2, "refused", 400),
    "chat-stream-error-first-event-http200": (0, "busy", 503),
}


def recorded(name: str) -> bytes:
    return (GOLDEN / f"sglang-0.5.23-{name}.sse").read_bytes()


def call(endpoint: Endpoint, **fields: Any) -> Call:
    return calls.parse(endpoint, json.dumps({"model": "deepseek-v3-tiny", "stream": True, **fields}).encode())


def relay(call: Call, *pieces: bytes) -> tuple[bytes, stream.EventStream, AttemptFailed | None]:
    """What a client would get of these writes of the engine."""
    source, got = stream.stream_of(call, Terms()), b""
    for piece in [piece for piece in pieces if piece]:
        got += source.feed(piece)
        if source.complete or source.failure is not None:
            return got, source, source.failure
    return got + source.end(), source, source.failure


def test_every_recorded_stream_is_tried() -> None:
    assert {path.stem.removeprefix("sglang-0.5.23-") for path in GOLDEN.glob("sglang-*.sse")} == set(WHOLE) | set(FAILED)


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_answer_passes_whatever_the_split(name: str) -> None:
    endpoint, fields, usage = WHOLE[name]
    asked = call(endpoint, **fields)
    sent = recorded(name)
    expected = sent
    if asked.choices > 1:  # SGLang gives each choice an id of its own; the client gets one
        lines = [b'data: {"id":"%s"%s' % (asked.id.encode(), line[line.index(b'",') + 1 :]) if b'"id"' in line else line
                 for line in sent.split(b"\n")]  # fmt: skip
        expected = b"\n".join(lines)

    for at in range(len(sent)):
        got, source, failure = relay(asked, sent[:at], sent[at:])
        assert (got, failure, source.usage) == (expected, None, usage), at
    singles = [sent[at : at + 1] for at in range(len(sent))]
    assert (relay(asked, *singles))[0] == expected


@pytest.mark.parametrize("name", ["chat-stream-plain", "chat-stream-full", "completions"])
def test_usage_that_nobody_asked_for_is_left_out_whatever_the_split(name: str) -> None:
    endpoint, fields, usage = WHOLE[name]
    asked = call(endpoint, **{key: value for key, value in fields.items() if key != "stream_options"})
    sent = recorded(name)
    expected = b"\n\n".join(event for event in sent.split(b"\n\n") if b'"choices":[]' not in event)

    for at in range(len(sent)):
        got, source, failure = relay(asked, sent[:at], sent[at:])
        assert (got, failure, source.usage) == (expected, None, usage), at


@pytest.mark.parametrize("name", FAILED)
def test_a_failure_is_one_whatever_the_split_and_never_ends_in_done(name: str) -> None:
    events, cause, status = FAILED[name]
    asked = call(Endpoint.CHAT, messages=USER)
    sent = recorded(name)
    expected = b"".join(event + b"\n\n" for event in sent.split(b"\n\n")[:events])

    for at in range(len(sent)):
        got, _, failure = relay(asked, sent[:at], sent[at:])
        assert got == expected, at
        assert failure is not None
        assert (failure.cause, failure.error.status) == (cause, status)


@pytest.mark.parametrize("name", WHOLE)
def test_an_answer_that_is_cut_anywhere_is_never_taken_for_whole(name: str) -> None:
    endpoint, fields, _ = WHOLE[name]
    asked, sent = call(endpoint, **fields), recorded(name)
    last = sent.rstrip().rfind(b"\n\n") + 2  # of chunks the closing line may be missing, and is then supplied

    for at in range(1, last - 2):
        got, _, failure = relay(asked, sent[:at])
        if failure is None:
            assert got.endswith(b"data: [DONE]\n\n")
            assert sent[:at].count(b'"finish_reason":"') == asked.choices
        else:
            assert b"[DONE]" not in got
            assert b"message_stop" not in got
