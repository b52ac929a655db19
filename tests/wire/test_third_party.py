"""The worked example of docs/backends.md, as a stranger would use it: built, installed, held to the contract, served from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tests.support.processes import ROOT, environment, gateway

EXAMPLE = ROOT / "docs" / "example-backend"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example installed from its wheel, beside the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("example")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=EXAMPLE, check=True, capture_output=True)
    (wheel,) = folder.glob("penstock_parrot-*.whl")
    site = folder / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return site


@pytest.mark.slow
def test_it_holds_the_contract(installed: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
        "--rootdir",
        str(tmp_path),
        str(EXAMPLE / "tests"),
    ]
    run = subprocess.run(command, cwd=tmp_path, env=environment(PYTHONPATH=str(installed)), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


def test_it_serves(installed: Path, tmp_path: Path) -> None:
    config = {"models": {"polly": {"backend": "cage"}}, "backends": {"cage": {"kind": "parrot"}}}
    with (
        gateway(tmp_path, config, PYTHONPATH=str(installed)) as running,
        openai.OpenAI(base_url=running.base_url, api_key="none", max_retries=0) as client,
    ):
        said = client.chat.completions.create(model="polly", messages=[{"role": "user", "content": "pretty polly"}])
        assert said.choices[0].message.content == "pretty polly"
        chunks = client.chat.completions.create(model="polly", messages=[{"role": "user", "content": "pretty polly"}], stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "pretty polly "
        with pytest.raises(openai.BadRequestError, match="do not take orders"):
            client.chat.completions.create(model="polly", messages=[{"role": "user", "content": "fly"}])
        with pytest.raises(openai.NotFoundError, match="no backend here serves it"):
            client.embeddings.create(model="polly", input="x")


def test_without_it_the_kind_is_refused_with_what_is_installed(tmp_path: Path) -> None:
    file = tmp_path / "penstock.yaml"
    file.write_text('{"models": {"polly": {"backend": "cage"}}, "backends": {"cage": {"kind": "parrot"}}}')
    command = [sys.executable, "-m", "gateway", "check", "-c", str(file)]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "unknown kind 'parrot'" in run.stderr
    assert "scripted" in run.stderr
