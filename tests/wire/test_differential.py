"""What the engine receives is what was sent, and what the client receives is what the engine sent, but for the edits that
docs/compatibility.md names: tried with generated requests and answers full of fields that nobody has heard of."""

from __future__ import annotations

import itertools
import json
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from backends.sglang_dsv3 import translate
from gateway.errors import InvalidRequest
from gateway.plugin import Endpoint, Terms
from gateway.serving import calls
from gateway.wire import body
from gateway.wire.requests import ChatRequest
from gateway.wire.sse import EventTooLarge, Splitter
from tests.support import raw
from tests.support.processes import Gateway, Rehearsal

# PENSTOCK_FUZZ=500000 runs the two fuzz tests that often.
FUZZ = settings(max_examples=int(os.environ.get("PENSTOCK_FUZZ", "1500")), deadline=None, suppress_health_check=list(HealthCheck))
USER = [{"role": "user", "content": "hi"}]
# What means something, in a request or an answer.
KNOWN = set(ChatRequest.__struct_fields__) | translate.INTERNAL_FIELDS | {"priority", "rehearsal_answer"}
TOLD = {"id", "choices", "usage", "finish_reason", "error"}

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
UNKNOWN = st.dictionaries(TEXT.filter(lambda name: name not in KNOWN | TOLD), JSON, max_size=4)
PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.none() | st.floats(0, 2),
        "n": st.none() | st.sampled_from([1, 1.0, "1", "+1.0"]),
        "stop": st.none() | TEXT | st.lists(TEXT, max_size=4),
        "seed": st.none() | st.integers(-(2**63), 2**63 - 1),
        "max_tokens": st.none() | st.integers(1, 10**6) | st.integers(1, 99).map(float) | st.integers(1, 99).map(str),
        "user": st.none() | TEXT,
        "metadata": st.none() | st.dictionaries(TEXT, TEXT, max_size=3),
        "stream_options": st.none() | st.dictionaries(st.sampled_from(["include_usage", "continuous_usage_stats"]), st.booleans()),
        "priority": st.integers(),
    },
)  # fmt: skip


def exact(text: bytes | str) -> Any:
    """JSON with its numbers as they are written: 1.0 is not 1."""
    return json.loads(text, parse_int=lambda digits: ("int", digits), parse_float=lambda digits: ("float", digits))


def edited(sent: dict[str, Any], rid: str, kept: bool = False) -> dict[str, Any]:
    """The edits of docs/compatibility.md, done by other means. `kept`: the answer may be continued elsewhere."""
    fields = {name: value for name, value in sent.items() if value is not None}
    for name in ("n", "max_tokens"):
        if name in fields:
            fields[name] = ("int", str(int(float(fields[name][1] if isinstance(fields[name], tuple) else fields[name]))))
    fields.pop("priority", None)
    options = fields.pop("stream_options", {})
    if fields.get("stream"):
        options = {name: value for name, value in options.items() if name != "continuous_usage_stats"}
        fields["stream_options"] = {**options, "include_usage": True, **({"continuous_usage_stats": True} if kept else {})}
    return {**fields, "rid": rid}


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(UNKNOWN, PARAMETERS, st.sampled_from([{}, {"stream": True}, {"stream": False}, {"stream": None}]), st.booleans())
def test_thousands_of_requests_reach_the_engine_as_they_were(
    unknown: dict[str, Any], parameters: dict[str, Any], stream: dict[str, Any], spaced: bool
) -> None:
    sent = {"model": "m", "messages": USER, **parameters, **unknown, **stream}
    text = json.dumps(sent, separators=None if spaced else (",", ":"), ensure_ascii=spaced)
    call = calls.parse(Endpoint.CHAT, text.encode())
    assert exact(translate.engine_body(call, Terms())) == edited(exact(text), call.id)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(UNKNOWN, PARAMETERS, UNKNOWN, st.booleans())
