"""The types that settings are made of, and what a section is."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from gateway.config import checks
from gateway.wire import address
from gateway.wire.check import Check

# A pattern's `$` alone would let a line end pass.
END = r"$(?!\n)"

Seconds = Annotated[float, Meta(gt=0, le=86400)]
Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=1, le=(1 << 31) - 1, extra={"accepted": "1 or more"})]
Rate = Annotated[float, Meta(ge=1e-6, le=1e12, extra={"accepted": "above 0 (leave it out for no limit)"})]
Amount = Annotated[int, Meta(ge=1, le=10**12, extra={"accepted": "1 or more (leave it out for no limit)"})]
Money = Annotated[float, Meta(ge=0, le=1e9)]
File = Annotated[str, Meta(min_length=1, max_length=4096)]
Name = Annotated[
    str,
    Meta(
        pattern=f"^[A-Za-z0-9][A-Za-z0-9._@-]{{0,63}}{END}",
        extra={"accepted": "up to 64 letters, digits and . _ @ -, beginning with a letter or digit"},
    ),
]
ModelName = Annotated[str, Meta(min_length=1, max_length=256)]
KeyHash = Annotated[
    str,
    Meta(
        pattern=f"^sha256:[0-9a-f]{{64}}{END}",
        extra={"accepted": "'sha256:' and 64 hex digits (the key itself never stands in the file)"},
    ),
    Check(checks.key_hash, quote=False),
]
HostPort = Annotated[str, Check(address.host_port, "HOST:PORT")]


class Section(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A part of the settings; a key that it does not have is refused."""
