"""Bytes of weights by how SGLang spreads them over ranks: from sizes and a way to store them, or from a checkpoint's own headers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from backends.sglang_dsv3.engine.plan.models import Shape

# DeepSeek's FP8: a float32 scale for each block of 128 x 128 (config.json, weight_block_size).
_FP8 = 1 + 4 / (128 * 128)


class Scheme(NamedTuple):
    """A way to store weights. Bytes a parameter: of routed experts, of every other matrix but embedding, head and gates (BF16 always).
    `capability`: the least of CUDA's, None for any; `rocm`: AMD's cards that can."""

    name: str
    title: str
    routed: float
    other: float
    capability: int | None
    rocm: tuple[str, ...]


_AMD = ("MI300X", "MI325X", "MI355X")
# Which cards take which: SGLang, "DeepSeek V3/V3.1/R1 Usage" (docs.sglang.io/docs/basic_usage/deepseek_v3).
SCHEMES = (
    Scheme("fp8", "FP8", _FP8, _FP8, 90, _AMD),
    Scheme("bf16", "BF16", 2.0, 2.0, None, _AMD),
    Scheme("int8", "INT8", _FP8, _FP8, None, ()),
    # Groups of 128 with a float32 scale (SGLang's w4afp8), of 16 with an FP8 one (NVFP4), of 32 with an exponent (MXFP4), of 128 with a
    # float16 scale and a 4-bit zero (AWQ).
    Scheme("w4a8", "W4A8, INT4 experts", 0.5 + 4 / 128, _FP8, 90, ()),
    Scheme("nvfp4", "NVFP4 experts", 0.5 + 1 / 16, _FP8, 100, ()),
    Scheme("mxfp4", "MXFP4 experts", 0.5 + 1 / 32, _FP8, 90, ("MI355X",)),
    Scheme("awq", "AWQ, INT4", 0.5 + 2.5 / 128, 0.5 + 2.5 / 128, 80, ()),
)


def scheme(name: str) -> Scheme:
    """By its name; raises KeyError."""
    return {each.name: each for each in SCHEMES}[name]


class Pieces(msgspec.Struct, frozen=True):
    """Bytes of a model's weights, by who holds them: all of it on every rank (`replicated`), shared out over the ranks of an attention
    group (`attention`, `embedding`), or over all (the rest); shared experts are whole on each rank where tokens travel to experts."""

    embedding: float = 0.0
    head: float = 0.0
    attention: float = 0.0
    replicated: float = 0.0
    dense: float = 0.0
    shared: float = 0.0
    routed: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.embedding + self.head + self.attention + self.replicated + self.dense + self.shared + self.routed

    @property
    def always(self) -> float:
        """What each step reads whatever its batch: all but routed experts, and the embedding, of which it reads a row a token."""
        return self.total - self.routed - self.embedding

    def rank(self, tp: int, attention: int, travel: bool) -> float:
        """Bytes on one of `tp` ranks, of which `attention` share a KV cache; `travel`: tokens travel to experts."""
        return (
            self.replicated
            + (self.attention + self.embedding) / attention
            + (self.head + self.dense + self.routed) / tp
            + self.shared / (1 if travel else tp)
        )


class Parameters(NamedTuple):
    """Parameters of one layer's attention: shared out over ranks, and whole on each, of which those in BF16 apart."""

    attention: float
    latent: float
    latent_bf16: float


def computed(shape: Shape, how: Scheme) -> tuple[Pieces, Pieces]:
    """Bytes of the main model, and of its MTP layer without the copies of embedding and head that some checkpoints have of it."""
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    kinds = [_attention(shape, ratio) for ratio in (shape.ratios or [0] * layers)]
    gate = shape.n_routed_experts * (2 * hidden + 4)
    shared = (shape.n_shared_experts or 0) * shape.expert
    norms = 2 * hidden
    main = Pieces(
        embedding=2.0 * shape.vocab_size * hidden,
        head=2.0 * shape.vocab_size * hidden,
        attention=sum(kind.attention for kind in kinds) * how.other,
        replicated=sum(kind.latent * how.other + 2 * kind.latent_bf16 for kind in kinds)
        + shape.moe_layers * gate
        + 2 * norms * layers
        + 2 * hidden,
        dense=shape.first_k_dense_replace * 3 * hidden * shape.intermediate_size * how.other,
        shared=shape.moe_layers * shared * how.other,
        routed=shape.moe_layers * shape.n_routed_experts * shape.expert * how.routed,
    )
    if not shape.num_nextn_predict_layers:
        return main, Pieces()
    kind = _attention(shape, 0)
    mtp = Pieces(
        attention=kind.attention * how.other,
        replicated=kind.latent * how.other + 2 * kind.latent_bf16 + gate + 2 * norms + 2 * 2 * hidden * hidden,
        shared=shared * how.other,
        routed=shape.n_routed_experts * shape.expert * how.routed,
    )
    return main, mtp


