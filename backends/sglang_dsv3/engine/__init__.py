"""Running SGLang: its environment, its command line, its checkpoint, and the supervisor that keeps it alive."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from backends.sglang_dsv3.config import Engine
from gateway.plugin import Service

# The tiny checkpoint's name, as clients see it and as the folder below `checkpoints/` is called.
TINY_MODEL = "deepseek-v3-tiny"


def environment_folder(home: Path) -> Path:
    """The engine's own virtual environment: SGLang pins client libraries that clash with the gateway's."""
    return home / ".venv-engine"


def service(name: str, config: Engine, home: Path) -> Service:
    """The supervisor of one local engine, as a process for the parent to run."""
    settings = msgspec.json.encode(config).decode()
    argv = [sys.executable, "-P", "-m", "backends.sglang_dsv3.engine.supervise", "--name", name, "--home", str(home), "--engine", settings]
    return Service(name=name, argv=argv, grace_s=config.grace_s + 5.0)
