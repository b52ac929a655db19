"""One SGLang host: its id for people, where it is right now, what it serves, how it is, and the connections to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from backends.sglang_dsv3 import roles
from backends.sglang_dsv3.config import HostConfig
from backends.sglang_dsv3.kv_events import Subscription
from backends.sglang_dsv3.ranks import Ranks
from backends.sglang_dsv3.shapes import AgentStatus, Cards, Load, Loads, Machine, ModelInfo, Parsers
from backends.sglang_dsv3.transport import ConnectFailed, ConnectionLost, Options, Response, Transport, request, to_host
from gateway.errors import BadGateway
from gateway.plugin import AttemptFailed, Gpu, ServiceState, Stats, Target
from gateway.supervision import once

PROBE_TIMEOUT_S = 2.0
# How old what we know of a host's weights and size may be.
LOOK_INTERVAL_S = 5.0
# An answer of which we want to know more than this is none that SGLang gives.
MAX_SMALL_BYTES = 64 << 10


class EngineHost:
    """One host, launched, named or resolved."""

    def __init__(
        self,
        name: str,
        index: int,
        config: HostConfig,
        services: Callable[[str], ServiceState | None],
        canary: Mapping[str, float] | None = None,
    ) -> None:
        self.config = config
        self.options = Options()
        self.ranks = Ranks()
        self._canary = canary or {}
        self._share = 1.0
        self._details: dict[str, Any] = {}
        # What the engine says of itself, and the agent beside it.
        self._engine = Stats()
        self._machine = Stats()
        self._stats: Stats | None = None
        self._agent: Transport | None = None
        self._capacity = config.max_in_flight
        self._weights = ""
        # What is known of the model; a host that is lost has what it had, until it says otherwise.
        self._context_length: int | None = None
        self._abilities: Mapping[str, bool] = {}
        self._looked_at = float("-inf")
        # What the engine was started for, where that is not what this host is here for.
        self.mismatch = ""
        self._url = config.url.rstrip("/") if config.url is not None else None
        self._service = service_name(name, index)
        self._services = services
        self._seen: ServiceState | None = None
        self._seen_at = 0.0
        self._served_name: str | None = None
        self._transport: tuple[str, Transport] | None = None
        self.id = self._url.split("://", 1)[1] if self._url is not None else self._service
        # How it reads its model's text, and which token ids a prompt ends in that has opened the thinking, once that was asked.
        self.parsers = Parsers()
        self.openings: list[list[int]] | None = None
        # What it says of its cache while it runs, where it is listened to.
        self.events = Subscription(self.id, config.kv_events, config.kv_replay) if config.kv_events is not None else None

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
                once("leaving an engine", self._transport[1].aclose())
            self._transport = (url, to_host(url, self.options))
        return self._transport[1]

    async def get(self, path: str, limit_s: float = PROBE_TIMEOUT_S) -> tuple[int, bytes]:
        """Status and body of a small answer; raises ConnectFailed, ConnectionLost or TimeoutError."""
        async with asyncio.timeout(limit_s):
            response = await request(self.transport(), "GET", path, connect_s=PROBE_TIMEOUT_S)
            try:
                return response.status, await small(response)
            finally:
                response.close()

    async def agent(self, path: str) -> tuple[int, bytes]:
        """The same from the agent beside it."""
        assert self.config.agent is not None
        if self._agent is None:
            self._agent = to_host(self.config.agent.rstrip("/"), Options())
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            response = await request(self._agent, "GET", path, connect_s=PROBE_TIMEOUT_S)
            try:
                return response.status, await small(response)
            finally:
                response.close()

    async def ready(self) -> bool:
        """Whether it would take a request: its agent's word where it has one, which says so before SGLang is told to go. Raises what `get`
        raises."""
        if self.config.agent is None:
            return (await self.get("/ready"))[0] != 503
        ready = (await self.agent("/ready"))[0] == 200
        if time.monotonic() - self._looked_at >= LOOK_INTERVAL_S or not ready:
            status = (await self.agent("/status"))[1]
            self._details = msgspec.json.decode(status, type=dict[str, Any])
            self._machine = _of_machine(msgspec.json.decode(status, type=AgentStatus))
            self._stats = _merged(self._engine, self._machine)
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
            if self.events is not None and state.state != "ready":
                self.events.cache.lost(self._seen_at)
        waited_s = time.monotonic() - self._seen_at
        wait_s = max(state.eta_s - waited_s, waited_s / 2, 1.0)  # the longer it is overdue, the less its estimate was worth
        return self._as_target(state.state == "ready" and bool(state.url), _words(state), wait_s)

    def _as_target(self, ready: bool, reason: str, retry_after_s: float) -> Target:
        weight = self.config.weight * self._share
        # Of several ranks each has a cache of its own, and only the first one's is listened to: that says nothing of the host.
        heard = self.events is not None and self.events.heard and len(self.ranks) < 2
        return Target(
            self.id,
            weight,
            ready,
            reason,
            retry_after_s,
            self.config.priority,
            self._capacity,
            self._weights,
            _hearing(self._stats, self.events) if heard and self.events is not None else self._stats,
            max(0.0, self._looked_at),
            self._details,
            self._context_length,
            self._abilities,
            self.config.role or "",
            self.events.cache.since if heard and self.events is not None else 0.0,
        )

    async def model_info(self) -> ModelInfo:
        """What it serves; raises what `get` raises, and msgspec.DecodeError."""
        status, content = await self.get("/model_info")
        if status != 200:
            raise ConnectionLost(f"status {status}")
        return msgspec.json.decode(content, type=ModelInfo)

    async def served_name(self) -> str:
        """What the engine itself calls its model, asked once; raises AttemptFailed."""
        if self._served_name is None:
            try:
                self._served_name = (await self.model_info()).served_model_name or ""
            except (ConnectFailed, ConnectionLost, TimeoutError, msgspec.DecodeError) as error:
                unknown = BadGateway("The engine does not say what it serves.", detail=f"{self.id}: {error!r}")
                raise AttemptFailed("broken", unknown) from error
        return self._served_name

    async def look(self) -> None:
        """What it serves and how much at once, asked every LOOK_INTERVAL_S; both may change while it runs."""
        if time.monotonic() - self._looked_at < LOOK_INTERVAL_S:
            return
        info = await self.model_info()
        self._weights = f"{info.model_path}@{info.weight_version}"
        self._share = self._canary.get(info.weight_version or "", 1.0)
        self._details = {**self._details, "model_path": info.model_path, "weight_version": info.weight_version}
        self._abilities = _abilities(info)
        self.parsers = Parsers(info.reasoning_parser or "", info.tool_call_parser or "")
        self.mismatch = roles.mismatch(info, self.config.role)
        status, content = await self.get("/v1/models")
        lengths = [card.max_model_len for card in msgspec.json.decode(content, type=Cards).data] if status == 200 else []
        self._context_length = min((length for length in lengths if length), default=None)
        status, content = await self.get("/v1/loads")
        if status == 200:
            loads = msgspec.json.decode(content, type=Loads).loads
            self.ranks.saw(loads)
            self._engine = _of_engine(loads)
            self._stats = _merged(self._engine, self._machine)
            if self.config.max_in_flight is None:
                self._capacity = sum(load.max_running_requests for load in loads) or None
        self._looked_at = time.monotonic()

    def lost(self) -> None:
        """It did not answer: whoever comes back may serve something else."""
        self._looked_at, self._weights, self.mismatch, self.openings = float("-inf"), "", "", None
        self.ranks.forget()
        if self.events is not None:
            self.events.cache.lost(time.monotonic())


def _hearing(stats: Stats | None, events: Subscription) -> Stats:
    cache = events.cache
    return msgspec.structs.replace(
        stats or Stats(),
        kv_events_precise=cache.precise,
        kv_events_evicted_blocks=float(cache.evicted),
        kv_events_missed=float(cache.missed),
    )


def _abilities(info: ModelInfo) -> dict[str, bool]:
    """What the engine tells of: without a parser it hands on tool calls and thoughts as text like any other."""
    told = {
        "tools": info.tool_call_parser,
        "reasoning": info.reasoning_parser,
        "vision": info.has_image_understanding,
        "audio": info.has_audio_understanding,
    }
    return {name: bool(value) for name, value in told.items() if value is not msgspec.UNSET}


def _of_engine(loads: list[Load]) -> Stats:
    """What the engine says of itself, its data-parallel ranks together. A batch is only worth judging while somebody waits for it."""
    running, waiting = sum(load.num_running_reqs for load in loads), sum(load.num_waiting_reqs for load in loads)
    most, ranks = sum(load.max_running_requests for load in loads), max(1, len(loads))
    return Stats(
        running_requests=running,
        queued_requests=waiting,
        max_running_requests=most,
        kv_usage_ratio=sum(load.token_usage for load in loads) / ranks,
        cache_hit_ratio=sum(load.cache_hit_rate for load in loads) / ranks,
        generation_tokens_per_second=sum(load.gen_throughput for load in loads),
        batching_efficiency_ratio=running / most if waiting and most else None,
    )


def _of_machine(status: AgentStatus) -> Stats:
    """What the agent says of the engine's state and of the machine."""
    machine = status.machine or Machine()
    gpus = tuple(
        Gpu(
            gpu.index,
            utilisation_ratio=gpu.utilisation,
            memory_used_ratio=_share(gpu.memory_used, gpu.memory_total),
            temperature_celsius=gpu.temperature,
            power_watts=gpu.power,
            ecc_uncorrected=gpu.ecc_uncorrected,
            throttled=bool(gpu.throttled) if gpu.throttled is not None else None,
        )
        for gpu in machine.gpus
    )
    return Stats(
        ready=status.state == "ready" if status.state else None,
        memory_used_ratio=_share(machine.memory_used, machine.memory_total),
        swap_used_bytes=machine.swap_used,
        disk_free_bytes=machine.disk_free,
        gpus=gpus,
    )


def _share(used: int | None, total: int | None) -> float | None:
    return used / total if used is not None and total else None


def _merged(engine: Stats, machine: Stats) -> Stats:
    return msgspec.structs.replace(
        engine,
        ready=machine.ready,
        memory_used_ratio=machine.memory_used_ratio,
        swap_used_bytes=machine.swap_used_bytes,
        disk_free_bytes=machine.disk_free_bytes,
        gpus=machine.gpus,
    )


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
    content = bytearray()
    while len(content) < MAX_SMALL_BYTES and (part := await response.read()):
        content += part
    return bytes(content[:MAX_SMALL_BYTES])
