"""One render for everything, and nothing of the inside in it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from gateway import errors
from gateway.wire.error import AnthropicError, Error, ResponsesErrorEvent, Shape


def test_the_body_has_openais_four_members() -> None:
    status, headers, body = errors.render(errors.UnknownModel("x", ["a", "b"]), "req_1")
    assert status == 404
    assert json.loads(body) == {
        "error": {
            "message": "The model 'x' does not exist. Served here: 'a', 'b'.",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }
    assert dict(headers)[b"content-length"] == str(len(body)).encode()


@pytest.mark.parametrize(("promise_s", "header"), [(0.2, b"1"), (7.6, b"8"), (1000, b"60")])
def test_retry_after_is_whole_seconds_that_the_sdks_honour(promise_s: float, header: bytes) -> None:
    _, headers, _ = errors.render(errors.Unavailable("busy", retry_after_s=promise_s))
    assert dict(headers)[b"retry-after"] == header


def test_a_foreign_exception_keeps_its_words_to_itself() -> None:
    error = errors.as_gateway_error(RuntimeError("/etc/secret"))
    status, _, body = errors.render(error, "req_1")
    assert status == 500
    assert b"secret" not in body
    assert b"req_1" in body
    assert "secret" in (error.detail or "")


def test_an_event_is_one_line_that_the_sdks_raise_on() -> None:
    event = errors.event(errors.BadGateway("gone"), "req_1")
    assert event.startswith(b'data: {"error":{')
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2


@pytest.mark.parametrize(
    ("shape", "whole", "event"),
    [
        (Shape.OPENAI, Error, Error),
        (Shape.RESPONSES, Error, ResponsesErrorEvent),
        (Shape.ANTHROPIC, AnthropicError, AnthropicError),
    ],
)
def test_every_shape_is_the_documented_one(shape: Shape, whole: Any, event: Any) -> None:
    refused = errors.UnknownModel("x", [])
    assert msgspec.json.decode(errors.render(refused, "req_1", shape)[2], type=whole).error.message == refused.message
    data = errors.event(refused, "req_1", shape, 7).split(b"data: ")[1]
    assert msgspec.json.decode(data, type=event).error.message == refused.message


LONG = "x\x1b[2J" * 100_000


@pytest.mark.parametrize(
    "error",
    [
        errors.UnknownModel(LONG, ["a"]),
        errors.UnknownUrl("GET", LONG),
        errors.MethodNotAllowed(LONG, LONG, ["POST"]),
        errors.InvalidRequest(LONG, param=LONG, detail=LONG),
        errors.as_gateway_error(RuntimeError(LONG)),
    ],
)
def test_what_others_wrote_is_bounded_in_every_error(error: errors.GatewayError) -> None:
    _, _, body = errors.render(error, "req_1")
    assert len(body) < 4 * errors.MAX_MESSAGE
    assert len(error.detail or "") <= errors.MAX_MESSAGE
    assert len(error.param or "") <= errors.MAX_QUOTED


def test_a_long_name_is_shortened_in_words_and_made_visible() -> None:
    message = errors.UnknownModel("m" * 300, []).message
    assert message == f"The model '{'m' * 256}... (300 characters)' does not exist. Served here: none."
    assert errors.shortened("a\x1b[2J\u2028\n\u00e9") == "a\\x1b[2J\\u2028\\n\u00e9"


def test_a_missing_key_is_told_apart_from_a_wrong_one() -> None:
    wrong, missing = errors.InvalidKey(), errors.InvalidKey(sent=False)
    assert (wrong.status, wrong.code, wrong.message.split(".")[0]) == (401, "invalid_api_key", "Incorrect API key provided")
    assert (missing.status, missing.code, missing.message.split(".")[0]) == (401, "missing_api_key", "No API key provided")
    assert wrong.headers == missing.headers == [(b"www-authenticate", b"Bearer")]
