"""One render for everything, and nothing of the inside in it."""

from __future__ import annotations

import json

import pytest

from gateway import errors


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
