"""Peeking and splicing: every byte that is not ours stays the client's."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import calls
from gateway.errors import BodyTooLarge, ClientGone, InvalidRequest
from gateway.plugin import Endpoint
from gateway.wire import body
from gateway.wire.asgi import Receive

pytestmark = pytest.mark.unit

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(min_size=1, max_size=8), JSON, max_size=6))
def test_splicing_changes_only_what_is_named(sent: dict[str, Any]) -> None:
    fields = body.peek(json.dumps(sent).encode())
    spliced = body.splice(fields, {"rid": "r"})
    assert json.loads(spliced) == {**sent, "rid": "r"}


def test_values_keep_the_bytes_they_were_sent_with() -> None:
    raw = b'{"model":"m","temperature":1.0,"x":{"big": 12345678901234567890123, "e":1e2, "u":"\\u00e9"},"messages":[]}'
    spliced = body.splice(body.peek(raw), {"rid": "r"})
    for kept in (b'"temperature":1.0', b'{"big": 12345678901234567890123, "e":1e2, "u":"\\u00e9"}'):
        assert kept in spliced


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b'{"model": "\xff"}', "not valid UTF-8"),
        (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ],
)
def test_what_is_no_json_object_is_refused_in_words(raw: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        body.peek(raw)


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ({"messages": []}, "model"),
        ({"model": "m"}, "messages"),
        ({"model": 5, "messages": []}, "model"),
        ({"model": "m", "messages": [], "stream": "yes"}, "stream"),
        ({"model": "m", "messages": [], "n": 0}, "n"),
        ({"model": "m", "messages": [], "n": 1.5}, "n"),
        ({"model": "m", "messages": [], "stream_options": 3}, "stream_options"),
    ],
)
def test_a_wrong_parameter_is_named(sent: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        calls.parse(Endpoint.CHAT, json.dumps(sent).encode())
    assert refused.value.param == param


def test_nulls_count_as_absent() -> None:
    call = calls.parse(Endpoint.CHAT, b'{"model":"m","messages":[],"n":null,"stream":null,"stream_options":null}')
    assert (call.choices, call.stream, call.show_usage) == (1, False, False)


@pytest.mark.parametrize(
    ("prompt", "n", "choices"), [("a", 1, 1), (["a", "b"], 1, 2), ([1, 2, 3], 1, 1), ([[1], [2]], 3, 6), ("a", 4, 4), ([], 1, 1)]
)
def test_choices_are_counted_over_prompts(prompt: Any, n: int, choices: int) -> None:
    call = calls.parse(Endpoint.COMPLETIONS, json.dumps({"model": "m", "prompt": prompt, "n": n}).encode())
    assert call.choices == choices


def test_a_foreign_content_type_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="application/json"):
        calls.parse(Endpoint.CHAT, b'{"model":"m","messages":[]}', b"text/plain; charset=utf-8")


def _messages(*messages: dict[str, Any]) -> Receive:
    queue = list(messages)

    async def receive() -> dict[str, Any]:
        return queue.pop(0)

    return receive


def _part(content: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": content, "more_body": more}


def test_a_body_in_pieces_is_joined() -> None:
    assert asyncio.run(body.read(_messages(_part(b"ab"), _part(b"c", False)), 10, None)) == b"abc"


@pytest.mark.parametrize("declared", [b"11", None])
def test_a_body_over_the_limit_is_refused(declared: bytes | None) -> None:
    with pytest.raises(BodyTooLarge):
        asyncio.run(body.read(_messages(_part(b"123456"), _part(b"78901"), _part(b"", False)), 10, declared))


def test_a_client_that_leaves_while_sending_is_gone() -> None:
    with pytest.raises(ClientGone):
        asyncio.run(body.read(_messages(_part(b"12"), {"type": "http.disconnect"}), 10, None))
