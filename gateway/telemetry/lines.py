"""The line of a request as JSON. Apart from `log`, since what is compiled may hold no structs of msgspec's.

docs/observability.md shows the fields; what a request has no word for is left out.
"""

from __future__ import annotations

import msgspec


class Phases(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Milliseconds by phase, in the order and by the names of `record.PHASES`; those it never was in are 0."""

    read: float = 0.0
    limits: float = 0.0
    queue: float = 0.0
    retry: float = 0.0
    connect: float = 0.0
    first_token: float = 0.0
    generate: float = 0.0
    answer: float = 0.0
    client: float = 0.0


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
