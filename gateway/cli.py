"""The `penstock` command: `serve`, `check`, and whatever the installed backends bring."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
import msgspec

import gateway
from gateway import config
from gateway.access.limits.rules import StoreFailed
from gateway.admin import commands, operating, secret
from gateway.admin.sentinel import sentinel
from gateway.admin.top import top
from gateway.errors import ConfigError, ConfigErrors
from gateway.form import FORM
from gateway.home import home
from gateway.plugin import BackendEnv, CommandEnv, Service, ServiceState
from gateway.processes import init, parent
from gateway.processes.tree import Plan
from gateway.reach import unreached
from gateway.serving import registry
from gateway.telemetry import log
from gateway.terminal import say, say_json, say_lines, say_table
from gateway.wire.visible import visible

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

    def invoke(self, ctx: click.Context) -> Any:
        """A word that is not understood gets one line."""
        try:
            return super().invoke(ctx)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            help = f" ({error.ctx.command_path} --help says what it takes)" if error.ctx is not None else ""
            say(f"penstock: {error.format_message()}{help}", error=True)
            ctx.exit(error.exit_code)


@click.group(cls=_Commands)
@click.version_option(gateway.__version__, prog_name="penstock", message=f"%(prog)s %(version)s ({FORM})")
@click.pass_context
def main(ctx: click.Context) -> None:
    """An OpenAI-compatible gateway for self-hosted DeepSeek-V3 on SGLang."""
    _refuse_strangers()
    ctx.obj = CommandEnv(home(), _sections)


def _sections(path: Path, kind: str) -> dict[str, Any]:
    """Sections of that kind; the rest of the configuration is another machine's affair."""
    settings = _load(path).settings
    return {name: found.section for name, found in registry.configured(settings).items() if found.plugin.kind == kind}


def _load(path: Path | None, overrides: Mapping[str, Any] | None = None) -> config.Loaded:
    """The configuration with its backends' sections checked; raises ConfigErrors with everything that is wrong in it."""
    return config.load(path, overrides=overrides, further=registry.configured)


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

    async def load() -> Plan:
        return await _plan(_load(path, overrides))

    init.step_aside()
    try:
        plan = asyncio.run(load())
        settings = plan.settings
        log.setup(settings.log.level, settings.log.format)
        for stranger in config.strangers(os.environ):
            logging.getLogger("penstock.config").warning("%s", stranger)
        listener = parent.listen(settings.listen.host, settings.listen.port, "listen", settings.timeouts.client_s)
        address = config.admin_address(settings.listen)
        admin = parent.listen(*address, "listen.admin") if address is not None else None
    except ConfigError as error:
        _refuse(error)
    console = Console(
        settings, _url(listener, settings.listen.tls is not None) + "/v1", _url(admin) if admin is not None else "", plan.services
    )
    asyncio.run(_run(parent.Parent(plan, home(), listener, admin, load, console.observe), console))


async def _plan(loaded: config.Loaded) -> Plan:
    """What can be served, or ConfigErrors: the same check for a start and for a reload."""
    await _rehearse(loaded)
    return Plan(loaded, registry.services(loaded.settings, BackendEnv(home())))


async def _rehearse(loaded: config.Loaded, check: bool = False, force: bool = False) -> list[str]:
    """Certificates, backends, tokenizers and the way to Redis, as a worker will need them; returns what an operator should know of, with
    `check` also what the backends find. Raises ConfigErrors with everything that would not work."""
    from middleware import rate_limit  # not before it is known that these names are ours

    settings = loaded.settings
    notes = list(config.strangers(os.environ))
    wrong: list[ConfigError] = []

    async def files() -> list[str]:
        config.verify_files(settings)
        return []

    async def tokenizers() -> list[str]:
        rate_limit.verify(settings)
        return []

    for step in (files(), registry.rehearse(settings, BackendEnv(home(), force=force), check), tokenizers(), _ask_redis(settings)):
        try:
            notes += await step
        except ConfigError as error:
            wrong.append(error)
    if wrong:
        raise loaded.located(ConfigErrors(wrong))
    return notes


async def _ask_redis(settings: config.Settings) -> list[str]:
    if settings.redis.url is None:
        return []
    from gateway.store.connect import FORGETS, Client

    client = Client(settings.redis)
    try:
        await client.execute("PING")
        if await client.forgets():
            return [f"redis.url: {FORGETS}"]
    except StoreFailed as error:
        reason = config.without_secrets(str(error))
        return [f"redis.url: does not answer now ({reason}); until it does, limits are {settings.redis.on_store_failure}"]
    finally:
        await client.aclose()
    return []