def _attention(shape: Shape, ratio: int) -> Parameters:
    """One layer's attention, as SGLang's model files shape it (models/deepseek_v2.py, deepseek_v4.py)."""
    hidden, heads, rank = shape.hidden_size, shape.num_attention_heads, shape.q_lora_rank
    if shape.compress_ratios is None:
        query = shape.qk_nope_head_dim + shape.qk_rope_head_dim
        out = shape.kv_lora_rank * heads * (shape.qk_nope_head_dim + shape.v_head_dim) + heads * shape.v_head_dim * hidden
        latent = hidden * (shape.kv_lora_rank + shape.qk_rope_head_dim)
        norms = shape.kv_lora_rank + (rank or 0)
        if shape.index_topk is not None and rank is not None:
            latent += rank * shape.index_n_heads * shape.index_head_dim + hidden * shape.index_head_dim
            norms += hidden * shape.index_n_heads + 2 * shape.index_head_dim
        if rank is None:
            return Parameters(out + hidden * heads * query, latent, norms)
        return Parameters(out + rank * heads * query, latent + hidden * rank, norms)
    assert rank is not None
    wide = heads * shape.head_dim
    attention = rank * wide + wide * shape.o_lora_rank + shape.o_groups * shape.o_lora_rank * hidden
    # mHC mixes in float32: twice what BF16 takes.
    mixing = 2 * 2 * (2 + shape.hc_mult) * shape.hc_mult * shape.hc_mult * hidden
    latent, plain = hidden * (rank + shape.head_dim), mixing + rank + shape.head_dim
    if ratio:
        plain += hidden * 2 * (2 if ratio == 4 else 1) * shape.head_dim
    if ratio == 4:
        latent += rank * shape.index_n_heads * shape.index_head_dim
        plain += hidden * (shape.index_n_heads + 4 * shape.index_head_dim)
    return Parameters(attention, latent, plain)


_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")
_ROUTED = re.compile(r"\.experts\.")
_SHARED = re.compile(r"\.shared_experts?\.")
_ATTENTION = re.compile(r"\.(?:q_proj|q_b_proj|kv_b_proj|o_proj|wq_b|wo_a|wo_b|attn_sink)\b")
_REPLICATED = re.compile(r"norm|\.gate\.|\.indexer\.|\.compressor\.|_a_proj|\.wq_a\b|\.wkv\b|\bhc_|\.(?:e|h|eh)_proj\.|\.tid2eid")


def counted(tensors: Mapping[str, int], layers: int) -> tuple[Pieces, Pieces]:
    """The same from a checkpoint's own tensors (bytes by name), of which the main model has so many layers."""
    found: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for name, size in tensors.items():
        layer = _LAYER.match(name)
        extra = name.startswith("mtp.") or (layer is not None and int(layer[1]) >= layers)
        piece = _piece(name)
        if extra and piece in ("embedding", "head"):
            continue  # copies of the main model's, which SGLang takes instead
        found[extra][piece] = found[extra].get(piece, 0.0) + size
    return Pieces(**found[0]), Pieces(**found[1])


def _piece(name: str) -> str:
    if "embed" in name:
        return "embedding"
    if re.search(r"(?:^|\.)(?:lm_head|head)\.", name):
        return "head"
    if _SHARED.search(name):
        return "shared"
    if _ROUTED.search(name):
        return "routed"
    # The indexer has a matrix of the same name as the attention's.
    if _REPLICATED.search(name):
        return "replicated"
    return "attention" if _ATTENTION.search(name) else "dense"


def active(shape: Shape) -> float:
    """Parameters that a token is multiplied with: all but embedding and the routed experts that were not chosen."""
    kinds = [_attention(shape, ratio) for ratio in (shape.ratios or [0] * shape.num_hidden_layers)]
    chosen = shape.num_experts_per_tok + (shape.n_shared_experts or 0)
    return (
        sum(kind.attention + kind.latent + kind.latent_bf16 for kind in kinds)
        + shape.vocab_size * shape.hidden_size
        + shape.first_k_dense_replace * 3 * shape.hidden_size * shape.intermediate_size
        + shape.moe_layers * (shape.n_routed_experts * shape.hidden_size + chosen * shape.expert)
    )
