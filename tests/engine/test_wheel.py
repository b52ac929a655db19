"""The built wheel, installed into a clean environment, serves the real engine once: nothing in it needs the checkout."""

from __future__ import annotations

import importlib.machinery
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from backends.sglang_dsv3.engine import environment_folder
from scripts import compile as compiling
from tests.support import raw
from tests.support.processes import ROOT, gateway


def test_the_wheel_serves(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "PENSTOCK_FORM": "compiled"})
    (wheel,) = tmp_path.glob("penstock-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    engine = "backends/sglang_dsv3/engine"
    for carried in (
        "lock-cpu.txt",
        "tiny/tokenizer.json",
        "tiny/chat_template.jinja",
        "cpu_plugin/pyproject.toml",
        "cpu_plugin/penstock_sglang_cpu.pth",
    ):
        assert f"{engine}/{carried}" in names
    assert not [name for name in names if name.startswith(("tests/", "bench/", "docs/", "scripts/"))]
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    missing = {module.removesuffix(".py") + suffix for module in compiling.listed(ROOT)} - set(names)
    assert not missing, "compiled"

    clean = tmp_path / "clean"
    subprocess.run([sys.executable, "-m", "venv", clean], check=True)
    pip = [str(clean / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--require-hashes", "-r", str(ROOT / "requirements" / "gateway.txt")], check=True, capture_output=True)
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)

    home = tmp_path / "home"
    home.mkdir()
    (home / ".venv-engine").symlink_to(environment_folder(ROOT))  # the one thing that is not made again: it takes minutes
    with gateway(tmp_path / "run", python=str(clean / "bin" / "python"), PENSTOCK_HOME=str(home)) as running:
        assert "(compiled)" in running.output()
        running.wait_ready()
        assert (home / "checkpoints" / "deepseek-v3-tiny" / "config.json").exists(), "built by the wheel's own builder"
        body = {"model": "deepseek-v3-tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        answer = raw.call(running.port, "POST", "/v1/chat/completions", json.dumps(body).encode())
        assert answer.status == 200
        assert answer.json()["usage"]["completion_tokens"] > 0
