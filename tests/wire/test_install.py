"""The engine's installation: what it refuses, with a real pip and no network."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from backends.sglang_dsv3.engine import environment_folder, install

pytestmark = pytest.mark.slow


def wheel(folder: Path, version: str, cuda: str | None) -> None:
    """A torch that weighs nothing: what pip and the check look at, and no more."""
    name = f"torch-{version}"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as out:
        out.writestr("torch/__init__.py", "")
        out.writestr("torch/version.py", f"__version__ = {version!r}\ncuda = {cuda!r}\n")
        out.writestr(
            f"{name}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\nRequires-Dist: nvidia-cudnn-cu13\n"
        )
        out.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        out.writestr(f"{name}.dist-info/RECORD", "")


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with pip and nothing else."""
    folder = tmp_path_factory.mktemp("install")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    return folder / "venv"


@pytest.fixture
def python(tmp_path: Path, empty: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty environment whose pip knows one folder and nothing else."""
    shutil.copytree(empty, tmp_path / "venv", symlinks=True)
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setattr(install, "CPU_INDEX", "http://127.0.0.1:9")
    return str(tmp_path / "venv" / "bin" / "python")


def installed(python: str) -> str:
    return subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout.strip()


def test_a_cuda_build_is_refused_with_what_to_do_and_nothing_is_installed(tmp_path: Path, python: str) -> None:
    wheel(tmp_path / "wheels", "2.13.0", "13.0")
    said: list[str] = []
    with pytest.raises(install.InstallError, match="PIP_FIND_LINKS") as refused:
        install.install_torch(python, said.append)
    assert "CUDA" in str(refused.value)
    assert "cannot be reached" in said[0]
    assert installed(python) == ""


def test_the_cpu_build_is_preferred_and_taken(tmp_path: Path, python: str) -> None:
    wheel(tmp_path / "wheels", "2.13.0", "13.0")
    wheel(tmp_path / "wheels", "2.13.0+cpu", None)
    install.install_torch(python, lambda text: None)
    assert "2.13.0+cpu" in installed(python)


def test_a_wheel_that_lies_about_being_a_cpu_build_is_found_out(tmp_path: Path, python: str) -> None:
    wheel(tmp_path / "wheels", "2.13.0+cpu", "13.0")
    with pytest.raises(install.InstallError, match="not the CPU build"):
        install.install_torch(python, lambda text: None)


def test_too_little_room_is_said_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "NEEDED_BYTES", 1 << 60)
    with pytest.raises(install.InstallError, match="GB free"):
        install.install(tmp_path, lambda text: None)
    assert not environment_folder(tmp_path).exists()


def test_the_lock_holds_no_cuda_package_and_every_line_a_hash() -> None:
    entries = install.LOCK.read_text().split("\n\n")[0].replace("\\\n", " ").splitlines()
    names = [entry.split("==")[0] for entry in entries if "==" in entry]
    assert {"sglang", "opentelemetry-sdk", "opentelemetry-exporter-otlp"} <= set(names)
    assert [name for name in names if name.startswith(("nvidia-", "cuda-")) and name != "nvidia-ml-py"] == []
    assert all("--hash=sha256:" in entry for entry in entries if "==" in entry)
