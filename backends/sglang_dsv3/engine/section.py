"""Which `engine` section of a configuration a command is about."""

from __future__ import annotations

from pathlib import Path

from backends.sglang_dsv3.config import Config
from gateway.errors import ConfigError
from gateway.plugin import CommandEnv


def chosen(env: CommandEnv, path: Path, name: str | None) -> tuple[str, Config]:
    """The path of an `engine` section, and the backend's section around it; raises ConfigError."""
    sections = env.sections(path, "sglang_dsv3")
    if name is None and len(sections) != 1:
        raise ConfigError(
            "backends", f"{len(sections)} are of kind sglang_dsv3 ({', '.join(sections) or 'none'}): say which with --backend"
        )
    wanted = name or next(iter(sections))
    if wanted not in sections:
        raise ConfigError("backends", f"none of kind sglang_dsv3 is called '{wanted}' (have: {', '.join(sections)})")
    found: Config = sections[wanted]
    return f"backends.{wanted}.engine", found
