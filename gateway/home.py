"""Where the gateway keeps what outlives a process: environments, checkpoints, state; and how state is written, for our own eyes only."""

from __future__ import annotations

import contextlib
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


def state_folder(home: Path) -> Path:
    """Ledger, logs and keys of this machine's engines: a folder that is ours alone (0700), whoever made it. Raises OSError."""
    folder = home / "state"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):  # somebody else's, who has let us in
        folder.chmod(0o700)
    return folder


def private(path: str, flags: int) -> int:
    """An `opener` for files that are ours alone (0600), also one that an earlier version has left open to all. Raises OSError."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    with contextlib.suppress(PermissionError):
        os.fchmod(descriptor, 0o600)
    return descriptor
