"""What an operator may set about the health of hosts, and about who is next where all are full."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

# What clients send (2026): OpenRouter's and many others', OpenCode, Codex in two spellings, Claude Code, LiteLLM, Amp, SMG.
SESSION_HEADERS = (
    "x-session-id",
    "x-session-affinity",
    "session_id",
    "session-id",
    "x-claude-code-session-id",
    "x-litellm-session-id",
    "x-amp-thread-id",
    "x-smg-routing-key",
)

_Seconds = Annotated[float, Meta(gt=0, le=86400)]
_Share = Annotated[float, Meta(ge=0, le=1)]


class Health(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """When a host is left alone, and when it is tried again."""

    probe_s: Annotated[_Seconds, Meta(description="how often every host is asked whether it would take a request")] = 1.0
    min_sample: Annotated[int, Meta(ge=1, le=1_000_000, description="a breaker opens when of at least so many outcomes ...")] = 5
    failure_ratio: Annotated[_Share, Meta(description="... this share was the host's fault ...")] = 0.5
    window_s: Annotated[_Seconds, Meta(description="... within so long")] = 10.0
    ejection_s: Annotated[_Seconds, Meta(description="how long it then gets nothing; twice that the next time, with jitter ...")] = 5.0
    max_ejection_s: Annotated[_Seconds, Meta(description="... up to so long")] = 300.0
    max_ejected_share: Annotated[_Share, Meta(description="no more of the weight than this is ever ejected")] = 0.5
    all_sick: Annotated[Literal["try_all", "fail_fast"], Meta(description="with nobody eligible: ask the sick ones, or fail at once")] = (
        "try_all"
    )
    wedged_s: Annotated[_Seconds, Meta(description="a host that streams nothing for so long while others do must prove itself")] = 10.0
    slow_start_s: Annotated[float, Meta(ge=0, le=86400, description="how long a host that comes back takes to get its full share")] = 10.0


# Of the turns of everybody who waits.
Weight = Annotated[float, Meta(ge=0.001, le=1000)]


class Admission(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The queue before full hosts; [limits](limits.md#who-is-next) has the rest."""

    max_queue: Annotated[int, Meta(ge=0, le=100_000, description="how many requests may wait, in each worker and for each backend")] = 1000
    floor: Annotated[
        float,
        Meta(
            ge=0, le=0.1, description="what each lower class (`keys.N.priority`) gets of the places while an upper one waits; 0 is nothing"
        ),
    ] = 0.05


class Affinity(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What tells that requests belong together, for models with `balance: affinity`; [routing](routing.md) has the rest."""

    headers: Annotated[
        list[Annotated[str, Meta(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}$(?!\n)", extra={"accepted": "a header's name"})]],
        Meta(max_length=32, description="headers that name a session; the first one that a request has counts"),
    ] = msgspec.field(default_factory=lambda: list(SESSION_HEADERS))
