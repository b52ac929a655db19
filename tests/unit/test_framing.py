"""Events are recognised by their JSON, however an engine or a proxy spells them; and whatever piles up has a bound."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from backends.sglang_dsv3 import stream
from backends.sglang_dsv3.framing import Framing, Malformed
from gateway.plugin import Call, Endpoint, Terms, Usage
from tests.unit.test_goldens import FAILED, USER, WHOLE, call, recorded, relay


def each_data(sent: bytes, spell: Callable[[bytes], bytes]) -> bytes:
    """A recorded stream with another spelling of every event's data but `[DONE]`."""
    return b"\n".join([b"data: " + spell(line[6:]) if line.startswith(b"data: {") else line for line in sent.split(b"\n")])


def spaced(data: bytes) -> bytes:
    return json.dumps(json.loads(data), ensure_ascii=False).encode()


def on_many_lines(sent: bytes) -> bytes:
    return each_data(sent, lambda data: b"\ndata: ".join(json.dumps(json.loads(data), ensure_ascii=False, indent=1).encode().split(b"\n")))


def with_message_names(sent: bytes) -> bytes:
    return b"\n\n".join(b"event: message\n" + event if event.startswith(b"data: ") else event for event in sent.split(b"\n\n"))


def with_comments(sent: bytes) -> bytes:
    return b": hello\n\n" + sent.replace(b"\n\n", b"\n\n: keep-alive\n\n", 1)


def all_of_it(sent: bytes) -> bytes:
    return with_comments(with_message_names(each_data(sent, spaced))).replace(b"data: ", b"data:").replace(b"\n", b"\r\n")


SPELLINGS: dict[str, Callable[[bytes], bytes]] = {
    "spaces": lambda sent: each_data(sent, spaced),
    "CRLF": lambda sent: sent.replace(b"\n", b"\r\n"),
    "CR": lambda sent: sent.replace(b"\n", b"\r"),
    "no space after the colon": lambda sent: sent.replace(b"data: ", b"data:"),
    "names": with_message_names,
    "ids": lambda sent: sent.replace(b"data: ", b"id: 7\nretry: 100\ndata: "),
    "comments": with_comments,
    "many lines": on_many_lines,
    "all of it": lambda sent: (
        with_comments(with_message_names(each_data(sent, spaced))).replace(b"data: ", b"data:").replace(b"\n", b"\r\n")
    ),
}


def asked(endpoint: Endpoint, fields: dict[str, Any]) -> Call:
    return call(endpoint, **fields)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("show", [True, False], ids=["usage asked", "not asked"])
def test_a_whole_answer_is_the_same_however_it_is_spelled(name: str, spelling: str, show: bool) -> None:
    endpoint, fields, usage = WHOLE[name]
    request = asked(endpoint, fields if show else {key: value for key, value in fields.items() if key != "stream_options"})
    sent = recorded(name)
    expected, plain, _ = relay(request, sent)
    spelled = SPELLINGS[spelling](sent)
    for size in (1, 7, len(spelled)):
        got, source, failure = relay(request, *(spelled[at : at + size] for at in range(0, len(spelled), size)))
        without_comments = b"".join(event + b"\n\n" for event in got.split(b"\n\n") if event and not event.startswith(b":"))
        assert (without_comments, failure, source.usage, source.reasons) == (expected, None, usage, plain.reasons), size
        assert got.count(b"[DONE]") == expected.count(b"[DONE]")


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", FAILED)
def test_a_failure_is_the_same_however_it_is_spelled(name: str, spelling: str) -> None:
    _, cause, status = FAILED[name]
    got, _, failure = relay(call(Endpoint.CHAT, messages=USER), SPELLINGS[spelling](recorded(name)))
    assert failure is not None
    assert (failure.cause, failure.error.status) == (cause, status)
    assert b"[DONE]" not in got
    assert b"error" not in got


