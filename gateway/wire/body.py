"""Reading a request's body, peeking into it, and changing single fields of it without touching the rest.

A body is kept as `dict[str, msgspec.Raw]`: top-level values stay the client's own bytes, so a field nobody here has heard of reaches
the engine as it was sent. Decoding costs under 1 µs for a small body and 75 µs for 200 kB (2026-11-23, 2 shared cores).
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar

import msgspec

from gateway.errors import BodyTooLarge, BodyTooSlow, ClientGone, InvalidRequest
from gateway.wire import invalid
from gateway.wire.asgi import Receive

Fields = dict[str, msgspec.Raw]
T = TypeVar("T")

_fields = msgspec.json.Decoder(Fields)
_encoder = msgspec.json.Encoder()


async def read(receive: Receive, limit_bytes: int, limit_s: float, declared: bytes | None) -> bytes:
    """The whole request body; raises BodyTooLarge (before reading when content-length says so), BodyTooSlow or ClientGone."""
    if declared is not None and declared.isdigit() and int(declared) > limit_bytes:
        raise BodyTooLarge(limit_bytes)
    try:
        async with asyncio.timeout(limit_s):
            return await _read(receive, limit_bytes)
    except TimeoutError:
        raise BodyTooSlow(limit_s) from None


async def _read(receive: Receive, limit_bytes: int) -> bytes:
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body"):
        only: bytes = message.get("body", b"")
        if len(only) > limit_bytes:
            raise BodyTooLarge(limit_bytes)
        return only
    parts: list[bytes] = []
    size = 0
    while True:
        if message["type"] == "http.disconnect":
            raise ClientGone
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > limit_bytes:
            raise BodyTooLarge(limit_bytes)
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)
        message = await receive()


def peek(raw: bytes) -> Fields:
    """The body's top-level fields, values undecoded; raises InvalidRequest for what is not one JSON object in UTF-8, each field once."""
    try:
        if not raw.isascii():
            raw.decode()  # msgspec does not look inside the values it skips
        fields = _fields.decode(raw)
        if len(raw) != _compact_length(fields):
            _refuse_duplicates(raw)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The request body is not valid UTF-8 (byte {error.start}).", code="invalid_json") from None
    except msgspec.ValidationError:
        raise InvalidRequest("The request body must be a JSON object.", code="invalid_json") from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}.", code="invalid_json") from None
    except RecursionError:
        raise InvalidRequest("The request body is nested too deeply.", code="invalid_json") from None
    return fields


def _compact_length(fields: Fields) -> int:
    """How long a body without spaces is that holds each of these fields once: one of that length cannot hold a duplicate."""
    return 1 + sum(len(name.encode()) + len(memoryview(value)) + 4 for name, value in fields.items())


def _refuse_duplicates(raw: bytes) -> None:
    """Raises InvalidRequest for a field that is written twice: two parsers could read two different requests. Only spaces or a
    duplicate bring a body here (4 us for a small one, 270 us for 240 kB; what the SDKs send never pays it)."""
    names: list[str] = json.loads(raw, object_pairs_hook=_names, parse_int=_ignore, parse_float=_ignore)
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"The parameter '{twice}' is given twice.", param=twice, code="invalid_json")


def _names(pairs: list[tuple[str, Any]]) -> list[str]:
    return [name for name, _ in pairs]


def _ignore(digits: str) -> None:
    return None


def decode(raw: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """The body as what `decoder` makes of it; raises InvalidRequest naming the parameter that is wrong and what is accepted."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise invalid.explain(str(error), decoder.type) from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}.", code="invalid_json") from None
    except RecursionError:
        raise InvalidRequest("The request body is nested too deeply.", code="invalid_json") from None


def given(fields: Fields, name: str) -> bool:
    """Whether a field is there with a value: an explicit null counts as absent."""
    return name in fields and bytes(fields[name]) != b"null"


def splice(fields: Fields, changes: dict[str, Any]) -> bytes:
    """The body again as JSON with `changes` set; every other value is the client's own bytes."""
    return _encoder.encode({**fields, **changes})


def encode(value: Any) -> msgspec.Raw:
    """A value as raw JSON, for `splice`."""
    return msgspec.Raw(_encoder.encode(value))
