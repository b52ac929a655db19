"""What people are shown of a host."""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.plugin import Role, Stats


class HostView(msgspec.Struct, frozen=True):
    """A host as `/admin/hosts` shows it."""

    id: str
    backend: str
    weight: float
    priority: int
    state: str
    why: str
    in_flight: int
    capacity: int | None
    stats: Stats | None = None
    details: dict[str, Any] = {}
    # Of streams that it has left in the middle: how many went on elsewhere, and how many ended.
    moved: int = 0
    broke: int = 0
    # Its part of a pair.
    role: Role = ""
    # What is wrong with its answers, compared with the others', where it is under alert for that.
    doubt: str = ""
