"""The worked example of docs/backends.md, as a stranger would use it: built, installed, held to the contract, served from."""

from __future__ import annotations

import re
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


ODD = """
from gateway.plugin import Backend, Endpoint, Plugin, Reply, Stats, Gpu, Target
from penstock_parrot import Config, Parrot

DETAILS = {"engine": "vLLM 0.11", "state": 5, "machine": ["no", "such"], "gpus": None, "": {"a": [1, {"b": None}]}, "\\u001b[2J": "\\u0000"}


class Odd(Parrot):
    def targets(self):
        return [Target("odd/one", stats=Stats(running_requests=3, gpus=(Gpu(7, power_watts=123.5),)), details=DETAILS),
                Target("odd/none", details={"machine": 7})]


plugin = Plugin("odd", Config, lambda name, config, env: Odd(name, config))
"""


@pytest.fixture(scope="module")
def with_odd(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside the example a plugin whose targets say of themselves whatever they like."""
    site = tmp_path_factory.mktemp("odd")
    (site / "penstock_odd.py").write_text(ODD)
    info = site / "penstock_odd-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: penstock-odd\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[penstock.backends]\nodd = penstock_odd:plugin\n")
    return site


def test_what_a_target_says_of_itself_breaks_nothing(installed: Path, with_odd: Path, tmp_path: Path) -> None:
    """Its stats are numbers for metrics; its details are for people alone, in whatever words and shapes."""
    config = {"models": {"polly": {"backend": "cage"}}, "backends": {"cage": {"kind": "odd"}}}
    with gateway(tmp_path, config, PYTHONPATH=f"{installed}:{with_odd}") as running:
        metrics = running.admin("/metrics")
        assert metrics.status == 200
        text = metrics.body.decode()
        assert re.search(r'penstock_\w*running_requests\{backend="cage",host="odd/one"\} 3', text)
        assert re.search(r'penstock_gpu_power_watts\{backend="cage",host="odd/one",gpu="7"\} 123.5', text)
        assert 'running_requests{backend="cage",host="odd/none"}' not in text, "what nobody knows is not zero"
        hosts = {row["id"]: row for row in running.admin("/admin/hosts").json()["hosts"]}
        assert hosts["odd/one"]["details"]["engine"] == "vLLM 0.11"
        assert hosts["odd/none"]["details"] == {"machine": 7}
        for page in ("/admin/workers", "/admin/config", "/admin/usage"):
            assert running.admin(page).status == 200


def test_without_it_the_kind_is_refused_with_what_is_installed(tmp_path: Path) -> None:
    file = tmp_path / "penstock.yaml"
    file.write_text('{"models": {"polly": {"backend": "cage"}}, "backends": {"cage": {"kind": "parrot"}}}')
    command = [sys.executable, "-m", "gateway", "check", "-c", str(file)]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "unknown kind 'parrot'" in run.stderr
    assert "scripted" in run.stderr
