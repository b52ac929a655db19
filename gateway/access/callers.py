"""Who has called: when last, to the minute, and of those who come with a token what they may, since no list of keys says so.

Workers note it in their own memory and tell it with their reports; the parent keeps it. No request waits for it, and none writes it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from gateway.config import Allowance

MINUTE = 60


class TokenCaller(Allowance, frozen=True, kw_only=True):
    """Who came with a token, and what that said of it."""

    name: str


class Calls(msgspec.Struct, frozen=True):
    """What a worker has noted since its last report: when callers have called (seconds since 1970), quotas that refused a request (a
    limit's key with its period), and holders of tokens that were not known before."""

    at: dict[str, float] = {}
    exhausted: list[str] = []
    tokens: list[TokenCaller] = []


class Known(NamedTuple):
    """What is known of all of them: the minute of the last call (seconds since 1970), and who comes with tokens, by name."""

    at: Mapping[str, int]
    tokens: Mapping[str, TokenCaller]


def minute(at: float) -> str:
    """For people, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime(at))
