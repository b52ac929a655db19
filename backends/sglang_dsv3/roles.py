"""Hosts that answer in pairs, as configured and as found: what is wrong with their roles, in one line each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from backends.sglang_dsv3.shapes import ModelInfo
from gateway.errors import ConfigError
from gateway.plugin import Endpoint

# What SGLang 0.5.23 hands on to no other host: the members that bind a pair have no place in these requests.
NOT_PAIRED = frozenset([Endpoint.MESSAGES, Endpoint.SCORE, Endpoint.EMBEDDINGS, Endpoint.RERANK])


def of_host(role: str | None, url: str | None, bootstrap_port: int | None) -> Iterator[ConfigError]:
    """Of one host."""
    if role is not None and url is None:
        yield ConfigError("role", "belongs to a host with a `url`: what the gateway launches answers alone")
    if role == "prefill" and url is not None and url.startswith("unix:"):
        yield ConfigError("role", "a decode host finds its prefill host by name or address, and a socket's path is neither")
    if bootstrap_port is not None and role != "prefill":
        yield ConfigError("bootstrap_port", "belongs to a host with `role: prefill`")


def together(roles: Sequence[str | None], endpoints: Sequence[Endpoint]) -> Iterator[ConfigError]:
    """Of all hosts of a backend. `endpoints`: those that somebody has asked for."""
    if not any(roles):
        return
    for role, other in (("prefill", "decode"), ("decode", "prefill")):
        if role not in roles:
            yield ConfigError("hosts", f"no host has `role: {role}`, and those with `role: {other}` answer nobody without one")
    if None in roles:
        missing = "is missing, and other hosts have one: prefill or decode (hosts that answer alone are a backend of their own)"
        yield ConfigError(f"hosts.{roles.index(None)}.role", missing)
    if beyond := [str(endpoint) for endpoint in endpoints if endpoint in NOT_PAIRED]:
        yield ConfigError("endpoints", f"{', '.join(beyond)}: SGLang's prefill and decode hosts cannot answer that together")


def mismatch(info: ModelInfo, role: str | None) -> str:
    """Why an engine cannot do what its host is here for: half of a pair answers nobody alone, and a whole engine is half of none."""
    told, wanted = info.disaggregation_mode, role or "null"
    if told is None or told == wanted:
        return ""
    words = {"null": "to answer alone", "prefill": "to prefill", "decode": "to decode"}
    return f"its engine was started {words.get(told, told)} (--disaggregation-mode {told}), and it is here {words[wanted]}"