def test_both_ways_over_real_sockets(
    wired: Gateway, scripted_sglang: Rehearsal, unknown: dict[str, Any], parameters: dict[str, Any], extra: dict[str, Any], stream: bool
) -> None:
    def chunk(**fields: Any) -> str:
        return json.dumps({"id": "x", **fields}, separators=(",", ":"), ensure_ascii=False)

    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    choice = {"index": 0, "delta": {"content": "hi", **extra}, "finish_reason": None}
    usage_event = f"data: {chunk(choices=[], usage=usage)}\n\n"
    events = [f"data: {chunk(choices=[choice], **extra)}\n\n", f"data: {chunk(choices=[{**choice, 'finish_reason': 'stop'}])}\n\n"]
    whole = chunk(choices=[{"index": 0, "message": {"content": "hi", **extra}, "finish_reason": "stop"}], usage=usage, **extra)
    answer = "".join([*events, usage_event, "data: [DONE]\n\n"]) if stream else whole
    sent = {"model": "deepseek-v3", "messages": USER, **parameters, **unknown, "stream": stream, "rehearsal_answer": answer}
    text = json.dumps(sent, separators=(",", ":"), ensure_ascii=False)
    got = raw.call(wired.port, "POST", "/v1/chat/completions", text.encode())
    received = scripted_sglang.seen()["last_body"]
    assert exact(received) == edited(exact(text), json.loads(received)["rid"], kept=stream)
    asked = (parameters.get("stream_options") or {}).get("include_usage")
    assert got.body.decode() == (answer if asked or not stream else answer.replace(usage_event, ""))


JUNK = st.one_of(
    st.binary(max_size=64),
    st.lists(
        st.sampled_from([b"{", b"}", b"[", b"]", b",", b":", b'"a"', b'"b"', b'"\\u0061"', b'"\\ud800"', b"1", b"-0", b"1e999", b"null",
                         b" ", b"\n", b"\xff", b'"\xc3\xa9"', b"true", b"\xef\xbb\xbf", b'"a":1,', b'{"model":"m",']),
        max_size=20,
    ).map(b"".join),
)  # fmt: skip


@FUZZ
@given(JUNK)
@example(b'{"a":1,"a":2}')
@example(b'{"a":1,"\\u0061":2}')
@example(b'{"":1e999}')
def test_whatever_bytes_come_the_peek_agrees_with_json_or_refuses(content: bytes) -> None:
    try:
        fields = body.peek(content)
    except InvalidRequest:
        return
    pairs: list[tuple[str, Any]] = json.loads(content, object_pairs_hook=list)
    assert len(dict(pairs)) == len(pairs) == len(fields)
    assert exact(body.splice(fields, {})) == exact(content)


STREAM = st.lists(
    st.sampled_from(
        [b"data: x", b"data:x", b"event:a", b"data: [DONE]", b"\n\n", b"\r\n", b"\r", b"\n", b"event: a\n", b": ping\n\n", b"\x00\xff"]
    )
    | st.binary(max_size=6),
    max_size=20,
).map(b"".join)


@FUZZ
@given(STREAM, st.lists(st.integers(0, 200), max_size=6))
def test_whatever_bytes_come_the_splitter_loses_none_and_cares_for_no_split(content: bytes, cuts: list[int]) -> None:
    at = [0, *sorted(cut for cut in cuts if cut < len(content)), len(content)]
    splitter, whole = Splitter(), Splitter()
    events = [event for start, end in itertools.pairwise(at) for event in splitter.feed(content[start:end])]
    assert (events, splitter.pending) == (whole.feed(content), whole.pending)
    assert all(event.endswith(b"\n\n") and event.strip(b"\n") for event in events)
    kept = b"".join(events) + splitter.pending
    assert kept.translate(None, b"\r\n ") == content.translate(None, b"\r\n ")


@FUZZ
@given(st.binary(max_size=64), st.integers(0, 32))
def test_what_waits_for_its_end_is_bounded(content: bytes, limit: int) -> None:
    splitter = Splitter(limit)
    try:
        for at in range(len(content)):
            splitter.feed(content[at : at + 1])
            assert len(splitter.pending) <= limit + 1
    except EventTooLarge:
        return
