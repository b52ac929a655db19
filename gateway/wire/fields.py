"""Single parameters of a request, read as the engine reads them; one that came in another form is put back in its plain one, so that
nobody after us can read it differently."""

from __future__ import annotations

import msgspec

from gateway.errors import MAX_QUOTED, InvalidRequest, shortened
from gateway.wire import lax
from gateway.wire.body import Fields, encode
from gateway.wire.visible import visible

_TRUE, _FALSE = msgspec.Raw(b"true"), msgspec.Raw(b"false")
_KINDS = {b'"': "string", b"{": "object", b"[": "array", b"t": "boolean", b"f": "boolean", b"n": "null"}
# Beyond this a text has more than MAX_QUOTED characters, however they are escaped.
_LONGEST = 12 * MAX_QUOTED
_text = msgspec.json.Decoder(str)
_object = msgspec.json.Decoder(Fields)


def short_text(fields: Fields, name: str) -> str:
    """A name: a text of one character at least. One that is longer than any comes back shortened. Raises InvalidRequest."""
    value = memoryview(fields[name])
    if len(value) > _LONGEST and value[0] == ord('"'):
        return f"{visible(bytes(value[1 : MAX_QUOTED + 1]).decode(errors='replace'))}... ({len(value)} bytes)"
    try:
        found = _text.decode(value)
    except msgspec.ValidationError:
        raise _wrong(fields, name, "string") from None
    if not found:
        raise InvalidRequest(f"Invalid value for '{name}': expected string of length >= 1.", param=name, code="invalid_value")
    return found if len(found) <= MAX_QUOTED else shortened(found)


def flag(fields: Fields, name: str, inside: str = "") -> bool:
    """A truth value; `inside` names the object that the fields are of. Raises InvalidRequest."""
    value = fields[name]
    if value == _TRUE:
        return True
    if value == _FALSE:
        return False
    try:
        found = lax.boolean(bytes(value))
    except ValueError:
        raise _wrong(fields, name, "boolean", inside) from None
    fields[name] = _TRUE if found else _FALSE
    return found


def integer(fields: Fields, name: str) -> int:
    """An integer; raises InvalidRequest."""
    digits = bytes(memoryview(fields[name])[:10])
    if digits.isdigit() and len(digits) < 10:
        return int(digits)
    try:
        found = lax.integer(bytes(fields[name]))
    except ValueError:
        if digits.removeprefix(b"-").isdigit():
            raise InvalidRequest(f"Invalid value for '{name}': the number is too large.", param=name, code="invalid_value") from None
        raise _wrong(fields, name, "integer") from None
    fields[name] = encode(found)
    return found


def at_least(name: str, low: int) -> InvalidRequest:
    """The refusal of a number that is too small."""
    return InvalidRequest(f"Invalid value for '{name}': expected integer >= {low}.", param=name, code="invalid_value")


def at_most(name: str, high: int) -> InvalidRequest:
    """The refusal of a number that is too large."""
    return InvalidRequest(f"Invalid value for '{name}': expected integer <= {high}.", param=name, code="invalid_value")


def array(fields: Fields, name: str) -> None:
    """Raises InvalidRequest where it is none; what is in it is not looked at."""
    if memoryview(fields[name])[0] != ord("["):
        raise _wrong(fields, name, "array")


def is_empty_array(fields: Fields, name: str) -> bool:
    """Whether it is an array without anything in it."""
    value = memoryview(fields[name])
    return len(value) < 100 and bytes(value).translate(None, b" \t\r\n") == b"[]"


def shows_usage(fields: Fields) -> bool:
    """Whether `stream_options` ask for usage; raises InvalidRequest."""
    try:
        options = _object.decode(fields["stream_options"])
    except msgspec.ValidationError:
        raise _wrong(fields, "stream_options", "object") from None
    value = options.get("include_usage")
    if value is None or bytes(value) == b"null":
        return False
    found = flag(options, "include_usage", "stream_options.")
    if options["include_usage"] is not value:
        fields["stream_options"] = encode(options)
    return found


def _wrong(fields: Fields, name: str, expected: str, inside: str = "") -> InvalidRequest:
    got = _KINDS.get(bytes(memoryview(fields[name])[:1]), "number")
    return InvalidRequest(
        f"Invalid type for '{inside}{name}': expected {expected}, got {got}.", param=f"{inside}{name}", code="invalid_type"
    )
