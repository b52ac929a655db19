"""`penstock engine`: what this backend adds to the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from backends.sglang_dsv3.engine import TINY_MODEL, environment_folder, install


@click.group()
def engine() -> None:
    """SGLang's environment and the tiny checkpoint."""


@engine.command("install")
@click.pass_obj
def install_command(home: Path) -> None:
    """Make the CPU engine's environment (about 660 MB of wheels, once); nothing to do when it is current."""
    try:
        install.install(home, lambda text: click.echo(f"penstock: {text}"))
    except install.InstallError as error:
        click.echo(f"penstock: {error}", err=True)
        sys.exit(1)


@engine.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.pass_obj
def checkpoint(home: Path, folder: Path | None) -> None:
    """Build the tiny FP8 checkpoint (12 MB, two seconds), by default where `penstock serve` looks for it."""
    target = folder or home / "checkpoints" / TINY_MODEL
    builder = Path(__file__).parent / "tiny" / "build.py"
    done = subprocess.run([str(environment_folder(home) / "bin" / "python"), str(builder), str(target)], check=False)
    sys.exit(done.returncode)