def chunk(**more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": "a"}, "finish_reason": more.pop("finish", None)}
    return f"data: {json.dumps({'id': 'x', 'model': 'm', **more, 'choices': [choice]})}\n\n".encode()


@pytest.mark.parametrize("show", [True, False])
def test_a_foreign_engines_usage_is_found_wherever_it_stands_and_shown_to_who_asked(show: bool) -> None:
    """In every chunk, before the choices, as some engines have it."""
    counts = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    sent = chunk(usage=None) + chunk(usage=counts) + chunk(usage=counts, finish="stop") + b"data: [DONE]\n\n"
    request = call(Endpoint.CHAT, messages=USER, stream_options={"include_usage": show})
    got, source, failure = relay(request, sent)
    assert failure is None
    assert source.used() == Usage(3, 2)
    assert (b'"total_tokens":5' in got) is show
    assert got.count(b'"content":"a"') == 3


@pytest.mark.parametrize(
    "error",
    [
        b'{"error": {"message": "queue is full", "code": 503}}',
        b'{"object": "error", "message": "queue is full", "code": 503}',
        b'{"id": "x", "choices": [], "error": {"message": "queue is full", "code": "503"}}',
    ],
)
@pytest.mark.parametrize("compact", [True, False])
def test_an_error_is_one_wherever_it_stands_in_its_event(error: bytes, compact: bool) -> None:
    first = chunk()
    if compact:
        first = b"data: %s\n\n" % json.dumps(json.loads(first[6:]), separators=(",", ":")).encode()
    got, _, failure = relay(call(Endpoint.CHAT, messages=USER), first + b"data: " + error + b"\n\ndata: [DONE]\n\n")
    assert failure is not None
    assert (failure.cause, failure.error.status) == ("busy", 503)
    assert got.count(b"data: ") == 1


def test_words_of_an_answer_that_look_like_an_error_are_none() -> None:
    words = b'data: {"choices":[{"index":0,"delta":{"content":"error"},"finish_reason":null}],"error":null}\n\n'
    got, _, _ = relay(call(Endpoint.CHAT, messages=USER), words)
    assert got == words


def test_an_error_by_its_events_name_is_one() -> None:
    _, _, failure = relay(
        call(Endpoint.CHAT, messages=USER), chunk() + b'event: error\ndata: {"message": "queue is full", "code": 503}\n\n'
    )
    assert failure is not None
    assert failure.cause == "busy"


def test_what_begins_with_no_json_is_no_answer() -> None:
    for nonsense in (b"data: hello\n\n", b"data: {\n\n", b"data: [1, 2\n\n"):
        got, _, failure = relay(call(Endpoint.CHAT, messages=USER), nonsense)
        assert got == b""
        assert failure is not None
        assert failure.cause == "broken"


def test_the_form_is_found_out_once_and_then_left_alone() -> None:
    compact = b'data: {"a":1}\n\n'
    framing = Framing(False)
    assert framing.feed(b": hi\n\n" + compact) == [compact]
    assert framing.feed(b'data: {"a": 1}\n\n') == [b'data: {"a": 1}\n\n'], "SGLang's own errors have spaces"
    framing = Framing(False)
    assert framing.feed(b'data: {"a": 1}\n\n' + compact) == [compact, compact]
    with pytest.raises(Malformed):
        framing.feed(b"data: nonsense\n\n")


@pytest.mark.parametrize(
    "event", [b'event: response.in_progress\ndata: {"x":1}\n\n', b"event: ping\ndata: {}\n\n", b'data: {"x":"%s"}\n\n' % (b"y" * 65536)]
)
def test_an_endless_prelude_is_ended_and_costs_what_its_bound_says(event: bytes) -> None:
    source = stream.stream_of(call(Endpoint.RESPONSES, input="hi"), Terms())
    tracemalloc.start()
    fed = 0
    while source.failure is None:
        assert source.feed(event) == b""
        fed += len(event)
        assert fed < 64 << 20
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert source.failure.cause == "broken"
    assert fed <= stream.MAX_HELD_BYTES + 2 * len(event)
    assert peak < stream.MAX_HELD_BYTES + (4 << 20)


def test_a_prelude_of_the_longest_request_is_none_too_long() -> None:
    """SGLang's responses begin with what was asked, twice."""
    begun = b'event: response.created\ndata: {"type":"response.created","response":{"instructions":"%s"}}\n\n' % (b"x" * (7 << 20))
    delta = b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"a"}\n\n'
    source = stream.stream_of(call(Endpoint.RESPONSES, input="hi"), Terms())
    assert source.feed(begun) == source.feed(begun.replace(b"created", b"in_progress")) == b""
    assert len(source.feed(delta)) == 2 * len(begun) + 2 * len(b"in_progress") - 2 * len(b"created") + len(delta)


def test_finishes_and_ids_without_end_do_not_pile_up() -> None:
    source = stream.stream_of(call(Endpoint.CHAT, messages=USER, n=2), Terms())
    for number in range(1000):
        source.feed(b'data: {"id":"%d","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n' % number)
    assert len(source.reasons) <= 2
    assert len(source.ids) == 2
