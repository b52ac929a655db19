"""The two forms of the gateway, compiled and pure Python: which one runs, what says so, and a machine without a compiler."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import gateway as product
from gateway.form import FORM
from gateway.home import home
from scripts import compile as compiling
from tests.support import raw
from tests.support.processes import ROOT, Gateway, Rehearsal, command, environment, gateway

MODULES = compiling.listed(ROOT)


def wheel(folder: Path, root: Path = ROOT, **env: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Build one; what was said, and the names in it."""
    argv = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(argv, cwd=root, env={**os.environ, **env}, capture_output=True, text=True, timeout=250)
    return done, [name for path in folder.glob("*.whl") for name in zipfile.ZipFile(path).namelist()]


def test_this_run_tests_the_form_that_it_says(form: str) -> None:
    assert form == FORM


@pytest.mark.parametrize("path", MODULES)
def test_every_module_of_the_list_runs_in_that_form(path: str, form: str) -> None:
    found = Path(str(importlib.import_module(path.removesuffix(".py").replace("/", ".")).__file__))
    assert found.suffix == (".so" if form == "compiled" else ".py")
    assert (ROOT in found.parents and ".venv-compiled" not in found.parts) == (form != "compiled")


def test_every_process_of_a_gateway_runs_in_it_and_says_so(wired: Gateway, form: str) -> None:
    assert f"version {product.__version__} ({form})" in wired.output()
    shown = wired.admin("/admin/config").json()
    assert (shown["version"], shown["form"]) == (product.__version__, form)
    said = subprocess.run([sys.executable, "-m", "gateway", "--version"], cwd="/", capture_output=True, text=True, check=True)
    assert said.stdout == f"penstock {product.__version__} ({form})\n"
    (worker,) = wired.workers()
    libraries = {Path(found.path).name.split(".")[0] for found in worker.memory_maps() if found.path.endswith(".so")}
    assert (set(compiling.GROUPS) <= {name.removesuffix("__mypyc") for name in libraries}) == (form == "compiled")


def test_a_worker_runs_what_its_parent_runs_whatever_lies_in_the_folder(tmp_path: Path, scripted_sglang: Rehearsal) -> None:
    with gateway(tmp_path, scripted_sglang.backend()) as running:
        for name in ("gateway", "backends"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("raise SystemExit('a stranger')")
        (worker,) = running.workers()
        assert "-P" in command(worker)
        worker.kill()
        running.wait_ready()
        assert raw.call(running.port, "POST", "/v1/chat/completions", raw.chat("hi")).status == 200


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"CC": "/nowhere/cc"}, "there is no C compiler '/nowhere/cc' (apt-get install gcc)"),
        ({"CC": "false"}, ": error: Command '['false'"),
    ],
)
def test_without_a_compiler_the_wheel_is_pure_and_says_why(tmp_path: Path, env: dict[str, str], words: str) -> None:
    kept = {"PENSTOCK_COMPILED": str(tmp_path / "kept"), **env}
    root = copied(tmp_path / "checkout", ["gateway/wire/trace.py"])
    done, names = wheel(tmp_path / "auto", root, **kept)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "pure" in line]
    assert len(said) == 1
    assert said[0].startswith("penstock: stays pure Python")
    assert words in said[0]
    assert "gateway/wire/trace.py" in names
    assert not [name for name in names if name.endswith(".so")]
    assert next((tmp_path / "auto").glob("*.whl")).name.endswith("-py3-none-any.whl")
    done, names = wheel(tmp_path / "insisted", root, **kept, PENSTOCK_FORM="compiled")
    assert done.returncode != 0
    assert words in done.stderr
    assert names == []


def test_pure_python_can_be_asked_for_and_other_words_are_refused(tmp_path: Path) -> None:
    done, names = wheel(tmp_path / "pure", PENSTOCK_FORM="pure")
    assert done.returncode == 0, done.stderr
    assert names
    assert not [name for name in names if name.endswith(".so")]
    done, _ = wheel(tmp_path / "wrong", PENSTOCK_FORM="rust")
    assert done.returncode != 0
    assert "PENSTOCK_FORM is 'rust'; it may be 'compiled' or 'pure'" in done.stderr


@pytest.mark.slow
def test_an_unchanged_tree_is_compiled_once_and_a_module_that_mypyc_refuses_is_named(tmp_path: Path) -> None:
    kept = {"PENSTOCK_COMPILED": str(tmp_path / "kept"), "PENSTOCK_FORM": "compiled"}
    root = copied(tmp_path / "checkout", ["gateway/wire/trace.py"])
    module = root / "gateway" / "wire" / "trace.py"
    for attempt, compiles in (("first", True), ("again", False), ("changed", True)):
        if attempt == "changed":
            module.write_text(module.read_text() + "\nCHANGED = 1\n")
        done, names = wheel(tmp_path / attempt, root, **kept)
        assert done.returncode == 0, done.stderr
        assert ("compiling 1 modules" in done.stderr) == compiles
        assert [name for name in names if name.startswith("gateway/wire/trace.cpython")]
    module.write_text(module.read_text() + "\nasync def numbers():\n    yield 1\n")
    done, _ = wheel(tmp_path / "refused", root, **kept)
    assert done.returncode != 0
    assert "gateway/wire/trace.py" in done.stderr
    assert "async generators" in done.stderr


@pytest.mark.slow
def test_a_compiled_coroutine_is_cancelled_timed_and_told_of_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "coroutines.py").write_bytes((ROOT / "tests" / "support" / "coroutines.py").read_bytes())
    plays = "import asyncio, sys, coroutines; print(coroutines.__file__, file=sys.stderr); asyncio.run(coroutines.play(print))"

    def played(folder: Path) -> tuple[str, str]:
        done = subprocess.run([sys.executable, "-c", plays], cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout, Path(done.stderr.strip()).suffix

    said, suffix = played(tmp_path)
    assert suffix == ".py"
    assert said.count("\n") == 13
    compile_it = [sys.executable, "-P", str(ROOT / "scripts" / "compile.py"), "--work", str(tmp_path / "work"), "coroutines.py"]
    subprocess.run(compile_it, cwd=tmp_path, check=True, timeout=200)
    assert played(tmp_path / "work" / "lib") == (said, ".so")


def copied(root: Path, modules: list[str]) -> Path:
    """A checkout that compiles these alone."""
    for name in ("gateway", "middleware", "backends", "openapi"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("scripts/compile.py", "README.md", "LICENSE"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    head, _, rest = (ROOT / "pyproject.toml").read_text().partition("modules = [\n")
    (root / "pyproject.toml").write_text(f"{head}modules = {modules}\n{rest.partition(chr(10) + ']')[2]}")
    return root


def test_a_checkout_is_found_from_its_environment_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert home({"XDG_DATA_HOME": str(tmp_path)}) == ROOT
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import gateway.home as h; print(h.home())"],
        env={name: value for name, value in environment().items() if name != "PENSTOCK_HOME"},
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(done.stdout.strip()) == ROOT
