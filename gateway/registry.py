"""From configuration to live backends: entry point -> config -> build -> open -> aclose, and who serves which model."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import msgspec

from gateway.balance.weighted import WeightedRoundRobin
from gateway.config import Loaded, Settings, convert, leaves, masked
from gateway.errors import ConfigError, NotServed, UnknownModel
from gateway.plugin import ENTRY_POINT_GROUP, Backend, BackendEnv, Endpoint, Model, Plugin, Service, Target

log = logging.getLogger("penstock.registry")

PROBE_INTERVAL_S = 1.0


def plugins() -> dict[str, Plugin]:
    """Every installed plugin by its kind; built-ins come through the same door as strangers."""
    found: dict[str, Plugin] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        plugin: Plugin = entry.load()
        found[plugin.kind] = plugin
    return found


def configured(settings: Settings) -> dict[str, tuple[Plugin, msgspec.Struct]]:
    """Plugin and checked configuration of every backend by name; raises ConfigError with the path of what is wrong."""
    known = plugins()
    result: dict[str, tuple[Plugin, msgspec.Struct]] = {}
    for name, section in settings.backends.items():
        kind = section.get("kind")
        if not isinstance(kind, str) or kind not in known:
            near = difflib.get_close_matches(str(kind), known, n=1)
            hint = f", did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"backends.{name}.kind", f"unknown kind {kind!r}{hint} (installed: {', '.join(sorted(known))})")
        plugin = known[kind]
        rest = {key: value for key, value in section.items() if key != "kind"}
        result[name] = (plugin, convert(rest, plugin.Config, f"backends.{name}"))
    for model, entry in settings.models.items():
        if entry.backend not in result:
            raise ConfigError(f"models.{model}.backend", f"no backend is called '{entry.backend}' (have: {', '.join(result) or 'none'})")
    return result


def rows(loaded: Loaded) -> list[dict[str, Any]]:
    """Every effective value, defaults of the backends included, with its origin; secrets masked."""
    tree = msgspec.to_builtins(loaded.settings)
    for name, (plugin, section) in configured(loaded.settings).items():
        tree["backends"][name] = {"kind": plugin.kind, **msgspec.to_builtins(section)}
    return [{"key": leaf, "value": masked(leaf, value), "origin": loaded.origins.get(leaf, "default")} for leaf, value in leaves(tree)]


async def rehearse(settings: Settings, env: BackendEnv, check: bool = False) -> list[str]:
    """Open every backend once, as a worker will, and close it again; with `check`, its own findings. Raises ConfigError."""
    live = Registry(settings, env)
    try:
        await live.open()
    except OSError as error:
        raise ConfigError("backends", f"cannot be opened: {error}") from None
    try:
        return await live.check() if check else []
    finally:
        await live.aclose()


def services(settings: Settings, env: BackendEnv) -> list[Service]:
    """Every process that the parent must run for the configured backends."""
    return [service for name, (plugin, config) in configured(settings).items() for service in plugin.services(name, config, env)]


class Pool:
    """One backend with what the core knows of its targets: the probe's last word, and whose turn it is."""

    def __init__(self, name: str, backend: Backend) -> None:
        self.name = name
        self.backend = backend
        self.endpoints = backend.endpoints()
        self._down: dict[str, bool] = {}
        self._turn = WeightedRoundRobin()

    def pick(self, tried: set[str]) -> Target | None:
        """The next ready target that was not tried yet. Targets whose last probe failed come only when no other is left."""
        ready = [target for target in self.backend.targets() if target.ready and target.id not in tried]
        if not ready:
            return None
        up = [target for target in ready if not self._down.get(target.id)]
        return self._turn.pick(up or ready)

    def waiting_for(self) -> Target | None:
        """The target that will be ready first, when none is."""
        return min(self.backend.targets(), key=lambda target: target.retry_after_s, default=None)

    def available(self) -> bool:
        """Whether any target would take a request now."""
        return any(target.ready and not self._down.get(target.id) for target in self.backend.targets())

    async def probe_forever(self, interval_s: float = PROBE_INTERVAL_S) -> None:
        """Ask every ready target once an interval; one log line per change."""
        while True:
            targets = [target.id for target in self.backend.targets() if target.ready]
            answers = await asyncio.gather(*(self.backend.probe(target) for target in targets), return_exceptions=True)
            for target, answer in zip(targets, answers, strict=True):
                up = answer is True
                if self._down.get(target, False) == up:
                    log.info("target %s is %s", target, "back" if up else "down")
                self._down[target] = not up
            await asyncio.sleep(interval_s)


