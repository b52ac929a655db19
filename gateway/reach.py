"""Whether what a configuration names is there: `penstock check --reach`. Asked from the machine it runs on, which may see another network
than the one that will serve."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

from gateway.access.limits.rules import StoreFailed
from gateway.config import Issuer, Settings, without_secrets
from gateway.plugin import BackendEnv
from gateway.serving import registry

_LIMIT_S = 5.0
# Where a collector listens when its address does not say: for gRPC, and for HTTP.
_COLLECTOR_PORTS = {"grpc": 4317, "http/protobuf": 4318}


async def unreached(settings: Settings, env: BackendEnv) -> AsyncIterator[str]:
    """What is not there, one line each: hosts (and what they serve), their agents, Redis, identity providers, the collector.
    Raises ConfigError."""
    for finding in await registry.rehearse(settings, env, check=True):
        yield finding
    if settings.redis.url is not None and (problem := await _redis(settings)):
        yield f"redis.url: {problem}"
    for number, issuer in enumerate(settings.oidc):
        if problem := await _issuer(issuer):
            yield f"oidc.{number}: {problem}"
    if settings.tracing.on() and (problem := await _collector(settings)):
        yield f"tracing.otlp_endpoint: {problem}"


async def _redis(settings: Settings) -> str:
    from gateway.store.connect import Client

    client = Client(settings.redis)
    try:
        await client.execute("PING")
    except StoreFailed as error:
        return without_secrets(f"does not answer: {error}")
    finally:
        await client.aclose()
    return ""


async def _issuer(issuer: Issuer) -> str:
    """Whether it gives its keys."""
    from gateway.access.issuer import IssuerFailed, fetch

    try:
        await fetch(issuer)
    except IssuerFailed as error:
        return without_secrets(str(error))
    return ""


async def _collector(settings: Settings) -> str:
    """Whether somebody listens there; what it makes of spans shows when there are some."""
    variables = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    endpoint = settings.tracing.otlp_endpoint or next((found for name in variables if (found := os.environ.get(name))), "")
    parts = urlsplit(endpoint if "://" in endpoint else f"//{endpoint or 'localhost'}")
    host, port = parts.hostname or "localhost", parts.port or _COLLECTOR_PORTS[settings.tracing.protocol]
    try:
        async with asyncio.timeout(_LIMIT_S):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return f"nobody answers at {host}:{port} within {_LIMIT_S:g} s"
    except OSError as error:
        number = error.errno or 0  # a name that is not resolved has others, below 0
        return f"nobody answers at {host}:{port}: {os.strerror(number) if number > 0 else error.strerror or error}"
    writer.close()
    return ""
