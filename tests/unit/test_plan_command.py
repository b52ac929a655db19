"""`penstock plan` as a command: what it prints, writes and refuses."""

from __future__ import annotations

import fnmatch
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from backends.sglang_dsv3.engine.monitor import Gpu, Monitor
from backends.sglang_dsv3.engine.plan import published
from gateway import cli
from tests.unit.test_engine_section import configured
from tests.unit.test_plan_start import LOOK

V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "quantization_config": {"quant_method": "fp8"},
    **{key: value for key, value in msgspec.to_builtins(published.model("V3").shape).items() if value is not None},
}


def plan(*words: str) -> Result:
    return CliRunner().invoke(cli.main, ["plan", *words])


def numbers(value: Any, path: str = "") -> Iterator[str]:
    """The path of every number in a document."""
    if isinstance(value, dict):
        for name, below in value.items():
            yield from numbers(below, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from numbers(below, f"{path}.{index}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


def test_every_number_says_where_it_is_from() -> None:
    done = plan("V3", "--gpus", "4xB200", "--target", "ttft 2s, 30 tok/s, 200 users", "--json")
    assert done.exit_code == 0
    said = json.loads(done.stdout)
    found = list(numbers({name: value for name, value in said.items() if name != "basis"}))
    assert len(found) > 150
    for path in found:
        assert any(fnmatch.fnmatchcase(path, pattern) for pattern in said["basis"]), path
    for words in said["basis"].values():
        assert words.startswith(("computed", "published (", "measured (", "as asked"))
    assert [step["batch"] for step in said["steps"]] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


@pytest.mark.parametrize(("gpus", "code", "word"), [("4xH100-80", 1, "does not fit"), ("4xB200", 0, "tight"), ("4xB300", 0, "fits")])
def test_the_exit_code_is_the_verdict(gpus: str, code: int, word: str) -> None:
    done = plan("V3", "--gpus", gpus)
    assert (done.exit_code, done.stdout.splitlines()[0].rpartition(": ")[2]) == (code, word)


def test_what_does_not_fit_names_every_kind_of_thing_that_would() -> None:
    did = plan("V3", "--gpus", "4xH200", "--context", "131072").stdout
    for words in ("--gpus 8xH200", "--gpus 4xB300", "--gpus 2x4xH200", "--quantization w4a8", "V4-Flash --quantization fp8"):
        assert words in did, words
    assert "--quantization nvfp4" not in did, "Hopper has no such arithmetic"
    assert "--quantization nvfp4" in plan("V3", "--gpus", "4xB200").stdout
    long = plan("V3", "--gpus", "4xB200", "--context", "163840").stdout
    assert "one request of 163,840 tokens takes 10.7" in long
    assert "--context 65536" in long
    assert "--kv-cache-dtype fp8_e4m3" in long
    assert "--quantization int8" in plan("V3", "--gpus", "16xA100-80").stdout, "it has the memory and no FP8"


def test_a_plot_is_a_picture(tmp_path: Path) -> None:
    file = tmp_path / "roof.svg"
    assert plan("V3", "--gpus", "8xH200", "--plot", str(file)).exit_code == 0
    root = ET.parse(file).getroot()
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 3


def test_the_gpus_of_this_machine_are_asked_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [Gpu(index, "NVIDIA H200", memory_total=150_754_820_096) for index in range(8)]
    monkeypatch.setattr(Monitor, "count", lambda self: 8)
    monkeypatch.setattr(Monitor, "look", lambda self: msgspec.structs.replace(LOOK, gpus=gpus))
    done = plan("V3", "--json")
    said = json.loads(done.stdout)
    assert (said["gpus"], said["verdict"], said["tp"]) == ("8xH200", "fits", 8)
    assert said["basis"]["room.gpu_gib"].startswith("measured (this machine's driver, 20")
    assert said["room"]["gpu_gib"] == pytest.approx(140.4, abs=0.01)


def test_an_engine_section_is_planned_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / "config.json").write_text(json.dumps(V3))
    path = configured(
        tmp_path, model_path=str(tmp_path / "ck"), gpus=list(range(8)), attn_dp_size=8, context_length=8192, max_running_requests=7,
        memory_fraction=0.85,
    )  # fmt: skip
    said = json.loads(plan("-c", str(path), "--gpus", "8xH200", "--json").stdout)
    assert (said["tp"], said["dp"], said["context"], said["concurrency"], said["room"]["fraction"]) == (8, 8, 8192, 7, pytest.approx(0.85))
    refused = plan("-c", str(path), "--gpus", "4xH200")
    assert refused.exit_code == 2
    assert "backends.dsv3.engine.gpus: names 1 x 8 GPUs, --gpus 4xH200; accepted: as many" in refused.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "either MODEL or -c FILE says what is planned; see penstock plan --help"),
        (["V3"], "--gpus: this machine has no GPU that could be asked; name some; accepted: 8xH200 or 2x8xH100-80, with one of A100"),
        (["V3", "--gpus", "8xH300"], "'8xH300': no H300 is known here; accepted: 8xH200"),
        (["V3", "--gpus", "H200"], "'H200' is no number of GPUs; accepted: 8xH200"),
        (["V3", "--gpus", "8xH100-40"], "'8xH100-40': there is no H100 with 40 GB; accepted: H100-80"),
        (["V3", "--gpus", "0xH100"], "'0xH100' is no number of GPUs; accepted: 1 to 1024"),
        (["V3", "--gpus", "2x8xH100", "--nnodes", "3"], "--nnodes: 3 is not what --gpus 2x8xH100 says; accepted: 2, or leave it out"),
        (["V32", "--gpus", "8xH200"], "'V32' is no folder with a config.json and no model that is known here; accepted: V3, R1, V3.1"),
        (["V3", "--gpus", "8xH200", "--quantization", "fp6"], "--quantization: 'fp6' is not known; accepted: fp8, bf16, int8"),
        (["V3", "--gpus", "8xH200", "--kv-cache-dtype", "fp8_e4m"], "did you mean 'fp8_e4m3'?"),
        (["V3", "--gpus", "8xH200", "--context", "200000"], "--context: 200000 is more than V3 was made for; accepted: 1 to 163840"),
        (["V3", "--gpus", "8xH200", "--tp", "3"], "--tp: 3 ranks are no part of 8xH200; accepted: 1, 2, 4, 8"),
        (["V3", "--gpus", "8xH200", "--dp", "3"], "--dp: 3 does not divide the 8 ranks; accepted: 1, 2, 4, 8"),
        (["V3", "--gpus", "4x8xH200"], "--tp: an expert's 2048 columns over 32 ranks are no whole blocks of 128; add --ep 32"),
        (["V3", "--gpus", "8xH200", "--target", "ttft 2s, 30 tok/s"], "--target: 'ttft 2s, 30 tok/s' has no '200 users'"),
        (["V3", "--gpus", "8xH200", "--target", "soon"], "--target: 'soon' is not understood; accepted: 'ttft 2s, 30 tok/s, 200 users'"),
        (["V3", "--gpus", "8xH200", "--plot", "/nonexistent/a.svg"], "/nonexistent/a.svg: No such file or directory"),
    ],
)
def test_bad_input_gets_one_line(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Monitor, "count", lambda self: None)
    done = plan(*words)
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stderr.startswith("penstock: ")
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": "wide"}, "config.json: hidden_size: expected int, got str"),
        ({"hidden_size": 0}, "config.json: hidden_size: expected int >= 1"),
        ({"n_routed_experts": None}, "config.json: n_routed_experts: expected int, got null"),
        ({"vocab_size": ...}, "config.json: vocab_size: is missing; every model of the family has it"),
        ({"kv_lora_rank": ...}, "config.json: kv_lora_rank: is missing; a DeepseekV3ForCausalLM has it"),
        ({"architectures": ["LlamaForCausalLM"]}, "config.json: architectures: 'LlamaForCausalLM' is not planned for; accepted: Deepseek"),
        ({"architectures": ["DeepseekV33ForCausalLM"]}, "did you mean 'DeepseekV3"),
        ({"architectures": []}, "config.json: architectures: is missing"),
        ({"first_k_dense_replace": 99}, "config.json: first_k_dense_replace: is 99; accepted: up to 61"),
        (
            {"quantization_config": {"quant_method": "gguf"}},
            "config.json: quantization_config.quant_method: 'gguf' is not known; accepted: fp8",
        ),
        ({"quantization_config": 5}, "config.json: quantization_config: expected object | null, got int"),
        ("{", "config.json: is no JSON"),
    ],
)
def test_a_foreign_config_names_file_and_field(tmp_path: Path, change: Any, said: str) -> None:
    config = {key: value for key, value in {**V3, **change}.items() if value is not ...} if isinstance(change, dict) else change
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    done = plan(str(tmp_path), "--gpus", "8xH200")
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"weight_map": {"a": 5}}, "model.safetensors.index.json: cannot be read: weight_map[...]: expected str, got int"),
        ({}, "model.safetensors.index.json: cannot be read: weight_map: is missing"),
        ({"weight_map": {}, "metadata": {"total_size": "all"}}, "index.json: cannot be read: metadata.total_size: expected int"),
        ({"weight_map": {"a": "x"}, "metadata": {"total_size": 5}}, "index.json: metadata.total_size: is 5 bytes; the sizes"),
    ],
)  # fmt: skip
def test_a_foreign_index_names_file_and_field(tmp_path: Path, index: Any, said: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(V3))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    done = plan(str(tmp_path), "--gpus", "8xH200")
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_there_is_one_way_to_plan() -> None:
    assert "No such command 'plan'" in CliRunner().invoke(cli.main, ["engine", "plan", "x"]).stderr