@dataclass(frozen=True, slots=True)
class Served:
    """What a model's name stands for: its pool, and how many tokens an answer gets whose client names no limit (None: the engine's)."""

    pool: Pool
    default_max_tokens: int | None


class Registry:
    """All pools, and the models they serve."""

    def __init__(self, settings: Settings, env: BackendEnv) -> None:
        self._pools: dict[str, Pool] = {}
        self._models: dict[str, Served] = {}
        self._listed: list[Model] = []
        self._probes: list[asyncio.Task[None]] = []
        for name, (plugin, config) in configured(settings).items():
            self._pools[name] = Pool(name, plugin.build(name, config, env))
        created = int(time.time())
        for model, entry in settings.models.items():
            for alias in (model, *entry.aliases):
                self._models[alias] = Served(self._pools[entry.backend], entry.default_max_tokens)
                self._listed.append(Model(id=alias, created=created))

    async def open(self) -> None:
        """Open every backend and begin to probe; on failure everything opened so far is closed again."""
        try:
            for pool in self._pools.values():
                await pool.backend.open()
                self._probes.append(asyncio.create_task(pool.probe_forever(), name=f"probe {pool.name}"))
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Stop probing and close every backend, each in spite of the others' failures."""
        for task in self._probes:
            task.cancel()
        await asyncio.gather(*self._probes, return_exceptions=True)
        for pool in self._pools.values():
            with contextlib.suppress(Exception):
                await pool.backend.aclose()

    def serving(self, model: str, endpoint: Endpoint) -> Served:
        """Who serves this model on this endpoint; raises UnknownModel or NotServed, which names those that would."""
        found = self._models.get(model)
        if found is None:
            raise UnknownModel(model, list(self._models))
        if endpoint not in found.pool.endpoints:
            raise NotServed(self._not_served(model, found.pool, endpoint))
        return found

    def _not_served(self, model: str, pool: Pool, endpoint: Endpoint) -> str:
        others = sorted(name for name, served in self._models.items() if endpoint in served.pool.endpoints)
        would = f"it is served for: {', '.join(others)}" if others else f"no backend here serves it; '{pool.name}' would, if its engine can"
        return f"{endpoint.value} is not served for the model '{model}' (backend '{pool.name}'); {would}."

    def models(self) -> Sequence[Model]:
        """Every name a client may use, aliases included."""
        return self._listed

    def model(self, name: str) -> Model:
        """One of them; raises UnknownModel."""
        for model in self._listed:
            if model.id == name:
                return model
        raise UnknownModel(name, list(self._models))

    def not_ready(self) -> Mapping[str, Target | None]:
        """Pools that cannot take a request now, with what they are waiting for. Empty means ready."""
        return {name: pool.waiting_for() for name, pool in self._pools.items() if not pool.available()}

    async def check(self) -> list[str]:
        """Every backend's own findings, for `penstock check`."""
        findings: list[str] = []
        for name, pool in self._pools.items():
            findings += [f"backends.{name}: {finding}" for finding in await pool.backend.check()]
        return findings


def commands() -> list[Any]:
    """Commands that plugins bring, for the CLI to mount."""
    return [command for plugin in plugins().values() for command in plugin.commands()]
