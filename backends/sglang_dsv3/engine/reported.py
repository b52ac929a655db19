"""What a running SGLang says of its own memory, for an agent that shows it beside the plan."""

from __future__ import annotations

import msgspec
from aiohttp import ClientSession


class Reported(msgspec.Struct, frozen=True):
    """Of one rank, in GiB as SGLang counts them, and of the engine, in tokens."""

    weights_gib: float
    kv_gib: float
    kv_tokens: int


class _Usage(msgspec.Struct):
    weight: float
    kvcache: float
    token_capacity: int


class _State(msgspec.Struct):
    memory_usage: _Usage


class _Info(msgspec.Struct):
    internal_states: list[_State]


async def reported(session: ClientSession, url: str, key: str | None) -> Reported:
    """Asked once an engine is ready. Raises what the session does, OSError, msgspec.DecodeError and IndexError."""
    headers = {"authorization": f"Bearer {key}"} if key is not None else {}
    async with session.get(f"{url}/server_info", headers=headers) as answer:
        found = msgspec.json.decode(await answer.read(), type=_Info).internal_states
    first = found[0].memory_usage
    # One state for each group of ranks that has a cache of its own.
    return Reported(first.weight, first.kvcache, sum(state.memory_usage.token_capacity for state in found))
