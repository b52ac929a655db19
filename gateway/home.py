"""Where the gateway keeps what outlives a process: environments, checkpoints, state."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Where a checkout may be: around these sources, or around the environment that holds them (`make serve` installs into its `.venv`).
_AROUND = (Path(__file__).resolve().parent.parent, Path(sys.prefix).parent)


def home(environment: dict[str, str] | None = None) -> Path:
    """`PENSTOCK_HOME`; in a checkout, the checkout; else the user's XDG data folder."""
    env = dict(os.environ) if environment is None else environment
    if chosen := env.get("PENSTOCK_HOME"):
        return Path(chosen).resolve()
    for root in _AROUND:
        if (root / "gateway" / "home.py").is_file() and (root / "requirements" / "gateway.txt").is_file():
            return root
    data = env.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(data) / "penstock"
