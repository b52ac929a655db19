"""What a model is, by its `config.json`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta


class Unreadable(ValueError):
    """What is wrong with a file of a checkpoint: one line, with the file and the field."""


class Quantization(msgspec.Struct):
    """`quantization_config` of a `config.json`."""

    quant_method: str | None = None
    quant_algo: str | None = None
    scale_fmt: str | None = None
    moe_quant_algo: str | None = None


class Checkpoint(msgspec.Struct):
    """What tells one model from another in a `config.json`, whatever its architecture."""

    architectures: list[str] = []
    model_type: str = ""
    quantization_config: Quantization | None = None
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
    def scheme(self) -> str | None:
        """The name of the scheme that `weights` knows it by; None for one that it does not."""
        quantization = self.quantization_config
        if quantization is None or quantization.quant_method is None:
            return "bf16"
        if self.expert_dtype == "fp4":
            return "mxfp4"
        words = f"{quantization.quant_algo or ''} {quantization.moe_quant_algo or ''}".lower()
        return "nvfp4" if "nvfp4" in words else SCHEMES.get(quantization.quant_method)


_NAMES = {
    "fp8": "FP8",
    "modelopt": "ModelOpt",
    "modelopt_fp4": "NVFP4",
    "w4afp8": "W4A8 (INT4 weights, FP8 activations)",
    "w8a8_int8": "INT8",
}
SCHEMES = {
    "fp8": "fp8", "modelopt_fp4": "nvfp4", "w4afp8": "w4a8", "w8a8_int8": "int8", "blockwise_int8": "int8", "awq": "awq", "mxfp4": "mxfp4",
    "quark": "mxfp4",
}  # fmt: skip

# Parsers by family, as SGLang's pages for each model have them (docs.sglang.io, cookbook/autoregressive/DeepSeek).
PARSERS: Mapping[str, tuple[str, str]] = {
    "DeepSeek-V3 or R1": ("deepseekv3", "deepseek-r1 (R1 alone)"),
    "DeepSeek-V3.1": ("deepseekv31", "deepseek-v3"),
    "DeepSeek-V3.2 (DSA)": ("deepseekv32", "deepseek-v3"),
    "DeepSeek-V4": ("deepseekv4", "deepseek-v4"),
    "DeepSeek-V4.1": ("deepseekv41", "deepseek-v41"),
}
KNOWN_ARCHITECTURES = ("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "DeepseekV4ForCausalLM")

Size = Annotated[int, Meta(ge=1, le=1 << 24)]
Count = Annotated[int, Meta(ge=0, le=1 << 24)]


class Shape(msgspec.Struct, frozen=True):
    """The sizes that bytes and operations follow from, by their names in `config.json`. A field without a default is one that every model
    of the family has; `compress_ratios` and what stands below it are V4's, `index_*` V3.2's and V4's."""

    hidden_size: Size
    num_hidden_layers: Size
    vocab_size: Size
    num_attention_heads: Size
    qk_rope_head_dim: Size
    moe_intermediate_size: Size
    n_routed_experts: Size
    num_experts_per_tok: Size
    max_position_embeddings: Size
    q_lora_rank: Size | None = None
    kv_lora_rank: Size = 512
    qk_nope_head_dim: Size = 128
    v_head_dim: Size = 128
    intermediate_size: Size = 18432
    n_shared_experts: Count | None = None
    first_k_dense_replace: Count = 0
    num_nextn_predict_layers: Count = 0
    index_n_heads: Size = 64
    index_head_dim: Size = 128
    index_topk: Size | None = None
    compress_ratios: list[Count] | None = None
    head_dim: Size = 512
    o_groups: Size = 8
    o_lora_rank: Size = 1024
    hc_mult: Size = 4
    sliding_window: Size = 128

    @property
    def moe_layers(self) -> int:
        """Layers with experts."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def ratios(self) -> list[int]:
        """By how much V4 compresses each layer's cache, its main layers alone."""
        return (self.compress_ratios or [])[: self.num_hidden_layers]

    @property
    def expert(self) -> int:
        """Parameters of one expert: three matrices."""
        return 3 * self.hidden_size * self.moe_intermediate_size


# What only one architecture has, and cannot do without.
_NEEDED = {
    "DeepseekV3ForCausalLM": ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "intermediate_size"),
    "DeepseekV32ForCausalLM": ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "intermediate_size", "index_topk"),
    "DeepseekV4ForCausalLM": ("q_lora_rank", "compress_ratios", "head_dim", "o_groups", "o_lora_rank"),
}


def checkpoint(folder: Path) -> Checkpoint:
    """What a folder's `config.json` says it is, whatever that is. Raises OSError and msgspec.DecodeError."""
    return msgspec.json.decode((folder / "config.json").read_bytes(), type=Checkpoint)


def read(folder: Path) -> tuple[Checkpoint, Shape]:
    """A folder's `config.json`; raises Unreadable with the field that is missing, or no number, or of another family."""
    file = folder / "config.json"
    try:
        content = file.read_bytes()
    except OSError as error:
        raise Unreadable(f"{file}: cannot be read: {error.strerror}") from None
    return decoded(content, str(file))


def decoded(content: bytes, file: str) -> tuple[Checkpoint, Shape]:
    """The same of its content, which `file` names in what is raised."""
    try:
        found = msgspec.json.decode(content, type=Checkpoint)
        architecture = found.architectures[0] if found.architectures else ""
        if architecture not in KNOWN_ARCHITECTURES:
            near = difflib.get_close_matches(architecture, KNOWN_ARCHITECTURES, 1)
            hint = f"; did you mean '{near[0]}'?" if near and architecture else ""
            given = f"'{architecture}' is not planned for" if architecture else "is missing"
            raise Unreadable(f"{file}: architectures: {given}; accepted: {', '.join(KNOWN_ARCHITECTURES)}{hint}")
        if found.model_type == "deepseek_v41":
            raise Unreadable(f"{file}: model_type: 'deepseek_v41' is not planned for; accepted: deepseek_v3, deepseek_v32, deepseek_v4")
        present = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
        for name in _NEEDED[architecture]:
            if name not in present:
                raise Unreadable(f"{file}: {name}: is missing; a {architecture} has it")
        shape = msgspec.json.decode(content, type=Shape)
    except msgspec.ValidationError as error:
        raise Unreadable(f"{file}: {place(str(error))}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unreadable(f"{file}: is no JSON: {error}") from None
    if architecture == "DeepseekV4ForCausalLM" and len(shape.compress_ratios or []) < shape.num_hidden_layers:
        entries = len(shape.compress_ratios or [])
        raise Unreadable(
            f"{file}: compress_ratios: has {entries} entries; accepted: one for each of num_hidden_layers, {shape.num_hidden_layers}"
        )
    for field, most in (("first_k_dense_replace", shape.num_hidden_layers), ("num_experts_per_tok", shape.n_routed_experts)):
        if getattr(shape, field) > most:
            raise Unreadable(f"{file}: {field}: is {getattr(shape, field)}; accepted: up to {most}")
    return found, shape


def place(text: str) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.hidden_size`" as "hidden_size: expected int, got str"."""
    what, _, place = text.replace("`", "").partition(" - at ")
    if what.startswith("Object missing required field "):
        return f"{what.removeprefix('Object missing required field ')}: is missing; every model of the family has it"
    field = place.removeprefix("$").lstrip(".") or "the whole"
    return f"{field}: {what[0].lower()}{what[1:]}"
