"""One host: its id for people, where it is right now, what it serves, and the connections to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from backends.sglang_dsv3.config import Host
from backends.sglang_dsv3.transport import ConnectFailed, Options, Response, Transport, to_host
from gateway.plugin import ServiceState, Target

PROBE_TIMEOUT_S = 2.0
# How old what we know of a host's weights and size may be.
LOOK_INTERVAL_S = 5.0
# An answer of which we want to know more than this is none that SGLang gives.
MAX_SMALL_BYTES = 64 << 10


class ModelInfo(msgspec.Struct):
    """What of `/model_info` matters here."""

    architectures: list[str] | None = None
    served_model_name: str | None = None
    model_path: str | None = None
    weight_version: str | None = None


class _Load(msgspec.Struct):
    max_running_requests: int = 0
    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    token_usage: float = 0.0
    cache_hit_rate: float = 0.0
    gen_throughput: float = 0.0


class _Loads(msgspec.Struct):
    loads: list[_Load] = []


class Place:
    """One host: its id for people, where it is right now, and the connections to it."""

    options = Options()

    def __init__(
        self, name: str, index: int, host: Host, services: Callable[[str], ServiceState | None], canary: Mapping[str, float] | None = None
    ) -> None:
        self.host = host
        self._canary = canary or {}
        self._share = 1.0
        self._details: dict[str, Any] = {}
        self._agent: Transport | None = None
        self._capacity = host.max_in_flight
        self._weights = ""
        self._looked_at = float("-inf")
        self._url = host.url.rstrip("/") if host.url is not None else None
        self._service = service_name(name, index)
        self._services = services
        self._seen: ServiceState | None = None
        self._seen_at = 0.0
        self.served_name: str | None = None
        self._transport: tuple[str, Transport] | None = None
        self.id = self._url.split("://", 1)[1] if self._url is not None else self._service

    @property
    def url(self) -> str:
        """Base URL; empty while a launched engine has none."""
        if self._url is not None:
            return self._url
        state = self._services(self._service)
        return state.url if state is not None else ""

    def transport(self) -> Transport:
        """The way to it; raises ConnectFailed while it is nowhere. A launched engine is somewhere else after each start."""
        url = self.url
        if not url:
            raise ConnectFailed("it is not there yet")
        if self._transport is None or self._transport[0] != url:
            if self._transport is not None:
                asyncio.get_running_loop().create_task(self._transport[1].aclose())
            self._transport = (url, to_host(url, self.options))
        return self._transport[1]

    async def get(self, path: str, limit_s: float = PROBE_TIMEOUT_S) -> tuple[int, bytes]:
        """Status and body of a small answer; raises ConnectFailed, ConnectionLost or TimeoutError."""
        async with asyncio.timeout(limit_s):
            response = await self.transport().request("GET", path, connect_s=PROBE_TIMEOUT_S)
            try:
                return response.status, await small(response)
            finally:
                response.close()

    async def agent(self, path: str) -> tuple[int, bytes]:
        """The same from the agent beside it."""
        assert self.host.agent is not None
        if self._agent is None:
            self._agent = to_host(self.host.agent.rstrip("/"), Options())
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            response = await self._agent.request("GET", path, connect_s=PROBE_TIMEOUT_S)
            try:
                return response.status, await small(response)
            finally:
                response.close()

    async def ready(self) -> bool:
        """Whether it would take a request: its agent's word where it has one, which says so before SGLang is told to go. Raises what `get`
        raises."""
        if self.host.agent is None:
            return (await self.get("/ready"))[0] != 503
        ready = (await self.agent("/ready"))[0] == 200
        if time.monotonic() - self._looked_at >= LOOK_INTERVAL_S or not ready:
            self._details = msgspec.json.decode((await self.agent("/status"))[1], type=dict[str, Any])
        return ready

    async def aclose(self) -> None:
        """Close its connections."""
        if self._agent is not None:
            await self._agent.aclose()
        if self._transport is not None:
            await self._transport[1].aclose()

    def target(self) -> Target:
        """A snapshot for the core. A launched engine is ready when its supervisor says so, a host with a URL until a probe fails."""
        if self._url is not None:
            return self._as_target(True, "", 5.0)
        state = self._services(self._service) or ServiceState()
        if state is not self._seen:
            self._seen, self._seen_at = state, time.monotonic()
        waited_s = time.monotonic() - self._seen_at
        wait_s = max(state.eta_s - waited_s, waited_s / 2, 1.0)  # the longer it is overdue, the less its estimate was worth
        return self._as_target(state.state == "ready" and bool(state.url), _words(state), wait_s)

    def _as_target(self, ready: bool, reason: str, retry_after_s: float) -> Target:
        weight = self.host.weight * self._share
        return Target(self.id, weight, ready, reason, retry_after_s, self.host.priority, self._capacity, self._weights, self._details)

    async def look(self, model_info: Callable[[Place], Awaitable[ModelInfo]]) -> None:
        """What it serves and how much at once, asked every LOOK_INTERVAL_S; both may change while it runs."""
        if time.monotonic() - self._looked_at < LOOK_INTERVAL_S:
            return
        info = await model_info(self)
        self._weights = f"{info.model_path}@{info.weight_version}"
        self._share = self._canary.get(info.weight_version or "", 1.0)
        self._details = {**self._details, "model_path": info.model_path, "weight_version": info.weight_version}
        status, content = await self.get("/v1/loads")
        if status == 200:
            loads = msgspec.json.decode(content, type=_Loads).loads
            self._details["engine"] = _numbers(loads)
            if self.host.max_in_flight is None:
                self._capacity = sum(load.max_running_requests for load in loads) or None
        self._looked_at = time.monotonic()

    def lost(self) -> None:
        """It did not answer: whoever comes back may serve something else."""
        self._looked_at, self._weights = float("-inf"), ""


def _numbers(loads: list[_Load]) -> dict[str, float]:
    """What the engine says of itself, its data-parallel ranks together. A batch is only worth judging while somebody waits for it."""
    running, waiting = sum(load.num_running_reqs for load in loads), sum(load.num_waiting_reqs for load in loads)
    most, ranks = sum(load.max_running_requests for load in loads), max(1, len(loads))
    found = {
        "running_requests": running,
        "queued_requests": waiting,
        "max_running_requests": most,
        "kv_usage_ratio": sum(load.token_usage for load in loads) / ranks,
        "cache_hit_ratio": sum(load.cache_hit_rate for load in loads) / ranks,
        "generation_tokens_per_second": sum(load.gen_throughput for load in loads),
    }
    return {**found, "batching_efficiency_ratio": running / most} if waiting and most else found


def _words(state: ServiceState) -> str:
    detail = f" ({state.detail})" if state.detail else ""
    if state.state in ("starting", "loading"):
        return f"The engine is loading{detail}."
    if state.state == "restarting":
        return f"The engine is loading again after it ended{detail}."
    if state.state == "failed":
        return f"The engine cannot start{detail}."
    return f"The engine is {state.state}{detail}."


def service_name(backend: str, index: int) -> str:
    """The name under which the parent runs a launched engine."""
    return f"{backend}/local-{index}"


async def small(response: Response) -> bytes:
    """A body of which no more than MAX_SMALL_BYTES are of interest."""
    content = b""
    while len(content) < MAX_SMALL_BYTES and (part := await response.read()):
        content += part
    return content[:MAX_SMALL_BYTES]
