"""The line of a request as JSON. Apart from `log`, since what is compiled may hold no structs of msgspec's.

docs/observability.md shows the fields; what a request has no word for is left out.
"""

from __future__ import annotations

import msgspec


class Phases(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Milliseconds by phase, in the order and by the names of `record.PHASES`; None for those it never was in, which are left out."""

    read: float | None = None
    limits: float | None = None
    queue: float | None = None
    retry: float | None = None
    connect: float | None = None
    first_token: float | None = None
    generate: float | None = None
    answer: float | None = None
    client: float | None = None


class Line(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What `log.FIELDS` says, after the four that every line has."""

    time: str
    level: str
    logger: str
    message: str
    request_id: str
    trace_id: str
    client: str
    status: int
    outcome: str
    ms: float
    error: str = ""
    cause: str = ""
    key: str = ""
    model: str = ""
    stream: bool | None = None
    host: str = ""
    attempts: int | None = None
    id: str | None = None
    phases_ms: Phases | None = None
    continuations: int = 0
    first_event_ms: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    reasked: str = ""
