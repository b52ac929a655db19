"""From configuration to live backends: entry point -> config -> build -> open -> aclose, and who serves which model."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import random
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, NamedTuple

import msgspec

from gateway.access.keys import Caller
from gateway.config import Loaded, ModelEntry, Settings, leaves, masked, problems
from gateway.config import schema as settings_schema
from gateway.errors import ConfigError, ConfigErrors, GatewayError, NoSuchResponse, NotServed, UnknownModel
from gateway.masking import shown
from gateway.plugin import ENTRY_POINT_GROUP, BackendEnv, Endpoint, Plugin, Service, Target
from gateway.serving import calls
from gateway.serving.balance import policies
from gateway.serving.balance.policies import Affine, Policy
from gateway.serving.balance.settings import Health
from gateway.serving.hostview import HostView
from gateway.serving.pool import Pool
from gateway.wire.answers import ModelInfo


def plugins() -> dict[str, Plugin]:
    """Every installed plugin by its kind; built-ins come through the same door as strangers."""
    found: dict[str, Plugin] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        plugin: Plugin = entry.load()
        found[plugin.kind] = plugin
    return found


class Configured(NamedTuple):
    """A backend's plugin, its own checked section, and what the core itself reads in it."""

    plugin: Plugin
    section: msgspec.Struct
    health: Health


def configured(settings: Settings) -> dict[str, Configured]:
    """Every backend's configuration by name; raises ConfigErrors with the path of everything that is wrong."""
    known = plugins()
    result: dict[str, Configured] = {}
    wrong: list[ConfigError] = []
    for name, section in settings.backends.items():
        kind = section.get("kind")
        if not isinstance(kind, str) or kind not in known:
            near = difflib.get_close_matches(str(kind), known, n=1)
            hint = f", did you mean '{near[0]}'?" if near else ""
            wrong.append(
                ConfigError(f"backends.{name}.kind", f"unknown kind '{shown('', kind)}'{hint} (installed: {', '.join(sorted(known))})")
            )
            continue
        plugin = known[kind]
        rest = {key: value for key, value in section.items() if key not in ("kind", "health")}
        given = section.get("health", {})
        found = [*problems(given, Health, f"backends.{name}.health"), *problems(rest, plugin.config, f"backends.{name}")]
        wrong += found
        if not found:
            result[name] = Configured(plugin, msgspec.convert(rest, plugin.config), msgspec.convert(given, Health))
    for model, entry in settings.models.items():
        if entry.backend not in settings.backends:
            have = ", ".join(settings.backends) or "none"
            wrong.append(ConfigError(f"models.{model}.backend", f"no backend is called '{shown('', entry.backend)}' (have: {have})"))
    if wrong:
        raise ConfigErrors(wrong)
    return result


def schema() -> dict[str, Any]:
    """The whole configuration as a JSON schema, sections of every installed plugin included."""
    return settings_schema({kind: plugin.config for kind, plugin in sorted(plugins().items())}, Health)


def rows(loaded: Loaded) -> list[dict[str, Any]]:
    """Every effective value, defaults of the backends included, with its origin; secrets masked."""
    tree = msgspec.to_builtins(loaded.settings)
    for name, (plugin, section, health) in configured(loaded.settings).items():
        tree["backends"][name] = {"kind": plugin.kind, **msgspec.to_builtins(section), "health": msgspec.to_builtins(health)}
    return [{"key": leaf, "value": value, "origin": loaded.origins.get(leaf, "default")} for leaf, value in leaves(masked("", tree))]


async def rehearse(settings: Settings, env: BackendEnv, check: bool = False) -> list[str]:
    """Open every backend once, as a worker will, and close it again; with `check`, its own findings. Raises ConfigError."""
    live = Registry(settings, env)
    await live.open()
    try:
        return await live.check() if check else []
    finally:
        await live.aclose()


def services(settings: Settings, env: BackendEnv) -> list[Service]:
    """Every process that the parent must run for the configured backends."""
    return [service for name, (plugin, config, _) in configured(settings).items() for service in plugin.services(name, config, env)]


@dataclass(frozen=True, slots=True)
class Served:
    """What a model's name stands for: its pool, whose turn it is there, and what its configuration says of answers."""

    name: str
    pool: Pool
    policy: Policy
    entry: ModelEntry
    # The policy again, where it keeps an index of what its hosts hold.
    affine: Affine | None = None


