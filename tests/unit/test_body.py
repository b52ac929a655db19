"""Peeking and splicing: every byte that is not ours stays the client's."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import BodyTooLarge, BodyTooSlow, ClientGone, InvalidRequest
from gateway.wire import body
from gateway.wire.asgi import Receive

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
    "raw",
    [
        b'{"model":"a","model":"b"}',
        b'{"model":"a","x":1,"model":"a"}',
        b'{ "model": "a", "model" : "b" }',
        b'{"model":"a","mod\\u0065l":"b"}',
        b'{"model":"a","n":%s,"model":"b"}' % (b"9" * 5000),
    ],
)
def test_a_field_that_is_given_twice_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest, match="'model' is given twice") as refused:
        body.peek(raw)
    assert refused.value.param == "model"


@given(st.dictionaries(st.text(max_size=8), JSON, max_size=6), st.booleans(), st.booleans())
def test_a_body_that_holds_each_field_once_is_never_taken_for_one_that_does_not(
    sent: dict[str, Any], compact: bool, ascii_only: bool
) -> None:
    raw = json.dumps(sent, separators=(",", ":") if compact else None, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        raw.decode()
    except UnicodeDecodeError:
        return
    assert set(body.peek(raw)) == set(sent)


@given(st.dictionaries(st.text(min_size=1, max_size=8), JSON, min_size=1, max_size=6), st.data())
def test_a_duplicate_is_found_wherever_it_stands(sent: dict[str, Any], data: st.DataObject) -> None:
    pairs = [(name, json.dumps(value)) for name, value in sent.items()]
    twice = data.draw(st.sampled_from(pairs))
    pairs.insert(data.draw(st.integers(0, len(pairs))), (twice[0], data.draw(JSON.map(json.dumps))))
    raw = ("{" + ",".join(f"{json.dumps(name)}:{value}" for name, value in pairs) + "}").encode()
    with pytest.raises(InvalidRequest, match="given twice"):
        body.peek(raw)


def _messages(*messages: dict[str, Any]) -> Receive:
    queue = list(messages)

    async def receive() -> dict[str, Any]:
        return queue.pop(0)

    return receive


def _part(content: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": content, "more_body": more}


def test_a_body_in_pieces_is_joined() -> None:
    assert asyncio.run(body.read(_messages(_part(b"ab"), _part(b"c", False)), 10, 5.0, None)) == b"abc"


@pytest.mark.parametrize("declared", [b"11", None])
def test_a_body_over_the_limit_is_refused(declared: bytes | None) -> None:
    with pytest.raises(BodyTooLarge):
        asyncio.run(body.read(_messages(_part(b"123456"), _part(b"78901"), _part(b"", False)), 10, 5.0, declared))


def test_a_client_that_leaves_while_sending_is_gone() -> None:
    with pytest.raises(ClientGone):
        asyncio.run(body.read(_messages(_part(b"12"), {"type": "http.disconnect"}), 10, 5.0, None))


def test_a_body_that_never_ends_is_given_up() -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return _part(b"x")

    with pytest.raises(BodyTooSlow) as slow:
        asyncio.run(body.read(receive, 1 << 20, 0.1, None))
    assert slow.value.status == 408
