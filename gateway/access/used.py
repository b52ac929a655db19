"""How a row of the ledger is shown. Apart from it, since what is compiled may hold no structs of msgspec's."""

from __future__ import annotations

import msgspec


class Used(msgspec.Struct, frozen=True):
    """One row as `/admin/usage` shows it."""

    day: str
    key: str
    model: str
    requests: int
    ok: int
    failed: int
    client_gone: int
    lost: int
    limited: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    delivered_tokens: int
    wasted_client_tokens: int
    wasted_host_tokens: int
    estimated_tokens: int
    cost: float
    team: str = ""
