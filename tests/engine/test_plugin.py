"""The CPU plugin as an installed distribution in the engine's environment: found by SGLang, pinned, and in nobody's way."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import msgspec

from backends.sglang_dsv3.config import Engine
from backends.sglang_dsv3.engine import environment_folder, known, launch, symptoms
from tests.support.processes import ROOT, environment

PYTHON = environment_folder(ROOT) / "bin" / "python"


def run(program: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`program` in the engine's environment, far from the checkout."""
    settings = {**environment(), "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([PYTHON, "-c", program], capture_output=True, text=True, cwd=folder, env=settings, timeout=120)


def test_it_is_a_distribution_of_its_own_with_pinned_versions(tmp_path: Path) -> None:
    done = run(
        "import importlib.metadata as m, json; d = m.distribution('penstock-sglang-cpu');"
        "print(json.dumps([d.requires, [e.value for e in m.entry_points(group='sglang.srt.plugins')]]))",
        tmp_path,
    )
    assert json.loads(done.stdout) == [["sglang==0.5.23", "torch==2.13.0"], ["penstock_sglang_cpu:activate"]]


def test_every_pinned_name_is_where_it_was_and_a_moved_one_is_named(tmp_path: Path) -> None:
    """Takes each name away in turn: the check must miss exactly that one; and a changed signature; and activate must end the process."""
    done = run(
        """
import importlib, sys
import penstock_sglang_cpu
from penstock_sglang_cpu import pinned
assert pinned.problems() == [], pinned.problems()
for module, dotted, parameters in pinned.NAMES:
    owner = importlib.import_module(module)
    *path, last = dotted.split('.')
    for part in path:
        owner = getattr(owner, part)
    if not hasattr(owner, '__members__'):  # a member of an enumeration cannot be taken away
        kept = vars(owner)[last]
        delattr(owner, last)
        found = pinned.problems()
        assert any(f'{module}.{dotted} is gone' in line for line in found), (dotted, found)
        if parameters is not None:
            setattr(owner, last, staticmethod(lambda other: None) if path else (lambda other: None))
            assert any(f'{module}.{dotted} takes (other)' in line for line in pinned.problems()), dotted
        setattr(owner, last, kept)
        print('checked', dotted)
from sglang.srt.layers.moe import fused_moe_native
del fused_moe_native.moe_forward_native
penstock_sglang_cpu.activate()
print('not reached')
""",
        tmp_path,
    )
    assert done.returncode == 1
    assert "does not fit this SGLang" in done.stderr
    assert "fused_moe_native.moe_forward_native is gone" in done.stderr
    assert done.stdout.count("checked ") == 15
    assert "not reached" not in done.stdout


def test_a_real_sgl_kernel_is_never_shadowed(tmp_path: Path) -> None:
    (tmp_path / "sgl_kernel").mkdir()
    (tmp_path / "sgl_kernel" / "__init__.py").write_text("REAL = True\n")
    assert run("import sgl_kernel; print(sgl_kernel.REAL)", tmp_path).stdout == "True\n"


def test_the_stand_in_is_truthful(tmp_path: Path) -> None:
    done = run(
        "import sgl_kernel; print(hasattr(sgl_kernel, 'rmsnorm'), hasattr(sgl_kernel, 'copy_all_layer_kv_cache_cpu'))\n"
        "try: sgl_kernel.copy_all_layer_kv_cache_cpu()\n"
        "except NotImplementedError as error: print(error)\n"
        "try: import sgl_kernel.anything\n"
        "except ImportError: print('no such module')\n",
        tmp_path,
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "False True"
    assert "the CPU engine has none" in lines[1]
    assert lines[2] == "no such module"


def test_without_the_switch_nothing_is_touched(tmp_path: Path) -> None:
    done = run("import sys; print('penstock_sglang_cpu.imports' in sys.modules)\nimport sgl_kernel", tmp_path, SGLANG_USE_CPU_ENGINE="0")
    assert done.stdout == "False\n"
    assert "No module named 'sgl_kernel'" in done.stderr


def test_every_flag_we_pass_is_one_that_sglang_knows(tmp_path: Path) -> None:
    """Of the CPU engine, and of the hosts in `deploy/engine`, whose command lines are golden files; values are checked too."""
    lines = [launch.command(Engine(tp_size=4, extra_args=["--random-seed", "1"]), ROOT, tmp_path, "m", 1)[3:]]
    for golden in sorted((ROOT / "tests" / "data" / "engine").glob("*.txt")):
        words = shlex.split(golden.read_text().replace("\\\n", " "))
        lines.append([word for word in words[words.index("sglang.launch_server") + 1 :] if word != "SECRETS.yaml"])
    lines = [[word for word in line if word != "--config"] for line in lines]
    program = f"""
import argparse
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser(allow_abbrev=False)
ServerArgs.add_cli_args(parser)
for line in {lines!r}:
    known, unknown = parser.parse_known_args(line)
    print(unknown, known.tp_size, known.nnodes, known.otlp_traces_endpoint)
parser.parse_args(["--model-path", "x", "--config", "y"]) if "--config" in parser._option_string_actions else print("no --config")
"""
    done = run(program, tmp_path)
    shown = done.stdout.splitlines()[-len(lines) :]
    assert all(line.startswith("[] ") for line in shown), done.stdout + done.stderr
    assert shown[0] == "[] 4 1 localhost:4317"
    assert {line.split()[1] for line in shown[1:]} == {"4", "8", "16"}


def test_what_is_recorded_of_sglang_is_what_the_installed_one_says(tmp_path: Path) -> None:
    """Unit tests go by the recorded answer. When the pin is raised this names what moved; `ask.py` prints the new record."""
    done = run(known.ASK.read_text(), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    now = msgspec.json.decode(done.stdout.strip().rpartition("\n")[2], type=known.Known)
    then = msgspec.json.decode((ROOT / "tests" / "data" / "engine" / "known-0.5.23.json").read_bytes(), type=known.Known)
    moved = [flag for flag in {*now.flags, *then.flags} if sorted(now.flags.get(flag, ["gone"])) != sorted(then.flags.get(flag, ["gone"]))]
    assert sorted(moved) == []  # SGLang makes some lists of words from sets: their order is nobody's
    assert msgspec.structs.replace(now, flags={}) == msgspec.structs.replace(then, flags={})


def test_words_of_an_engines_end_are_those_of_the_installed_packages() -> None:
    packages = next((ROOT / ".venv-engine" / "lib").glob("python3*/site-packages"))
    named = [symptom for symptom in symptoms.SYMPTOMS if symptom.source]
    assert len(named) >= 6
    for symptom in named:
        text = (packages / symptom.source).read_text()
        assert symptom.words in text, f"{symptom.source} does not say {symptom.words!r} any more"


def test_what_is_installed_is_not_installed_again(tmp_path: Path) -> None:
    without_home = {name: value for name, value in environment().items() if name != "PENSTOCK_HOME"}  # as our own error message says it
    done = subprocess.run(
        [sys.executable, "-m", "gateway", "engine", "install"], capture_output=True, text=True, cwd=tmp_path, env=without_home, timeout=30
    )
    assert (done.returncode, done.stdout) == (0, "")
