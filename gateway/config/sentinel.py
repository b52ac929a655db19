"""The section `sentinel`: which answers are looked at, and what is done about a host whose answers are bad."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from gateway.config.vocabulary import Section, Share


class Sentinel(Section, frozen=True):
    """Bad output is noticed; [sentinel](sentinel.md) says by which rules, and how hosts are compared."""

    share: Annotated[Share, Meta(description="of the answers so many are looked at; 0 is none ...")] = 1.0
    per_second: Annotated[
        int, Meta(ge=1, le=10_000, description="... and no more a second than this, of all workers together (one of each)")
    ] = 20
    cpu_share: Annotated[
        float, Meta(ge=0.001, le=1, description="of one core, what judging may take; what there is no time for is left out")
    ] = 0.05
    window_s: Annotated[float, Meta(ge=60, le=86400, description="hosts are compared by the answers of the last so long")] = 1800.0
    min_sample: Annotated[
        int, Meta(ge=10, le=100_000, description="conversations that a host must have had, and all others together, to be compared")
    ] = 30
    eject: Annotated[
        bool, Meta(description="a host under alert gets nothing while others can; `backends.NAME.health.max_ejected_share` holds")
    ] = False
    reask: Annotated[
        list[Literal["tool_calls", "empty"]],
        Meta(
            description="what is asked once more, of another host, before a byte has reached the client: JSON answers with a broken call "
            "of a tool; empty answers, of streams too"
        ),
    ] = msgspec.field(default_factory=list)
    examples: Annotated[int, Meta(ge=0, le=1000, description="how many bad answers are kept in memory for the operator to read")] = 50
    keep_prompts: Annotated[bool, Meta(description="and with each the beginning of its prompt")] = False
