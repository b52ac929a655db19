"""Reading a request's body, peeking into it, and changing single fields of it without touching the rest.

A body is kept as `dict[str, msgspec.Raw]`: top-level values stay the client's own bytes, so a field nobody here has heard of reaches
the engine as it was sent. Decoding costs under 1 µs for a small body and 75 µs for 200 kB (2026-11-23, 2 shared cores).
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from gateway.errors import BodyTooLarge, ClientGone, InvalidRequest
from gateway.wire.asgi import Receive

Fields = dict[str, msgspec.Raw]
T = TypeVar("T")

_fields = msgspec.json.Decoder(Fields)
_encoder = msgspec.json.Encoder()


async def read(receive: Receive, limit_bytes: int, declared: bytes | None) -> bytes:
    """The whole request body, at most `limit_bytes`; raises BodyTooLarge, before reading when content-length says so, or ClientGone."""
    if declared is not None and declared.isdigit() and int(declared) > limit_bytes:
        raise BodyTooLarge(limit_bytes)
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
    """The body's top-level fields, values undecoded; raises InvalidRequest for what is not a JSON object in UTF-8."""
    try:
        if not raw.isascii():
            raw.decode()  # msgspec does not look inside the values it skips
        return _fields.decode(raw)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The request body is not valid UTF-8 (byte {error.start}).", code="invalid_json") from None
    except msgspec.ValidationError:
        raise InvalidRequest("The request body must be a JSON object.", code="invalid_json") from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}.", code="invalid_json") from None
    except RecursionError:
        raise InvalidRequest("The request body is nested too deeply.", code="invalid_json") from None


def value(fields: Fields, name: str, kind: type[T], accepted: str) -> T | None:
    """One field decoded as `kind`; None when absent or null. Raises InvalidRequest naming the field and `accepted`."""
    raw = fields.get(name)
    if raw is None or bytes(raw) == b"null":
        return None
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequest(f"Invalid type for '{name}': expected {accepted}.", param=name, code="invalid_type") from None


def splice(fields: Fields, changes: dict[str, Any]) -> bytes:
    """The body again as JSON with `changes` set; every other value is the client's own bytes."""
    return _encoder.encode({**fields, **changes})


def encode(value: Any) -> msgspec.Raw:
    """A value as raw JSON, for `splice`."""
    return msgspec.Raw(_encoder.encode(value))
