#!/usr/bin/env python3
"""Compiles the modules that pyproject.toml lists, with mypyc, while a wheel is built: a build hook of hatchling's.

The sources stay as they are, and an editable install runs them. Libraries are kept below build/compiled by a digest of all that went into
them, so that an unchanged tree is compiled once; C files, objects and mypy's cache are kept too, so that a changed one takes less. Where it
cannot be done (no C compiler, no Python.h, an error) the wheel is pure Python and one line says why. Environment:

    PENSTOCK_FORM      `compiled`: fail rather than fall back; `pure`: compile nothing
    PENSTOCK_COMPILED  the folder to keep things in, instead of build/compiled

    python scripts/compile.py --check      whether mypyc takes every module, and why not; no C compiler runs
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Two files of C are compiled side by side, and what a backend does seldom calls what the gateway does. One group for each module takes
# twice as long, since each carries mypyc's runtime; docs/performance.md has the figures.
GROUPS = {"penstock_gateway": ("gateway", "middleware"), "penstock_backends": ("backends",)}
# Warnings are mypyc's own affair, and another compiler has other warnings.
FLAGS = ("-w",)
KEPT = 4
WHAT_IT_COSTS = "a request takes about a third more CPU"


class CannotCompileError(Exception):
    """Why, in words for an operator."""


class CompileHook(BuildHookInterface[Any]):
    """Adds the compiled modules to a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Nothing for an editable install, whose sources change under it."""
        wanted = os.environ.get("PENSTOCK_FORM") or "auto"
        if wanted not in ("auto", "compiled", "pure"):
            raise ValueError(f"PENSTOCK_FORM is '{wanted}'; it may be 'compiled' or 'pure'")
        if version == "editable" or wanted == "pure":
            return
        root = Path(self.root)
        try:
            libraries = compiled(root, listed(root))
        except CannotCompileError as error:
            if wanted == "compiled":
                raise
            self.app.display_warning(f"penstock: stays pure Python, {WHAT_IT_COSTS}: {error}")
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        for path in sorted(libraries.rglob("*.so")):
            build_data["force_include"][str(path)] = str(path.relative_to(libraries))


def listed(root: Path) -> list[str]:
    """The modules to compile, as paths below `root`: the one table, in pyproject.toml."""
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    patterns = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["custom"]["modules"]
    found: list[str] = []
    for pattern in patterns:
        paths = sorted(path for path in root.glob(pattern) if path.name != "__init__.py")
        if not paths:
            raise CannotCompileError(f"pyproject.toml lists {pattern}, which is not there")
        found += [str(path.relative_to(root)) for path in paths]
    return found


def compiled(root: Path, modules: list[str]) -> Path:
    """A folder with every library, laid out as in a wheel; compiled unless it is there already. Raises CannotCompileError."""
    _look_for_tools()
    kept = Path(os.environ.get("PENSTOCK_COMPILED") or root / "build" / "compiled")
    kept.mkdir(parents=True, exist_ok=True)
    tools = _tools(root)
    folder = kept / _digest(root, modules, tools)
    with _alone(kept):
        if not folder.exists():
            # One that other tools made would be taken for what these make.
            work = kept / f"work-{hashlib.sha256(tools.encode()).hexdigest()[:12]}"
            made = _compile(root, modules, work)
            fresh = kept / "fresh"
            shutil.rmtree(fresh, ignore_errors=True)
            for path in made:
                (fresh / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(work / "lib" / path, fresh / path)
            fresh.rename(folder)
        folder.touch()
        _forget(kept)
    return folder


def _look_for_tools() -> None:
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        raise CannotCompileError(f"there is no C compiler '{compiler}' (apt-get install gcc)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise CannotCompileError("there is no Python.h for this Python (apt-get install python3-dev)")
    try:
        importlib.metadata.version("mypy")
        importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError as error:
        raise CannotCompileError(f"the package {error.name} is not installed") from None


def _tools(root: Path) -> str:
    """What compiles, and whose types are read."""
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    names = ["mypy", "setuptools", *(re.split(r"[^\w.-]", line)[0] for line in settings["project"]["dependencies"])]
    versions: list[str] = []
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    surroundings = [os.environ.get(name, "") for name in ("CC", "CFLAGS", "LDFLAGS")]
    return "\n".join([sys.version, platform.platform(), *surroundings, *versions, Path(__file__).read_text()])


def _digest(root: Path, modules: list[str], tools: str) -> str:
    """Of the tools and of every source: types come from those that are not compiled, too."""
    found = hashlib.sha256("\n".join([tools, *modules]).encode())
    for path in sorted(path for top in ("gateway", "middleware", "backends") for path in (root / top).rglob("*.py")):
        found.update(f"\n{path.relative_to(root)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:24]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _forget(kept: Path) -> None:
    """All but the last few."""
    for pattern, count in (("[0-9a-f]" * 24, KEPT), ("work-*", 2)):
        for old in sorted(kept.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)[count:]:
            shutil.rmtree(old)


def _compile(root: Path, modules: list[str], work: Path) -> list[str]:
    """Run mypyc and the C compiler in a process of their own; the libraries, as paths below `work`/lib."""
    work.mkdir(exist_ok=True)
    work.touch()
    print(f"penstock: compiling {len(modules)} modules (half a minute; once for each change)", file=sys.stderr, flush=True)
    said = work / "log"
    with said.open("w") as out:
        command = [sys.executable, "-P", __file__, "--work", str(work), *modules]
        done = subprocess.run(command, cwd=root, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        lines = said.read_text(errors="replace").splitlines() or [f"it ended with {done.returncode}"]
        wrong = next((line for line in lines if re.search(r"[Ee]rror: ", line)), lines[-1])
        raise CannotCompileError(f"{wrong} (all of it: {said})")
    found: list[str] = json.loads((work / "made.json").read_text())
    return found


def _extensions(modules: list[str], work: Path) -> Any:
    """C for every module, by mypyc, below `work`/c. Exits with its messages when there is an error."""
    import gc

    from mypyc.build import mypycify

    gc.disable()  # a third of the time otherwise goes into looking for garbage
    groups = [([path for path in modules if path.split("/")[0] in tops], name) for name, tops in GROUPS.items()]
    options = ["--config-file=", "--ignore-missing-imports", f"--cache-dir={work / 'mypy'}"]
    return mypycify(
        [*options, *modules],
        opt_level="2",
        debug_level="0",
        separate=[group for group in groups if group[0]],
        target_dir=str(work / "c"),
    )


def _build(modules: list[str], work: Path) -> None:
    from setuptools import Distribution
    from setuptools.errors import CompileError, LinkError

    extensions = _extensions(modules, work)
    for extension in extensions:
        extension.extra_compile_args += FLAGS
    command: Any = Distribution({"ext_modules": extensions}).get_command_obj("build_ext")
    command.build_lib, command.build_temp = str(work / "lib"), str(work / "objects")
    command.parallel = os.cpu_count()
    command.ensure_finalized()
    try:
        command.run()
    except (CompileError, LinkError) as error:
        sys.exit(f"error: {error}")
    made = [str(Path(path).relative_to(work / "lib")) for path in command.get_outputs()]
    (work / "made.json").write_text(json.dumps(made))


def main(arguments: list[str]) -> None:
    """Of the process that compiles, or of a check."""
    root = Path(__file__).resolve().parents[1]
    if arguments == ["--check"]:
        os.chdir(root)
        work = root / "build" / "compiled" / "check"
        work.mkdir(parents=True, exist_ok=True)
        modules = listed(root)
        _extensions(modules, work)
        print(f"mypyc takes all of the {len(modules)} modules that pyproject.toml lists")
    else:
        _build(arguments[2:], Path(arguments[1]))
    sys.stdout.flush()
    os._exit(0)  # taking down what mypy has built would take seconds


if __name__ == "__main__":
    main(sys.argv[1:])
