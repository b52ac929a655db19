"""`penstock engine`: run SGLang on this host, and make its environment and its tiny checkpoint."""

from __future__ import annotations

import logging
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import yaml

from backends.sglang_dsv3.config import Engine
from backends.sglang_dsv3.engine import TINY_MODEL, environment_folder, install, known, launch, section
from gateway.errors import ConfigError
from gateway.plugin import CommandEnv
from gateway.wire.visible import visible


@click.group(invoke_without_command=True)
@click.option("-c", "--config", "path", type=click.Path(path_type=Path), help="The configuration; its `engine` section says what is run.")
@click.option("--backend", "name", help="Which backend's section, where several are of this kind.")
@click.option("--show-command", is_flag=True, help="Print SGLang's environment and command line, and run nothing.")
@click.option("--force", is_flag=True, help="Start also what the plan says cannot fit.")
@click.pass_context
def engine(ctx: click.Context, path: Path | None, name: str | None, show_command: bool, force: bool) -> None:
    """Run SGLang on this host from the `engine` section, and keep it running; without a configuration the tiny checkpoint on the CPU."""
    if ctx.invoked_subcommand is not None:
        return
    env: CommandEnv = ctx.obj
    home = env.home
    try:
        where, config = _section(env, path, name)
        if show_command:
            if known.kept_at(home) is not None:
                _known(env, config, where)
            _show(config, home)
            return
        if not (environment_folder(home) / "bin" / "python").exists():
            raise ConfigError("", "the engine's environment is not installed: run `penstock engine install`")
        from backends.sglang_dsv3.engine import agent

        _prepare(config, where, _known(env, config, where), force)
    except ConfigError as error:
        for line in str(error).splitlines():
            click.echo(f"penstock: {line}", err=True)
        sys.exit(2)
    logging.basicConfig(format="penstock: %(message)s", level=logging.WARNING)
    sys.exit(agent.run(config, home, lambda text: click.echo(f"penstock: {visible(text)}"), lambda: _again(env, path, name, force)))


def _section(env: CommandEnv, path: Path | None, name: str | None) -> tuple[str, Engine]:
    """The path of an `engine` section and what it holds; raises ConfigError."""
    if path is None:
        return "engine", Engine()
    where, config = section.chosen(env, path, name)
    return where, config.engine


def _known(env: CommandEnv, config: Engine, where: str) -> known.Known:
    """What the installed SGLang knows, when it knows everything that the section says; raises ConfigError."""
    found = known.known(env.home, lambda text: click.echo(f"penstock: {text}", err=True))
    try:
        known.verify(config, found)
    except ConfigError as error:
        raise error.below(where) from None
    return found


def _again(env: CommandEnv, path: Path | None, name: str | None, force: bool) -> Engine:
    where, config = _section(env, path, name)
    from backends.sglang_dsv3.engine import agent
    from backends.sglang_dsv3.engine.plan import start

    found = _known(env, config, where)
    if config.model_path is not None:
        agent.usable(config, where, lambda done, of: None, found)
        start.verify(config, where, found, force)
    return config


def _prepare(config: Engine, where: str, found: known.Known, force: bool) -> None:
    """Look at everything that can be known beforehand; shards are counted on a terminal, and told in a pipe."""
    from backends.sglang_dsv3.engine import agent

    told = time.monotonic()

    def progress(done: int, of: int) -> None:
        nonlocal told
        if sys.stdout.isatty():
            click.echo(f"\rpenstock: reading headers, {done} of {of} shards", nl=done == of)
        elif time.monotonic() - told > 5 or done == of:
            told = time.monotonic()
            click.echo(f"penstock: reading headers, {done} of {of} shards")

    for note in agent.prepare(config, where, progress, found, force):
        click.echo(f"penstock: {visible(note)}", err=True)


def _show(config: Engine, home: Path) -> None:
    from backends.sglang_dsv3.engine.supervise import served_name

    model = Path(config.model_path) if config.model_path is not None else home / "checkpoints" / TINY_MODEL
    secrets = Path("SECRETS.yaml") if config.api_key_file is not None else None
    argv = launch.command(config, home, model, served_name(config), config.port, secrets)
    for variable, value in sorted(launch.additions(config).items()):
        click.echo(f"{variable}={shlex.quote(value)} \\")
    click.echo(" \\\n  ".join(_lines(argv)))


def _lines(argv: list[str]) -> list[str]:
    """The program, then a flag with its value a line."""
    lines = [shlex.join(argv[:3])]
    for word in argv[3:]:
        if word.startswith("--") or lines[-1].startswith(shlex.quote(argv[0])) or " " in lines[-1]:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return lines


@engine.command("install")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="For this machine's CPU, or for CUDA GPUs.")
@click.pass_obj
def install_command(env: CommandEnv, device: str) -> None:
    """Make the engine's environment, once (CPU: about 660 MB of wheels; CUDA: several GB); nothing to do when it is current."""
    try:
        install.install(env.home, lambda text: click.echo(f"penstock: {text}"), device)
    except install.InstallError as error:
        click.echo(f"penstock: {error}", err=True)
        sys.exit(1)


@engine.command("import")
@click.argument("file", type=click.Path(path_type=Path))
def import_command(file: Path) -> None:
    """Convert a file for `SGLangEngine` (max_seq_len, batch_size, gpu_ids, ...): the configuration on standard output, and beside it what
    became of each line."""
    from backends.sglang_dsv3.engine import former

    try:
        made, said = former.convert(file)
    except ConfigError as error:
        for line in str(error).splitlines():
            click.echo(f"penstock: {visible(line)}", err=True)
        sys.exit(2)
    for line in said:
        click.echo(f"penstock: {visible(line)}", err=True)
    click.echo(yaml.safe_dump(made, sort_keys=False, allow_unicode=False).rstrip("\n"))


@engine.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.pass_obj
def checkpoint(env: CommandEnv, folder: Path | None) -> None:
    """Build the tiny FP8 checkpoint (12 MB, two seconds), by default where `penstock serve` looks for it."""
    target = folder or env.home / "checkpoints" / TINY_MODEL
    builder = Path(__file__).parent / "tiny" / "build.py"
    done: Any = subprocess.run([str(environment_folder(env.home) / "bin" / "python"), str(builder), str(target)], check=False)
    sys.exit(done.returncode)
