"""`scripts/apt.sh` on a machine where somebody else is installing: it waits, for the lists' lock by itself and for dpkg's by apt's own
means."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.support.processes import ROOT

LOCKED = "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 1 (apt-get)"


def run(folder: Path, update: str, wait_s: int = 60) -> tuple[subprocess.CompletedProcess[str], str]:
    """With an apt-get that is a script (its `update` is given), on a machine that has nothing; and what it was asked."""
    path = folder / "bin"
    path.mkdir()
    for name in ("bash", "sh", "sleep", "cat", "rm"):
        found = shutil.which(name)
        assert found is not None
        (path / name).symlink_to(found)
    calls = folder / "calls"
    (path / "id").write_text("#!/bin/sh\necho 0\n")
    (path / "apt-get").write_text(f'#!/bin/sh\necho "$@" >>{calls}\n[ "$1" != update ] && exit 0\n{update}\n')
    for script in ("id", "apt-get"):
        (path / script).chmod(0o755)
    environment = {"PATH": str(path), "APT_WAIT_S": str(wait_s)}
    done = subprocess.run([path / "bash", ROOT / "scripts" / "apt.sh"], env=environment, capture_output=True, text=True, timeout=120)
    return done, calls.read_text()


def test_it_waits_for_whoever_holds_the_lock(tmp_path: Path) -> None:
    left = tmp_path / "left"
    left.write_text("x\n")
    done, asked = run(tmp_path, f'[ -e {left} ] && {{ rm {left}; echo "{LOCKED}" >&2; exit 100; }}\nexit 0')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("waiting for another apt-get to end") == 1
    *updates, install = asked.splitlines()
    assert updates == ["update -qq"] * 2
    assert install.startswith("-o DPkg::Lock::Timeout=60 install -y ")
    assert " redis-server" in install


def test_it_waits_for_nothing_else_and_not_for_ever(tmp_path: Path) -> None:
    for folder, update, wait_s, words in (
        ("broken", 'echo "E: The repository is gone" >&2; exit 100', 60, "The repository is gone"),
        ("held", f'echo "{LOCKED}" >&2; exit 100', 1, "Could not get lock"),
    ):
        (tmp_path / folder).mkdir()
        done, asked = run(tmp_path / folder, update, wait_s)
        assert done.returncode == 100
        assert words in done.stderr
        assert "install" not in asked
