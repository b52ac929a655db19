"""What a checkpoint is, by its `config.json`, and whether it fits the GPUs it is for: arithmetic, without starting anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

GIB = 1 << 30
# Of a GPU's memory, for weights and KV cache together, where `memory_fraction` does not say; SGLang's own choice is about this (it
# depends on the GPU and on the CUDA graphs).
FRACTION = 0.88


class Card(NamedTuple):
    """A GPU: part of the name that the driver gives it, GiB as the driver counts them, CUDA compute capability (none: ROCm)."""

    name: str
    gib: float
    capability: int | None


# nvidia-smi's and rocm-smi's totals, rounded down; capabilities from NVIDIA's table (developer.nvidia.com/cuda-gpus).
CARDS = (
    Card("A100", 80, 80),
    Card("H20", 95, 90),
    Card("H100", 79, 90),
    Card("H200", 139, 90),
    Card("B200", 178, 100),
    Card("B300", 267, 103),
    Card("MI300X", 191, None),
    Card("MI325X", 255, None),
)


class Quantization(msgspec.Struct):
    """`quantization_config` of a `config.json`."""

    quant_method: str | None = None
    quant_algo: str | None = None
    scale_fmt: str | None = None
    moe_quant_algo: str | None = None


class Checkpoint(msgspec.Struct):
    """What matters of a `config.json`."""

    architectures: list[str] = []
    model_type: str = ""
    quantization_config: Quantization | None = None
    num_hidden_layers: int = 0
    kv_lora_rank: int = 0
    qk_rope_head_dim: int = 0
    index_topk: int | None = None
    index_head_dim: int = 0
    expert_dtype: str | None = None

    @property
    def family(self) -> str:
        """Which DeepSeek it is. V3, V3-0324 and R1 have the same `config.json`, and so have V3.1 and V3.1-Terminus."""
        if self.model_type == "deepseek_v41":
            return "DeepSeek-V4.1"
        architecture = self.architectures[0] if self.architectures else ""
        if architecture == "DeepseekV4ForCausalLM":
            return "DeepSeek-V4"
        if architecture == "DeepseekV32ForCausalLM":
            return "DeepSeek-V3.2 (DSA)"
        if architecture == "DeepseekV3ForCausalLM":
            # The first checkpoint whose scales are powers of two.
            scales = self.quantization_config.scale_fmt if self.quantization_config is not None else None
            return "DeepSeek-V3.1" if scales == "ue8m0" else "DeepSeek-V3 or R1"
        return architecture or "unknown"

    @property
    def quantization(self) -> str:
        """How its weights are stored, in words."""
        quantization = self.quantization_config
        if quantization is None or quantization.quant_method is None:
            return "not quantised"
        algo = quantization.quant_algo or quantization.moe_quant_algo
        named = _NAMES.get(quantization.quant_method, quantization.quant_method)
        experts = f", experts in {self.expert_dtype.upper()}" if self.expert_dtype else ""
        return f"{algo or named}{experts}"

    @property
    def kv_bytes(self) -> int | None:
        """Bytes of KV cache a token in BF16, the same on every rank; None where it is not a plain latent (V4 compresses it)."""
        if not self.kv_lora_rank or self.family.startswith("DeepSeek-V4"):
            return None
        # V3.2's indexer keeps a key of FP8 and a float32 scale for each 128 of it (SGLang's DSATokenToKVPool).
        index = self.index_head_dim + self.index_head_dim // 128 * 4 if self.index_topk is not None else 0
        return (2 * (self.kv_lora_rank + self.qk_rope_head_dim) + index) * self.num_hidden_layers


_NAMES = {
    "fp8": "FP8",
    "modelopt": "ModelOpt",
    "modelopt_fp4": "NVFP4",
    "w4afp8": "W4A8 (INT4 weights, FP8 activations)",
    "w8a8_int8": "INT8",
}

# Parsers by family, as SGLang's pages for each model have them (docs.sglang.io, cookbook/autoregressive/DeepSeek).
PARSERS: Mapping[str, tuple[str, str]] = {
    "DeepSeek-V3 or R1": ("deepseekv3", "deepseek-r1 (R1 alone)"),
    "DeepSeek-V3.1": ("deepseekv31", "deepseek-v3"),
    "DeepSeek-V3.2 (DSA)": ("deepseekv32", "deepseek-v3"),
    "DeepSeek-V4": ("deepseekv4", "deepseek-v4"),
    "DeepSeek-V4.1": ("deepseekv41", "deepseek-v41"),
}


def read(folder: Path) -> Checkpoint:
    """Raises OSError and msgspec.DecodeError."""
    return msgspec.json.decode((folder / "config.json").read_bytes(), type=Checkpoint)


def card(name: str) -> Card | None:
    """The card of a driver's name, such as `NVIDIA H100 80GB HBM3`; H200 before H20."""
    found = [each for each in CARDS if each.name in name.upper()]
    return max(found, key=lambda each: len(each.name), default=None)


