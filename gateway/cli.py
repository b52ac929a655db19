"""The `penstock` command: `serve`, `check`, and whatever the installed backends bring."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
import msgspec

import gateway
from gateway import config
from gateway.access import admission
from gateway.access.limits.rules import StoreFailed
from gateway.admin import client as remote
from gateway.errors import ConfigError
from gateway.home import home
from gateway.plugin import BackendEnv, CommandEnv, Service, ServiceState
from gateway.processes import init, parent
from gateway.serving import registry
from gateway.telemetry import log

CONFIG_OPTION = click.option(
    "-c", "--config", "path", type=click.Path(path_type=Path), help="A YAML (or JSON) file; every key is optional."
)


class _Commands(click.Group):
    """Built-in commands and those of the plugins, which are asked only when no built-in has the name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(command.name for command in registry.commands())})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        found: click.Command | None = next((command for command in registry.commands() if command.name == cmd_name), None)
        return found


@click.group(cls=_Commands)
@click.version_option(gateway.__version__, prog_name="penstock")
@click.pass_context
def main(ctx: click.Context) -> None:
    """An OpenAI-compatible gateway for self-hosted DeepSeek-V3 on SGLang."""
    _refuse_strangers()
    ctx.obj = CommandEnv(home(), _sections)


def _sections(path: Path, kind: str) -> dict[str, Any]:
    """Sections of that kind; the rest of the configuration is another machine's affair."""
    loaded = config.load(path)
    return {name: found.section for name, found in registry.configured(loaded.settings).items() if found.plugin.kind == kind}


def _refuse_strangers() -> None:
    """Our packages have everyday names: in an environment shared with others, `middleware` may be somebody else's."""
    ours = Path(gateway.__file__).parent.parent
    for name in ("backends", "middleware"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin) if spec is not None and spec.origin is not None else None
        if found is None or found.parent.parent != ours:
            _refuse(ConfigError("", f"the package '{name}' is {found}, not Penstock's; install Penstock into an environment of its own"))


@main.command()
@CONFIG_OPTION
@click.option("--host", help="Address to listen on (listen.host).")
@click.option("--port", type=int, help="Port to listen on, 0 for any free one (listen.port).")
@click.option("--workers", type=int, help="Worker processes (listen.workers).")
def serve(path: Path | None, host: str | None, port: int | None, workers: int | None) -> None:
    """Serve /v1 (and the engine that the configuration launches) until SIGTERM or Ctrl-C."""
    given = {"listen.host": host, "listen.port": port, "listen.workers": workers}
    overrides = {key: value for key, value in given.items() if value is not None}

    async def load() -> parent.Plan:
        return await _plan(config.load(path, overrides=overrides))

    init.step_aside()
    try:
        plan = asyncio.run(load())
        settings = plan.settings
        log.setup(settings.log.level, settings.log.format)
        listener = parent.listen(settings.listen.host, settings.listen.port, "listen", settings.timeouts.client_s)
        address = config.admin_address(settings.listen)
        door = parent.listen(*address, "listen.admin") if address is not None else None
    except ConfigError as error:
        _refuse(error)
    narrator = Narrator(settings, _url(listener) + "/v1", _url(door) if door is not None else "", plan.services)
    asyncio.run(_run(parent.Parent(plan, home(), listener, door, load, narrator.observe), narrator))


async def _plan(loaded: config.Loaded) -> parent.Plan:
    """What can be served, or ConfigError: the same check for a start and for a reload."""
    env = BackendEnv(home())
    await registry.rehearse(loaded.settings, env)
    await _rehearse(loaded.settings)
    return parent.Plan(loaded, registry.services(loaded.settings, env))


async def _rehearse(settings: config.Settings) -> list[str]:
    """Tokenizers and the way to Redis, as a worker will need them; what an operator should know of. Raises ConfigError."""
    admission.verify(settings)
    if settings.redis.url is None:
        return []
    from gateway.store.connect import FORGETS, Client

    client = Client(settings.redis)
    try:
        await client.execute("PING")
        if await client.forgets():
            return [f"redis.url: {FORGETS}"]
    except StoreFailed as error:
        return [f"redis.url: does not answer now ({error}); until it does, limits are {settings.redis.on_store_failure}"]
    finally:
        await client.aclose()
    return []


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


async def _run(process: parent.Parent, narrator: Narrator) -> None:
    async def announce() -> None:
        await process.serving.wait()
        narrator.listening()

    greeting = asyncio.create_task(announce())
    try:
        await process.run()
    finally:
        greeting.cancel()


class Narrator:
    """Says on standard output what is going on while it goes on, and at last what to copy."""

    def __init__(self, settings: config.Settings, url: str, door: str, services: Sequence[Service]) -> None:
        self._settings = settings
        self._url = url
        self._door = door
        self._waiting = {service.name for service in services}
        self._greeted = False

    def listening(self) -> None:
        """The listener is up."""
        _say(f"listening on {self._url}")
        if self._door:
            _say(f"metrics and /admin on {self._door}")
        if self._waiting:
            _say("until the engine is ready, requests are answered 503 'the engine is loading'")
        self._greet()

    def observe(self, name: str, state: ServiceState) -> None:
        """One line per change of a service."""
        _say(f"{name}: {state.state}{f', {state.detail}' if state.detail else ''}")
        if state.state == "ready":
            self._waiting.discard(name)
            self._greet()

    def _greet(self) -> None:
        if self._waiting or self._greeted:
            return
        self._greeted = True
        model = next(iter(self._settings.models))
        key = "YOUR_KEY" if self._settings.keys_required() else "none"
        with contextlib.suppress(OSError):
            click.echo(_GREETING.format(url=self._url, model=model, key=key))


_GREETING = """
Ready. Try it:

curl {url}/chat/completions -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\
  -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 32}}'

Or in Python (pip install openai):

from openai import OpenAI
client = OpenAI(base_url="{url}", api_key="{key}")
stream = client.chat.completions.create(model="{model}", messages=[{{"role": "user", "content": "Hello"}}], max_tokens=32, stream=True)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
"""


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # whoever read our output may have left; that is no reason to stop serving
        click.echo(f"penstock: {text}")


def _refuse(error: ConfigError) -> NoReturn:
    click.echo(f"penstock: {error}", err=True)
    sys.exit(2)


@main.command()
@CONFIG_OPTION
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def check(path: Path | None, as_json: bool) -> None:
    """Validate the configuration and print every effective value with its origin, secrets masked."""
    try:
        loaded = config.load(path)
        rows = registry.rows(loaded)
        findings = asyncio.run(_findings(loaded.settings))
    except ConfigError as error:
        _refuse(error)
    if as_json:
        click.echo(msgspec.json.encode({"values": rows, "findings": findings}))
    else:
        _table(rows)
        for finding in findings:
            click.echo(f"note: {finding}")
        click.echo(f"ok: {path or 'the defaults'} can be served")


async def _findings(settings: config.Settings) -> list[str]:
    return await registry.rehearse(settings, BackendEnv(home()), check=True) + await _rehearse(settings)


def _table(rows: list[dict[str, Any]]) -> None:
    width = max(len(row["key"]) for row in rows)
    values = [msgspec.json.encode(row["value"]).decode() for row in rows]
    value_width = min(max(map(len, values)), 60)
    for row, value in zip(rows, values, strict=True):
        click.echo(f"{row['key']:<{width}}  {value:<{value_width}}  {row['origin']}")


main.add_command(remote.keys)
main.add_command(remote.usage)
main.add_command(remote.explain)


if __name__ == "__main__":
    main()
