"""Where the gateway keeps what outlives a process: environments, checkpoints, state."""

from __future__ import annotations

import os
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def home(environment: dict[str, str] | None = None) -> Path:
    """`PENSTOCK_HOME`; in a checkout, the checkout; else the user's XDG data folder."""
    env = dict(os.environ) if environment is None else environment
    if chosen := env.get("PENSTOCK_HOME"):
        return Path(chosen).resolve()
    if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "requirements").is_dir():
        return _ROOT
    data = env.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(data) / "penstock"