def _url(listener: socket.socket, tls: bool = False) -> str:
    """One that a client can use, also where every address is listened on."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = _own_address()
    return f"http{'s' * tls}://{f'[{host}]' if ':' in host else host}:{port}"


def _own_address() -> str:
    """The address from which this machine would reach others; loopback on one that reaches none. Nothing is sent."""
    for family, elsewhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):  # for documentation (RFC 5737, RFC 3849)
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as one:
            one.connect((elsewhere, 9))
            found: str = one.getsockname()[0]
            return found
    return "127.0.0.1"


async def _run(process: parent.Parent, console: Console) -> None:
    async def announce() -> None:
        await process.serving.wait()
        console.listening()

    greeting = asyncio.create_task(announce())
    try:
        await process.run()
    finally:
        greeting.cancel()


class Console:
    """Says on standard output what happens while it happens, and at last what to copy."""

    def __init__(self, settings: config.Settings, url: str, admin_url: str, services: Sequence[Service]) -> None:
        self._settings = settings
        self._url = url
        self._admin_url = admin_url
        self._waiting = {service.name for service in services}
        self._failed: set[str] = set()
        self._greeted = False

    def listening(self) -> None:
        """The listener is up."""
        _say(f"version {gateway.__version__} ({FORM})")
        _say(f"listening on {self._url}")
        if self._admin_url:
            _say(f"metrics and /admin on {self._admin_url}")
            made = secret.path(home())
            if self._settings.admin.key_hash is None and made.exists():
                _say(f"the admin key is in {made}, where `penstock` finds it")
        if self._waiting - self._failed:
            _say("until the engine is ready, requests are answered 503 'the engine is loading'")
        self._greet()

    def observe(self, name: str, state: ServiceState) -> None:
        """One line per change of a service."""
        _say(f"{name}: {state.state}{f', {state.detail}' if state.detail else ''}")
        (self._failed.add if state.state == "failed" else self._failed.discard)(name)
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
            say_lines(_GREETING.format(url=self._url, model=visible(model), key=key))


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
        say(f"penstock: {text}")


def _refuse(error: ConfigError) -> NoReturn:
    for line in str(error).splitlines():
        say_lines(f"penstock: {line}", error=True)
    sys.exit(2)


@main.command()
@CONFIG_OPTION
@click.option("--json", "as_json", is_flag=True, help="One JSON object with every value instead of lines.")
@click.option("--all", "every", is_flag=True, help="Values that are left at their defaults, too.")
@click.option("--reach", is_flag=True, help="Whatever is not there (a host, its agent, Redis, the collector) is a failure: exit code 1.")
@click.option("--force", is_flag=True, help="Note, and do not refuse, an engine that cannot fit this machine's GPUs.")
def check(path: Path | None, as_json: bool, every: bool, reach: bool, force: bool) -> None:
    """Validate the configuration and print what it sets, each value with its origin, secrets masked."""
    missing: list[str] = []
    try:
        loaded = _load(path)
        rows = registry.rows(loaded)
        findings = asyncio.run(_rehearse(loaded, not reach, force))
        if reach:
            missing = asyncio.run(_missing(loaded.settings, force))
    except ConfigError as error:
        _refuse(error)
    if as_json:
        say_json(msgspec.json.encode({"values": rows, "findings": findings, **({"unreached": missing} if reach else {})}))
    else:
        shown = [row for row in rows if every or row["origin"] != "default"]
        say_table(("key", "value", "origin"), [(row["key"], msgspec.json.encode(row["value"]).decode(), row["origin"]) for row in shown])
        if len(shown) < len(rows):
            say(f"{len(rows) - len(shown)} more are left at their defaults (--all shows them)")
        for finding in findings:
            say(f"note: {finding}")
        for finding in missing:
            say(f"penstock: not reached: {finding}", error=True)
        if not missing:
            say(f"ok: {path or 'the defaults'} can be served{', and all that it names is there' if reach else ''}")
    sys.exit(1 if missing else 0)


async def _missing(settings: config.Settings, force: bool) -> list[str]:
    return [finding async for finding in unreached(settings, BackendEnv(home(), force=force))]


@main.group("config")
def configuration() -> None:
    """What a configuration may hold."""


@configuration.command("schema")
def show_schema() -> None:
    """The JSON schema of a configuration, for editors: a first line `# yaml-language-server: $schema=FILE` names the file it is kept in."""
    say_json(msgspec.json.format(msgspec.json.encode(registry.schema())))


for command in (
    commands.keys, commands.usage, commands.explain,
    operating.console, operating.hosts, operating.requests, operating.reload, operating.status, operating.show_audit, top, sentinel,
):  # fmt: skip
    main.add_command(command)


if __name__ == "__main__":
    main()
