"""OpenAI's own rules about a request's parameters, for whoever wants them kept where an engine is more lenient."""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.errors import InvalidRequest
from gateway.wire import body, invalid
from gateway.wire.body import Fields
from gateway.wire.structure import LARGE_BYTES

# What OpenAI had before tools, and what came in its place.
DEPRECATED = {"functions": "tools", "function_call": "tool_choice"}
# Of a large body only parameters up to this are looked into: what a decoder makes of the others would take too much at once.
_SMALL_BYTES = 16 << 10


class Rules:
    """The rules of one endpoint: types and ranges as its struct says, and what no struct can say."""

    def __init__(self, request: type[msgspec.Struct]) -> None:
        self._whole: msgspec.json.Decoder[Any] = msgspec.json.Decoder(request)
        self._single: dict[str, msgspec.json.Decoder[Any]] = {
            field.name: msgspec.json.Decoder(field.type) for field in msgspec.structs.fields(request)
        }

    def check(self, raw: bytes, fields: Fields) -> None:
        """Raises InvalidRequest naming the parameter that is wrong and what is accepted."""
        for name, instead in DEPRECATED.items():
            if name in fields:
                raise InvalidRequest(f"'{name}' is not supported any more: use '{instead}'.", param=name, code="unsupported_parameter")
        if len(raw) <= LARGE_BYTES:
            body.decode(raw, self._whole)
        else:
            self._check_small(fields)
        if "top_logprobs" in fields and "logprobs" in self._single:
            wanted = msgspec.json.decode(fields["top_logprobs"])
            if wanted and not ("logprobs" in fields and msgspec.json.decode(fields["logprobs"]) is True):
                raise InvalidRequest("'top_logprobs' needs 'logprobs': true.", param="top_logprobs", code="invalid_value")

    def _check_small(self, fields: Fields) -> None:
        for name, value in fields.items():
            decoder = self._single.get(name)
            if decoder is not None and len(memoryview(value)) <= _SMALL_BYTES:
                try:
                    decoder.decode(value)
                except msgspec.ValidationError as error:
                    raise invalid.explain(str(error), decoder.type, name) from None