class Registry:
    """All pools, and the models they serve."""

    def __init__(self, settings: Settings, env: BackendEnv) -> None:
        self._env = env
        self._pools: dict[str, Pool] = {}
        self._models: dict[str, Served] = {}
        self._probes: list[asyncio.Task[None]] = []
        for name, (plugin, config, health) in configured(settings).items():
            backend = plugin.build(name, config, env)
            self._pools[name] = Pool(name, backend, health, settings.admission, settings.retry, settings.listen.workers, env.failed)
        self._created = int(time.time())
        # What keys may use that may not use everything.
        self._allowed = [key.models for key in settings.keys if key.models is not None]
        for model, entry in settings.models.items():
            policy = policies.make(entry.balance, random.Random())  # noqa: S311
            served = Served(model, self._pools[entry.backend], policy, entry, policy if isinstance(policy, Affine) else None)
            for alias in (model, *entry.aliases):
                self._models[alias] = served

    async def open(self) -> None:
        """Open every backend and begin to probe; raises ConfigErrors with every one that cannot be opened, after all are closed again."""
        wrong: list[ConfigError] = []
        try:
            for pool in self._pools.values():
                wrong += await _opened(pool)
            if wrong:
                raise ConfigErrors(wrong)
            for pool in self._pools.values():
                self._probes.append(self._env.supervise(f"probe {pool.name}", pool.probe_forever))
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
                await pool.aclose()

    def serving(self, model: str, endpoint: Endpoint, allowed: Container[str] | None = None) -> Served:
        """Who serves this model on this endpoint; raises UnknownModel (also for one that is not `allowed`) or NotServed, which names those
        that would."""
        found = self._models.get(model)
        if found is None or not (allowed is None or model in allowed or found.name in allowed):
            raise UnknownModel(model, self._names(allowed))
        if endpoint not in found.pool.endpoints:
            raise NotServed(self._not_served(model, found.pool, endpoint))
        return found

    def example(self, endpoint: Endpoint) -> str | None:
        """The first model that is served there and that no key of the configuration is kept from, since who reads examples shows no key;
        None where there is none."""
        for name, served in self._models.items():
            if endpoint in served.pool.endpoints and all(not {name, served.name}.isdisjoint(models) for models in self._allowed):
                return name
        return None

    def _not_served(self, model: str, pool: Pool, endpoint: Endpoint) -> str:
        others = sorted(name for name, served in self._models.items() if endpoint in served.pool.endpoints)
        would = f"it is served for: {', '.join(others)}" if others else f"no backend here serves it; '{pool.name}' would, if its engine can"
        return f"{endpoint.value} is not served for the model '{model}' (backend '{pool.name}'); {would}."

    def _names(self, allowed: Container[str] | None) -> list[str]:
        return [name for name, served in self._models.items() if allowed is None or name in allowed or served.name in allowed]

    def models(self, allowed: Container[str] | None = None) -> list[ModelInfo]:
        """Every name a client may use, aliases included; of a key that may use some only, those."""
        return [self._info(name) for name in self._names(allowed)]

    def model(self, name: str, allowed: Container[str] | None = None) -> ModelInfo:
        """One of them; raises UnknownModel."""
        names = self._names(allowed)
        if name not in names:
            raise UnknownModel(name, names)
        return self._info(name)

    def _info(self, name: str) -> ModelInfo:
        length, abilities = self._models[name].pool.least()
        context = length if length is not None else msgspec.UNSET
        return ModelInfo(name, "model", self._created, "penstock", context, context, abilities or msgspec.UNSET)

    async def recall(self, id: str, caller: Caller, cancel: bool = False) -> bytes:
        """An answer of before, made for this caller, from whoever keeps it; see `Backend.recall`. Raises GatewayError."""
        if not calls.is_owned(id, caller.name):
            raise NoSuchResponse(id)
        pools: dict[Pool, str] = {}
        for name in self._names(caller.models):
            served = self._models[name]
            if calls.KEPT & served.pool.endpoints:
                pools.setdefault(served.pool, name)
        refusals: list[GatewayError] = []
        for pool, name in pools.items():
            try:
                found = await pool.backend.recall(id, name, cancel)
            except GatewayError as error:
                refusals.append(error)
                continue
            if found is not None:
                return found
            refusals.append(NoSuchResponse(id))
        # Who could not be asked may have it; who keeps none says least.
        rank = (NotServed, NoSuchResponse)
        raise max(refusals, key=lambda error: rank.index(type(error)) if type(error) in rank else len(rank), default=_keeps_nothing())

    def not_ready(self) -> Mapping[str, Target | None]:
        """Pools that cannot take a request now, with what they are waiting for. Empty means ready."""
        return {name: pool.waiting_for() for name, pool in self._pools.items() if not pool.available()}

    def waiting(self) -> dict[str, int]:
        """Requests that wait for a place, by backend."""
        return {name: pool.queue.waiting for name, pool in self._pools.items()}

    def hosts(self) -> list[HostView]:
        """Every host of every backend, for people."""
        return [row for pool in self._pools.values() for row in pool.view()]

    def drain(self, drained: frozenset[str]) -> None:
        """Targets that get no new requests, by the operator's word."""
        for pool in self._pools.values():
            pool.drain(drained)

    def doubt(self, doubted: Mapping[str, Mapping[str, str]], eject: bool) -> None:
        """What is wrong with the answers of targets, by backend."""
        for name, pool in self._pools.items():
            pool.doubt(doubted.get(name, {}), eject)

    async def check(self) -> list[str]:
        """Every backend's own findings, for `penstock check`; raises ConfigErrors with what cannot be served at all."""
        findings: list[str] = []
        wrong: list[ConfigError] = []
        for name, pool in self._pools.items():
            try:
                findings += [f"backends.{name}: {finding}" for finding in await pool.backend.check()]
            except ConfigError as error:
                wrong += error.below(f"backends.{name}").errors
        if wrong:
            raise ConfigErrors(wrong)
        return findings


def commands() -> list[Any]:
    """Commands that plugins bring, for the CLI to mount."""
    return [command for plugin in plugins().values() for command in plugin.commands()]


def _keeps_nothing() -> NotServed:
    return NotServed("No backend here serves /v1/responses to you.")


async def _opened(pool: Pool) -> Sequence[ConfigError]:
    """What kept a backend from being opened: a file that its section names, mostly."""
    try:
        await pool.backend.open()
    except ConfigError as error:
        return error.below(f"backends.{pool.name}").errors
    except (OSError, ValueError) as error:
        return [ConfigError(f"backends.{pool.name}", f"cannot be opened: {error}")]
    return ()