def too_large(weights: int, gib: float, ranks: int, name: str, fraction: float | None = None, offload_gib: int = 0) -> str | None:
    """Why so many bytes of weights cannot be spread over so many GPUs, and what could hold them; None where they can."""
    share = weights / GIB / ranks - offload_gib
    room = gib * (fraction or FRACTION)
    if share < room:
        return None
    would = ", ".join(f"{count} x {one.name}" for one, count in alternatives(weights, fraction))
    return (
        f"{weights / GIB:.1f} GiB of weights are {share:.1f} GiB on each of {ranks} GPUs, and {name} has {room:.1f} of {gib:.1f} GiB "
        f"for weights and KV cache; these would hold it: {would or 'none that is known'}"
    )


def alternatives(weights: int, fraction: float | None = None) -> Sequence[tuple[Card, int]]:
    """The smallest number of each card (4, 8 or 16) that holds so many bytes and leaves a tenth of its memory for the KV cache."""
    found = []
    for one in CARDS:
        room = one.gib * ((fraction or FRACTION) - 0.1)
        fitting = [count for count in (4, 8, 16) if weights / GIB / count <= room]
        if fitting:
            found.append((one, fitting[0]))
    return found


def too_old(checkpoint: Checkpoint, capabilities: Mapping[str, int], name: str, chosen: str | None) -> str | None:
    """Why a GPU cannot compute with a checkpoint's quantisation, by what SGLang says of it, and which could; None where nothing says so."""
    here = card(name)
    stored = checkpoint.quantization_config.quant_method if checkpoint.quantization_config is not None else None
    method = chosen or stored
    least = capabilities.get(method or "")
    if here is None or here.capability is None or least is None or here.capability >= least:
        return None
    able = ", ".join(one.name for one in CARDS if one.capability is not None and one.capability >= least)
    return f"{method} needs compute capability {least / 10:.1f}, {here.name} has {here.capability / 10:.1f}; these have it: {able}"


def told(checkpoint: Checkpoint, weights: int) -> list[str]:
    """What a checkpoint is, for people."""
    lines = [f"{checkpoint.family}, {checkpoint.quantization}, {weights / GIB:.1f} GiB of weights"]
    if (kv := checkpoint.kv_bytes) is not None:
        lines.append(f"{kv:,} bytes of KV cache a token in BF16, on every rank")
    if checkpoint.family in PARSERS:
        tools, thoughts = PARSERS[checkpoint.family]
        lines.append(f"tool_call_parser: {tools}; reasoning_parser: {thoughts}")
    holding = ", ".join(f"{count} x {one.name}" for one, count in alternatives(weights))
    lines.append(f"held by: {holding or 'none that is known'}")
    return lines


def parsed(text: str) -> tuple[int, Card]:
    """`8xH200` as a number and a card; raises ValueError with what is accepted."""
    count, _, name = text.lower().partition("x")
    found: Any = card(name)
    if not count.isdigit() or not 1 <= int(count) <= 1024 or found is None or found.name.lower() != name:
        raise ValueError(f"'{text}' is no number of GPUs; accepted: 8xH200, with one of {', '.join(one.name for one in CARDS)}")
    return int(count), found
