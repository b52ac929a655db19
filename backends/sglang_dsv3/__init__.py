"""The primary backend: DeepSeek-V3 on SGLang, on hosts with GPUs or, for everybody else, on this machine's CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from backends.sglang_dsv3.config import Config
from gateway.plugin import BackendEnv, Plugin, Service

if TYPE_CHECKING:
    import click

    from backends.sglang_dsv3.backend import SGLang


def _build(name: str, config: Config, env: BackendEnv) -> SGLang:
    from backends.sglang_dsv3.backend import SGLang

    return SGLang(name, config, env)


def _services(name: str, config: Config, env: BackendEnv) -> Sequence[Service]:
    from backends.sglang_dsv3.engine import service
    from backends.sglang_dsv3.host import service_name

    return [
        service(service_name(name, index), config.engine, env.home) for index, host in enumerate(config.hosts) if host.launch == "local"
    ]


def _commands() -> Sequence[click.Command]:
    from backends.sglang_dsv3.engine.commands import engine
    from backends.sglang_dsv3.engine.plan.command import plan

    return [engine, plan]


plugin = Plugin("sglang_dsv3", Config, _build, _services, _commands)
