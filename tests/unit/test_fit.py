"""What a checkpoint is by its `config.json`, and whether GPUs hold it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

from backends.sglang_dsv3.config import Engine
from backends.sglang_dsv3.engine import agent, fit
from backends.sglang_dsv3.engine.monitor import Gpu, Machine, Monitor
from gateway.errors import ConfigError
from tests.unit.test_engine_section import RECORDED, engine

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
V3 = {"architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
V32 = {**V3, "architectures": ["DeepseekV32ForCausalLM"], "index_topk": 2048, "index_head_dim": 128}
V4 = {**V3, "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4"}
# The published weights of V3, as docs/gpu.md has them.
V3_BYTES = round(626.9 * fit.GIB)


def read(config: dict[str, Any]) -> fit.Checkpoint:
    return msgspec.json.decode(json.dumps(config), type=fit.Checkpoint)


@pytest.mark.parametrize(
    ("config", "family", "quantization", "kv"),
    [
        ({**V3, "quantization_config": FP8}, "DeepSeek-V3 or R1", "FP8", 70_272),
        ({**V3, "quantization_config": {**FP8, "scale_fmt": "ue8m0"}}, "DeepSeek-V3.1", "FP8", 70_272),
        ({**V32, "quantization_config": {**FP8, "scale_fmt": "ue8m0"}}, "DeepSeek-V3.2 (DSA)", "FP8", 78_324),
        ({**V4, "quantization_config": FP8, "expert_dtype": "fp4"}, "DeepSeek-V4", "FP8, experts in FP4", None),
        ({**V4, "model_type": "deepseek_v41"}, "DeepSeek-V4.1", "not quantised", None),
        ({**V3, "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "DeepSeek-V3 or R1", "NVFP4", 70_272),
        ({**V3, "quantization_config": {"quant_method": "w4afp8"}}, "DeepSeek-V3 or R1", "W4A8 (INT4 weights, FP8 activations)", 70_272),
        ({**V3, "quantization_config": {"quant_method": "w8a8_int8"}}, "DeepSeek-V3 or R1", "INT8", 70_272),
    ],
)
def test_a_checkpoint_is_named_by_its_config(config: dict[str, Any], family: str, quantization: str, kv: int | None) -> None:
    found = read(config)
    assert (found.family, found.quantization, found.kv_bytes) == (family, quantization, kv)


def test_parsers_that_are_proposed_are_ones_that_sglang_has() -> None:
    for tools, thoughts in fit.PARSERS.values():
        assert tools in RECORDED.flags["--tool-call-parser"]
        assert thoughts.split()[0] in RECORDED.flags["--reasoning-parser"]


@pytest.mark.parametrize(
    ("name", "card"), [("NVIDIA H200", "H200"), ("NVIDIA H20", "H20"), ("NVIDIA A100-SXM4-80GB", "A100"), ("T4", None)]
)
def test_a_drivers_name_is_a_card(name: str, card: str | None) -> None:
    found = fit.card(name)
    assert (found.name if found is not None else None) == card


def test_what_does_not_fit_names_what_would() -> None:
    assert fit.too_large(V3_BYTES, 139, 8, "H200") is None
    said = fit.too_large(V3_BYTES, 139, 4, "H200")
    assert said is not None
    assert said.startswith("626.9 GiB of weights are 156.7 GiB on each of 4 GPUs, and H200 has 122.3 of 139.0 GiB")
    assert said.endswith("16 x H100, 8 x H200, 8 x B200, 4 x B300, 8 x MI300X, 4 x MI325X")
    assert fit.too_large(V3_BYTES, 139, 4, "H200", offload_gib=40) is None


def test_a_gpu_without_the_arithmetic_names_those_that_have_it() -> None:
    w4a8 = read({**V3, "quantization_config": {"quant_method": "w4afp8"}})
    said = fit.too_old(w4a8, RECORDED.capabilities, "NVIDIA A100-SXM4-80GB", None)
    assert said == "w4afp8 needs compute capability 9.0, A100 has 8.0; these have it: H20, H100, H200, B200, B300"
    assert fit.too_old(w4a8, RECORDED.capabilities, "NVIDIA H20", None) is None
    assert fit.too_old(w4a8, RECORDED.capabilities, "a GPU that nobody knows", None) is None


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


@pytest.mark.parametrize(
    ("gpus", "code", "words"),
    [
        ("8xH200", 0, "8 x H200: 78.4 of 139 GiB are weights on each"),
        ("4xH200", 2, "8 x H200"),
        ("16xA100", 0, "16 x A100: 39.2 of 80 GiB"),
        ("8xH300", 2, "'8xH300' is no number of GPUs; accepted: 8xH200, with one of A100, H20"),
        ("H200", 2, "'H200' is no number of GPUs"),
    ],
)
def test_a_plan_says_what_it_is_and_what_holds_it(tmp_path: Path, gpus: str, code: int, words: str) -> None:
    done = engine("plan", str(whole(tmp_path / "ck", {**V3, "quantization_config": FP8})), "--gpus", gpus, folder=tmp_path)
    assert done.returncode == code, done.stderr
    assert words in (done.stderr if code else done.stdout)
    assert done.stderr.count("\n") == bool(code)
    if not code:
        assert done.stdout.startswith("DeepSeek-V3 or R1, FP8, 626.9 GiB of weights\n70,272 bytes of KV cache a token")
        assert "held by: 16 x A100, 16 x H20, 16 x H100, 8 x H200, 8 x B200, 4 x B300" in done.stdout


@pytest.mark.parametrize(
    ("name", "gib", "quantization", "words"),
    [("NVIDIA H200", 139, FP8, "8 x H200"), ("NVIDIA A100-SXM4-80GB", 800, {"quant_method": "w4afp8"}, "needs compute capability 9.0")],
)
def test_an_agent_refuses_gpus_that_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, gib: int, quantization: dict[str, Any], words: str
) -> None:
    gpu = Gpu(0, name, None, 0, gib * fit.GIB, None, None, None, None, None, [], None)
    monkeypatch.setattr(Monitor, "count", lambda self: 4)
    monkeypatch.setattr(Monitor, "look", lambda self: msgspec.structs.replace(LOOK, gpus=[gpu]))
    folder = whole(tmp_path / "ck", {**V3, "quantization_config": quantization})
    with pytest.raises(ConfigError, match=r"engine\.gpus: ") as refused:
        agent.prepare(Engine(gpus=[0, 1, 2, 3], model_path=str(folder)), "engine", lambda done, of: None, RECORDED)
    assert words in str(refused.value)


LOOK: Machine = Monitor([], Path("/")).look()
