"""Reading a request's body, peeking into it, and changing single fields of it without touching the rest.

A body is kept as `dict[str, msgspec.Raw]`: top-level values stay the client's own bytes, so a field nobody here has heard of reaches
the engine as it was sent. Decoding costs under 1 µs for a small body and 75 µs for 200 kB (2026-11-23, 2 shared cores).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sized
from typing import Any, TypeVar

import msgspec

from gateway.errors import BodyTooLarge, BodyTooSlow, ClientGone, InvalidRequest, shortened
from gateway.wire import invalid
from gateway.wire.asgi import Message, Receive
from gateway.wire.encoding import Decoder
from gateway.wire.encoding import decoder as decoder_of
from gateway.wire.memory import BodyLease
from gateway.wire.structure import LARGE_BYTES, MAX_PARAMETERS, PIECE_BYTES, Structure, no_utf8, too_deep, too_many_parameters

Fields = dict[str, msgspec.Raw]
T = TypeVar("T")

_fields = msgspec.json.Decoder(Fields)
_encoder = msgspec.json.Encoder()
_view: Callable[[msgspec.Raw], Sized] = memoryview
# Names and the space between them in a body that is not compact: more is no request, and takes time to look at.
_MAX_NAME, _MAX_SPACE = 1000, 4096
_SPACE = rb"[ \t\r\n]{0,%d}+" % _MAX_SPACE
_NAME = _SPACE + rb'("(?:[^"\\]|\\.){0,%d}+")' % _MAX_NAME + _SPACE + b":" + _SPACE
_BEGIN = re.compile(_SPACE + rb"\{" + _NAME, re.DOTALL)
_NEXT = re.compile(_SPACE + b"," + _NAME, re.DOTALL)
_END = re.compile(_SPACE + rb"\}")
# What a number may go on with.
_DIGITS = frozenset(bytes([byte]) for byte in b"0123456789.eE+-")
# Where the decoder met what it could not read, and an escape that is half of a character.
_BYTE = re.compile(r"\(byte (\d+)\)")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


async def read(
    receive: Receive, limit_bytes: int, limit_s: float, declared: bytes | None, lease: BodyLease | None = None, encoding: bytes = b""
) -> bytes:
    """The whole request body, a large one looked through on the way (`structure`), a compressed one (`encoding`) as what it means.

    `lease` counts what it takes. Raises BodyTooLarge (before reading when content-length says so), BodyTooSlow, ClientGone,
    UnsupportedEncoding, InvalidRequest for what a large or a compressed body may not hold, and what the lease raises.
    """
    if declared is not None and declared.isdigit():
        size = int(declared)
        if size > limit_bytes:
            raise BodyTooLarge(limit_bytes)
        if lease is not None:
            lease.grow(size)
    decoder = decoder_of(encoding) if encoding else None
    try:
        async with asyncio.timeout(limit_s):
            message = await receive()
            if decoder is None and message["type"] == "http.request" and not message.get("more_body"):
                only: bytes = message.get("body", b"")
                if len(only) <= LARGE_BYTES:
                    if len(only) > limit_bytes:
                        raise BodyTooLarge(limit_bytes)
                    if lease is not None and declared is None:
                        lease.grow(len(only))
                    return only
            return await _read(message, receive, limit_bytes, _Collected(limit_bytes, lease), decoder)
    except TimeoutError:
        raise BodyTooSlow(limit_s) from None


async def _read(message: Message, receive: Receive, limit_bytes: int, collected: _Collected, decoder: Decoder | None) -> bytes:
    size = 0
    while True:
        if message["type"] == "http.disconnect":
            raise ClientGone
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > limit_bytes:
            raise BodyTooLarge(limit_bytes)
        if decoder is None:
            await collected.add(part)
        else:
            await _decode(part, decoder, collected)
        if not message.get("more_body"):
            return await collected.end(decoder)
        message = await receive()


async def _decode(part: bytes, decoder: Decoder, collected: _Collected) -> None:
    if collected.refused is not None:
        return
    try:
        for at in range(0, len(part), PIECE_BYTES):
            decoder.feed(part[at : at + PIECE_BYTES])
            while piece := decoder.take():
                if not await collected.add(piece):
                    return
    except BodyTooLarge:
        raise
    except InvalidRequest as error:
        collected.refuse(error)


class _Collected:
    """A body that comes in pieces, and what it has been found to hold so far.

    One that is refused for what it holds is read to its end without being kept: who is still sending would not see the answer.
    """

    __slots__ = ("_content", "_lease", "_limit_bytes", "_seen", "_structure", "refused")

    def __init__(self, limit_bytes: int, lease: BodyLease | None) -> None:
        self._limit_bytes = limit_bytes
        self._lease = lease
        self._content = bytearray()  # one, however small the pieces are that a client sends
        self._structure = Structure()
        self._seen = 0
        self.refused: InvalidRequest | None = None

    async def add(self, part: bytes) -> bool:
        """Some more; False where it is not kept any longer. Raises BodyTooLarge, and what the lease raises."""
        if self.refused is not None:
            return False
        content = self._content
        size = len(content) + len(part)
        if size > self._limit_bytes:
            raise BodyTooLarge(self._limit_bytes)
        if self._lease is not None:
            self._lease.grow(size)
        content += part
        while size > LARGE_BYTES and size - self._seen >= PIECE_BYTES:
            if not self._look():
                return False
            await asyncio.sleep(0)
        return True

    async def end(self, decoder: Decoder | None) -> bytes:
        """The whole body; raises InvalidRequest."""
        if self.refused is not None:
            raise self.refused
        large = len(self._content) > LARGE_BYTES
        if large:
            self._structure.feed(self._piece())
            self._structure.end()
            await asyncio.sleep(0)
        if decoder is not None:
            decoder.end()
        whole = bytes(self._content)
        self._content.clear()
        if large:
            await asyncio.sleep(0)
        return whole

    def refuse(self, error: InvalidRequest) -> None:
        """Let go of it, and say why at its end."""
        self.refused = error
        self._content.clear()
        if self._lease is not None:
            self._lease.end()

    def _look(self) -> bool:
        try:
            self._structure.feed(self._piece())
        except InvalidRequest as error:
            self.refuse(error)
            return False
        return True

    def _piece(self) -> bytes:
        piece = bytes(memoryview(self._content)[self._seen : self._seen + PIECE_BYTES])
        self._seen += PIECE_BYTES
        return piece


def peek(raw: bytes) -> Fields:
    """The body's top-level fields, values undecoded; raises InvalidRequest for what is not one JSON object in UTF-8, each field once.

    A large one must come from `read`, which has looked through it.
    """
    try:
        if len(raw) <= LARGE_BYTES and not raw.isascii():
            raw.decode()  # msgspec does not look inside the values it skips
        fields = _fields.decode(raw)
    except UnicodeDecodeError as error:
        raise no_utf8(error.start) from None
    except msgspec.ValidationError:
        raise InvalidRequest("The request body must be a JSON object.", code="invalid_json") from None
    except msgspec.DecodeError as error:
        raise _no_json(raw, error) from None
    except RecursionError:
        raise too_deep() from None
    if len(fields) > MAX_PARAMETERS:
        raise too_many_parameters()
    # How long a body without spaces is that holds each of these fields once: one of that length cannot hold one twice.
    if len(raw) != 1 + 4 * len(fields) + sum(map(len, fields)) + sum(map(len, map(_view, fields.values()))):
        _refuse_duplicates(raw, fields)
    return fields


def _no_json(raw: bytes, error: msgspec.DecodeError) -> InvalidRequest:
    words = str(error).removeprefix("JSON is malformed: ")
    if "surrogate" in words or "truncated" in words:
        found = _BYTE.search(words)
        end = int(found[1]) + 1 if found is not None else len(raw)
        lone = _SURROGATE.search(raw, max(0, end - 16), end)
        if lone is not None:
            words = f"half of a surrogate pair ({lone[0].decode()}, byte {lone.start()}) is no character"
    return InvalidRequest(f"The request body is not valid JSON: {words}.", code="invalid_json")


def _refuse_duplicates(raw: bytes, fields: Fields) -> None:
    """Raises InvalidRequest for a field that is written twice: two parsers could read two different requests. Only spaces, escapes in
    names, or a duplicate bring a body here; what OpenAI's SDKs send never pays it.

    Goes from name to name. Of a name that is written twice `fields` holds the last value: at the first one something else stands, or a
    number that goes on, or the same, and then the name is met again.
    """
    met: set[str] = set()
    end = 0
    found = _BEGIN.match(raw)
    while found is not None:
        start = found.end()
        if raw[start : start + 1].isspace():
            break
        name: str = msgspec.json.decode(found[1])
        value = fields[name]
        end = start + len(memoryview(value))
        if name in met or msgspec.Raw(memoryview(raw)[start:end]) != value or raw[end : end + 1] in _DIGITS:
            raise _twice(name)
        met.add(name)
        found = _NEXT.match(raw, end)
    if fields and not (found is None and _END.match(raw, end)):
        raise InvalidRequest(
            f"Parameters have names of at most {_MAX_NAME} characters, and at most {_MAX_SPACE} spaces between them.", code="invalid_json"
        )


def _twice(name: str) -> InvalidRequest:
    return InvalidRequest(f"The parameter '{shortened(name)}' is given twice.", param=shortened(name), code="invalid_json")


def decode(raw: bytes | msgspec.Raw, decoder: msgspec.json.Decoder[T], inside: str = "") -> T:
    """A body (or the parameter `inside`) as what `decoder` makes of it; raises InvalidRequest naming what is wrong and what is accepted."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise invalid.explain(str(error), decoder.type, inside) from None
    except msgspec.DecodeError as error:
        raise _no_json(bytes(raw), error) from None
    except RecursionError:
        raise too_deep() from None


def splice(fields: Fields, changes: dict[str, Any]) -> bytes:
    """The body again as JSON with `changes` set; every other value is the client's own bytes."""
    return _encoder.encode({**fields, **changes})


def encode(value: Any) -> msgspec.Raw:
    """A value as raw JSON, for `splice`."""
    return msgspec.Raw(_encoder.encode(value))
