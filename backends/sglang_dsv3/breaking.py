"""Requests that SGLang 0.5.23 neither takes nor refuses: its models break on them, and the answer is a 500 that looks like a sick host.

Found by asking them (tests/engine/test_oracle.py). What is refused here is nobody's request; whoever sends it shall not be able to have
one host after the other taken out.
"""

from __future__ import annotations

import msgspec

from gateway.errors import InvalidRequest
from gateway.plugin import Call, Endpoint

# Parameters without which it breaks on nothing that is known.
SUSPECTS = frozenset(["response_format", "reasoning"])
_NONE, _ABSENT = msgspec.Raw(b"null"), msgspec.Raw(b"{}")
# Longer values are never empty.
_SHORT = 16
# Python's largest float has 309 digits.
_MAX_DIGITS = 308


class _Format(msgspec.Struct):
    type: msgspec.Raw = _NONE
    json_schema: msgspec.Raw = _NONE
    schema: msgspec.Raw = _NONE


class _Schema(msgspec.Struct):
    properties: msgspec.Raw = _ABSENT


class _Properties(msgspec.Struct):
    strict: msgspec.Raw = _NONE


class _Reasoning(msgspec.Struct):
    effort: msgspec.Raw = _NONE
    reasoning_effort: msgspec.Raw = _NONE


_format = msgspec.json.Decoder(_Format)
_schema = msgspec.json.Decoder(_Schema)
_properties = msgspec.json.Decoder(_Properties)
_reasoning = msgspec.json.Decoder(_Reasoning)


def refuse(call: Call) -> None:
    """Raises InvalidRequest for a request on which the engine would break."""
    # /tokenize makes a chat of messages.
    if call.endpoint is Endpoint.CHAT or (call.endpoint is Endpoint.TOKENIZE and "messages" in call.fields):
        if "response_format" in call.fields:
            _check_format(call.fields["response_format"])
        if "reasoning" in call.fields and _is_object(call.fields["reasoning"]):
            _check_effort(call.fields["reasoning"])


def _check_format(value: msgspec.Raw) -> None:
    """A schema by its old name is looked into without asking what it is."""
    if not _is_object(value):
        raise _wrong("response_format")
    found = _format.decode(value)
    if len(memoryview(found.type)) > _SHORT or msgspec.json.decode(found.type) != "json_schema":
        return
    if not _is_empty(found.json_schema) or _is_empty(found.schema):
        return
    if not _is_object(found.schema):
        raise _wrong("response_format.schema")
    properties = _schema.decode(found.schema).properties
    if not _is_object(properties):
        raise _wrong("response_format.schema.properties")
    strict = _properties.decode(properties).strict
    if not _is_object(strict) and not _is_empty(strict):
        raise _wrong("response_format.schema.properties.strict")


def _check_effort(value: msgspec.Raw) -> None:
    found = _reasoning.decode(value)
    for effort in (found.effort, found.reasoning_effort):
        if len(memoryview(effort)) > _MAX_DIGITS and bytes(effort).lstrip(b"-").isdigit():
            message = "Invalid value for 'reasoning.effort': the number is too large."
            raise InvalidRequest(message, param="reasoning.effort", code="invalid_value")


def _is_object(value: msgspec.Raw) -> bool:
    return memoryview(value)[0] == ord("{")


def _is_empty(value: msgspec.Raw) -> bool:
    """As Python's `not`."""
    return len(memoryview(value)) <= _SHORT and not msgspec.json.decode(value)


def _wrong(place: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid type for '{place}': expected object.", param=place, code="invalid_type")
