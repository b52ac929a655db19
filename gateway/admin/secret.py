"""The admin key that a gateway makes for itself, so that its admin API is never without one: made at the first start, kept in a file that
only the gateway's user can read, found there by every command on the same machine."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from gateway.access import keys

# What is shorter than this was not made by us, and can be guessed.
_SHORTEST = 16


def path(home: Path) -> Path:
    """Where it is kept."""
    return home / "state" / "admin.key"


def read(file: Path) -> str:
    """The key in a file; raises OSError, or ValueError where there is none in it."""
    secret = file.read_text(encoding="utf-8").strip()
    if len(secret) < _SHORTEST:
        raise ValueError(f"{file} holds no key: delete it, and the next start makes one")
    return secret


def make(home: Path) -> str:
    """The key that was made earlier, or a new one; of several gateways that start at once with one home all get the same. Raises OSError
    or ValueError."""
    file = path(home)
    file.parent.mkdir(parents=True, exist_ok=True)
    _confine(file.parent, 0o700)
    if not file.exists():
        _write(file)
    _confine(file, 0o600)
    if file.stat().st_uid not in (os.geteuid(), 0):
        raise ValueError(f"{file} belongs to another user, who knows what is in it")
    return read(file)


def _write(file: Path) -> None:
    secret, _ = keys.new_secret()
    descriptor, name = tempfile.mkstemp(prefix="admin.", dir=file.parent)  # which makes it 0600
    try:
        with os.fdopen(descriptor, "w") as out:
            out.write(f"{secret}\n")
        with contextlib.suppress(FileExistsError):
            os.link(name, file)  # all or nothing, and never over another's
    finally:
        Path(name).unlink()


def _confine(path: Path, mode: int) -> None:
    """For nobody but us, where it is ours; a folder that a container mounts may be root's."""
    found = path.stat()
    if found.st_uid == os.geteuid() and found.st_mode & 0o7777 != mode:
        path.chmod(mode)
