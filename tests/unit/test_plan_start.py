"""What a checkpoint is by its `config.json`, and that a start on GPUs which cannot hold it is refused."""

from __future__ import annotations

import contextlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from backends.sglang_dsv3.config import Engine
from backends.sglang_dsv3.engine import agent
from backends.sglang_dsv3.engine.monitor import Gpu, Machine, Monitor
from backends.sglang_dsv3.engine.plan import gpus, models
from backends.sglang_dsv3.engine.plan.gpus import GIB
from gateway import cli
from gateway.errors import ConfigError
from tests.support.redis import free_port
from tests.unit.test_engine_section import RECORDED, configured

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
V3 = {"architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
V32 = {**V3, "architectures": ["DeepseekV32ForCausalLM"], "index_topk": 2048, "index_head_dim": 128}
V4 = {**V3, "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4"}
# The published weights of V3, as docs/gpu.md has them.
V3_BYTES = round(626.9 * GIB)


def read(config: dict[str, Any]) -> models.Checkpoint:
    return msgspec.json.decode(json.dumps(config), type=models.Checkpoint)


@pytest.mark.parametrize(
    ("config", "family", "quantization", "scheme"),
    [
        ({**V3, "quantization_config": FP8}, "DeepSeek-V3 or R1", "FP8", "fp8"),
        ({**V3, "quantization_config": {**FP8, "scale_fmt": "ue8m0"}}, "DeepSeek-V3.1", "FP8", "fp8"),
        ({**V32, "quantization_config": {**FP8, "scale_fmt": "ue8m0"}}, "DeepSeek-V3.2 (DSA)", "FP8", "fp8"),
        ({**V4, "quantization_config": FP8, "expert_dtype": "fp4"}, "DeepSeek-V4", "FP8, experts in FP4", "mxfp4"),
        ({**V4, "model_type": "deepseek_v41"}, "DeepSeek-V4.1", "not quantised", "bf16"),
        ({**V3, "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "DeepSeek-V3 or R1", "NVFP4", "nvfp4"),
        ({**V3, "quantization_config": {"quant_method": "w4afp8"}}, "DeepSeek-V3 or R1", "W4A8 (INT4 weights, FP8 activations)", "w4a8"),
        ({**V3, "quantization_config": {"quant_method": "w8a8_int8"}}, "DeepSeek-V3 or R1", "INT8", "int8"),
    ],
)
def test_a_checkpoint_is_named_by_its_config(config: dict[str, Any], family: str, quantization: str, scheme: str) -> None:
    found = read(config)
    assert (found.family, found.quantization, found.scheme) == (family, quantization, scheme)


def test_parsers_that_are_proposed_are_ones_that_sglang_has() -> None:
    for tools, thoughts in models.PARSERS.values():
        assert tools in RECORDED.flags["--tool-call-parser"]
        assert thoughts.split()[0] in RECORDED.flags["--reasoning-parser"]


@pytest.mark.parametrize(
    ("name", "gib", "card"),
    [
        ("NVIDIA H200", 139.8, "H200"), ("NVIDIA H20", 95.0, "H20"), ("NVIDIA A100-SXM4-80GB", 79.2, "A100-80"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40"), ("NVIDIA H100 80GB HBM3", 79.6, "H100-80"),
    ],
)  # fmt: skip
def test_a_drivers_name_is_a_card_with_the_memory_that_it_says(name: str, gib: float, card: str) -> None:
    found = gpus.named(name, gib)
    assert (found.spec, found.gib) == (card, gib)
    assert found.tb_s > 0


def test_a_gpu_that_nobody_knows_has_its_memory_alone() -> None:
    found = gpus.named("Tesla T4", 15)
    assert (found.name, found.gib, found.tb_s, found.capability) == ("Tesla T4", 15, 0, None)


def whole(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint of one tensor of a terabyte, of which the disk holds nothing: its file is a hole."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [V3_BYTES], "data_offsets": [0, V3_BYTES]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + V3_BYTES)
    return folder


GPUS = [0, 1, 2, 3]


def machine(monkeypatch: pytest.MonkeyPatch, name: str, gib: int) -> None:
    """A host with four of them, as its driver says."""
    gpu = Gpu(0, name, None, 0, gib * GIB, None, None, None, None, None, [], None)
    monkeypatch.setattr(Monitor, "count", lambda self: 4)
    monkeypatch.setattr(Monitor, "look", lambda self: msgspec.structs.replace(LOOK, gpus=[gpu]))


def prepare(folder: Path, force: bool = False, **section: Any) -> list[str]:
    engine = Engine(gpus=GPUS, model_path=str(folder), port=free_port(), agent=f"127.0.0.1:{free_port()}", **section)
    return agent.prepare(engine, "engine", lambda done, of: None, RECORDED, force)


@pytest.mark.parametrize(
    ("name", "gib", "quantization", "words"),
    [
        ("NVIDIA H200", 139, FP8, r"weights take 156.7 GiB of each GPU, which has 139.0; .* these would: .*--gpus 4xB300 \(fits\)"),
        ("NVIDIA A100-SXM4-80GB", 800, {"quant_method": "w4afp8"}, "w4afp8 needs compute capability 9.0, A100 has 8.0; these have it: H20"),
    ],
)
def test_an_agent_refuses_gpus_that_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, gib: int, quantization: dict[str, Any], words: str
) -> None:
    machine(monkeypatch, name, gib)
    folder = whole(tmp_path / "ck", {**V3, "quantization_config": quantization})
    with pytest.raises(ConfigError, match=rf"engine\.gpus: {words}"):
        prepare(folder)
    (said,) = prepare(folder, force=True)
    assert re.match(rf"engine\.gpus: {words}", said)
    assert said.endswith("it is tried all the same (--force)")


def test_what_is_offloaded_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "NVIDIA H200", 139)
    folder = whole(tmp_path / "ck", {**V3, "quantization_config": FP8})
    assert prepare(folder, cpu_offload_gb=60) == []


def test_what_is_tight_is_started_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "NVIDIA B200", 179)
    (first, *_) = prepare(whole(tmp_path / "ck", {**V3, "quantization_config": FP8}))
    assert first.startswith("engine: it is tight: only ")


@pytest.mark.parametrize(("fraction", "fits"), [(0.93, True), (0.80, False)])
def test_the_fraction_that_is_set_is_the_one_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fraction: float, fits: bool
) -> None:
    machine(monkeypatch, "NVIDIA B200", 179)
    folder = whole(tmp_path / "ck", {**V3, "quantization_config": FP8})
    with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match=r"143.2 \(0.80\) can be theirs"):
        prepare(folder, memory_fraction=fraction)


def test_a_check_where_weights_and_gpus_are_refuses_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "NVIDIA H200", 139)
    path = configured(tmp_path, model_path=str(whole(tmp_path / "ck", {**V3, "quantization_config": FP8})), gpus=GPUS)
    refused = CliRunner().invoke(cli.main, ["check", "-c", str(path)])
    assert refused.exit_code == 2
    assert "backends.dsv3.engine.gpus: weights take 156.7 GiB" in refused.output
    insisted = CliRunner().invoke(cli.main, ["check", "-c", str(path), "--force"])
    assert insisted.exit_code == 0
    assert "note: backends.dsv3: engine.gpus: weights take 156.7 GiB" in insisted.output


def test_a_check_elsewhere_says_nothing_of_it(tmp_path: Path) -> None:
    path = configured(tmp_path, model_path="/models/DeepSeek-V3", gpus=GPUS)
    done = CliRunner().invoke(cli.main, ["check", "-c", str(path)])
    assert done.exit_code == 0, done.output
    assert "GiB" not in done.output


LOOK: Machine = Monitor([], Path("/")).look()
