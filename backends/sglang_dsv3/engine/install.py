"""The engine's environment: SGLang and a CPU build of torch, from a lock file, beside the gateway's own.

    torch, alone        from PyTorch's CPU index when that is reachable, else from whatever pip is set up with
    everything else     from `lock-cpu.txt`, with hashes and without resolving
    the CPU plugin      from the folder `cpu_plugin`, as a distribution of its own

torch is asked for as `2.13.0+cpu`, a version that only CPU builds carry: a CUDA build, which is what PyPI has, can never be chosen, so
that no gigabytes are downloaded to find out.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from backends.sglang_dsv3.engine import environment_folder

HERE = Path(__file__).parent
LOCK = HERE / "lock-cpu.txt"
PLUGIN = HERE / "cpu_plugin"
TORCH = "torch==2.13.0+cpu"
# For GPUs: the packages that SGLang's own metadata names. Never installed on a machine of ours, none of which has a GPU.
CUDA = "sglang==0.5.23"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# About 660 MB of wheels become 2.7 GB on disk (2026-11-23); pip wants room for both.
NEEDED_BYTES = 5 << 30

Say = Callable[[str], None]


class InstallError(Exception):
    """Why the environment cannot be made, in a line for the operator."""


def fingerprint() -> str:
    """Changes whenever what should be installed changes: torch's version, the lock, or the plugin's sources."""
    digest = hashlib.sha256(f"{TORCH} python {sys.version_info[:2]}".encode())
    for file in [LOCK, *sorted(path for path in PLUGIN.rglob("*") if path.is_file() and path.suffix in (".py", ".toml", ".pth"))]:
        digest.update(file.relative_to(HERE).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def installed(home: Path) -> bool:
    """Whether the environment is there and is what this version wants."""
    folder = environment_folder(home)
    try:
        return (folder / "penstock-fingerprint").read_text() == fingerprint() and (folder / "bin" / "python").exists()
    except OSError:
        return False


def install(home: Path, say: Say, device: str = "cpu") -> None:
    """Make the environment unless it is current; raises InstallError."""
    folder = environment_folder(home)
    if device == "cuda":
        _install_cuda(home, folder, say)
        return
    if installed(home):
        return
    _check_machine(home)
    started = time.monotonic()
    if not (folder / "bin" / "python").exists():
        say(f"making {folder}")
        _run([sys.executable, "-m", "venv", str(folder)], "python3-venv is missing? On Debian and Ubuntu: apt-get install python3-venv")
    python = str(folder / "bin" / "python")
    if not _torch_is_right(python):
        say(f"installing {TORCH} (about 190 MB)")
        install_torch(python, say)
    say(f"installing SGLang 0.5.23 and what it imports ({_count(LOCK)} wheels, about 470 MB; the longest step, two to five minutes)")
    _pip(python, "install", "--no-deps", "--require-hashes", "-r", str(LOCK))
    say("installing the CPU plugin")
    with tempfile.TemporaryDirectory() as scratch:  # a build leaves files beside its sources, which may be read-only
        copy = shutil.copytree(PLUGIN, Path(scratch) / "plugin")
        _pip(python, "install", "--no-deps", "--no-build-isolation", "--force-reinstall", str(copy))
    (folder / "penstock-fingerprint").write_text(fingerprint())
    say(f"the engine's environment is complete after {time.monotonic() - started:.0f} s")


def _install_cuda(home: Path, folder: Path, say: Say) -> None:
    """SGLang as its makers publish it, with the CUDA packages it asks for. Refused where there is no NVIDIA driver: those are gigabytes
    that such a machine cannot use."""
    if not Path("/proc/driver/nvidia/version").exists():
        raise InstallError("this machine has no NVIDIA driver, and the CUDA packages are several gigabytes: use --device cpu")
    mark, wanted = folder / "penstock-fingerprint", f"cuda {CUDA}"
    if mark.exists() and mark.read_text() == wanted:
        return
    if mark.exists():
        raise InstallError(f"{folder} is there for another device: remove it first")
    home.mkdir(parents=True, exist_ok=True)
    say(f"making {folder}")
    _run([sys.executable, "-m", "venv", str(folder)], "python3-venv is missing? On Debian and Ubuntu: apt-get install python3-venv")
    say(f"installing {CUDA} and what it asks for (several gigabytes)")
    _pip(str(folder / "bin" / "python"), "install", CUDA)
    mark.write_text(wanted)


def _check_machine(home: Path) -> None:
    if platform.machine() != "x86_64":
        raise InstallError(f"SGLang's CPU wheels are for x86_64, this machine is {platform.machine()}")
    libc, version = platform.libc_ver()
    if libc != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < (2, 34):
        raise InstallError(f"SGLang's wheels need glibc 2.34 or later (Debian 12, Ubuntu 22.04), this machine has {libc} {version}")
    home.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(home).free
    if free < NEEDED_BYTES:
        raise InstallError(f"{home} has {free >> 30} GB free, the engine's environment needs {NEEDED_BYTES >> 30} GB while it is made")


def _torch_is_right(python: str) -> bool:
    """Whether the environment's torch is the wanted version and no CUDA build; read from its version file, since importing torch
    needs the packages that come after it."""
    probe = (
        "import importlib.util, pathlib, runpy; spec = importlib.util.find_spec('torch'); "
        "v = runpy.run_path(str(pathlib.Path(spec.origin).with_name('version.py'))); "
        "print(v['__version__'], v['cuda'] is None)"
    )
    done = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=False)
    return done.stdout.split() == [TORCH.partition("==")[2], "True"]


def install_torch(python: str, say: Say) -> None:
    """Install the CPU build; raises InstallError, with what to do, when only a CUDA build is to be had."""
    source = ["--index-url", CPU_INDEX] if _reachable(f"{CPU_INDEX}/torch/") else []
    if not source:
        say("PyTorch's CPU index cannot be reached; asking the package index that pip is set up with")
    try:
        _pip(python, "install", "--no-deps", *source, TORCH)
    except InstallError as error:
        raise InstallError(
            f"no CPU build of torch is to be had here. The torch that PyPI offers is a CUDA build with gigabytes of packages that this "
            f"machine cannot use, so nothing was installed. Make {CPU_INDEX} reachable, or put the wheel of {TORCH} into a folder and set "
            f"PIP_FIND_LINKS to it.\n{error}"
        ) from None
    if not _torch_is_right(python):
        raise InstallError(f"pip installed a torch that is not the CPU build of {TORCH}")


def _reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5.0):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 400
    except OSError:
        return False


def _count(lock: Path) -> int:
    return sum("==" in line for line in lock.read_text().splitlines() if not line.startswith("#"))


def _pip(python: str, *arguments: str) -> None:
    # Byte code is compiled while installing, whatever the caller's habits: without it every start of SGLang takes twice as long.
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONDONTWRITEBYTECODE", "PIP_NO_COMPILE", "PIP_USER")}
    _run([python, "-m", "pip", "--disable-pip-version-check", *arguments, "--quiet", "--no-input"], "", env)


def _run(argv: list[str], hint: str, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        last = "\n".join(line for line in done.stdout.strip().splitlines() if not line.startswith("WARNING: Location"))[-2000:]
        raise InstallError(f"{' '.join(argv[:6])} ... failed:\n{last}\n{hint}".rstrip())
