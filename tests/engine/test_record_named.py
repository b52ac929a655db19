"""The recorded streams of messages and responses are what the installed SGLang writes."""

from __future__ import annotations

import subprocess
from pathlib import Path

from backends.sglang_dsv3.engine import environment_folder
from tests.support.processes import GOLDEN, ROOT, environment

PYTHON = environment_folder(ROOT) / "bin" / "python"


def test_recorded_streams_are_those_of_the_installed_sglang(tmp_path: Path) -> None:
    env = {**environment(), "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
    script = ROOT / "tests" / "engine" / "record_named.py"
    done = subprocess.run([PYTHON, script, tmp_path / "now"], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    now = {path.name: path.read_text() for path in (tmp_path / "now").iterdir()}
    assert len(now) == 10
    assert now == {name: (GOLDEN / name).read_text() for name in now}, f"{script} writes them anew"
