"""The body of an error, once: as it is sent, as the OpenAPI document shows it, and in whose words an endpoint's clients want it."""

from __future__ import annotations

import enum

import msgspec

Struct = msgspec.Struct


class Shape(enum.Enum):
    """Whose words an endpoint's errors are told in: its clients parse no other."""

    OPENAI = "openai"
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"


class ErrorDetail(Struct):
    """What is wrong, and where."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Struct):
    """Every error."""

    error: ErrorDetail


class ResponsesErrorEvent(Struct, tag_field="type", tag="error"):
    """The last event of a stream of `/v1/responses` that broke off: OpenAI's own members, and `error` beside them, without which
    openai-python takes the event for one of many."""

    code: str | None
    message: str
    param: str | None
    sequence_number: int
    error: ErrorDetail


class AnthropicErrorDetail(Struct):
    """What is wrong."""

    type: str
    message: str


class AnthropicError(Struct, tag_field="type", tag="error"):
    """Every error of `/v1/messages`."""

    error: AnthropicErrorDetail
    request_id: str
