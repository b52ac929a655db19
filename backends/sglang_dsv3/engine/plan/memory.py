"""A GPU's memory: weights, KV cache, and what SGLang keeps for itself."""

from __future__ import annotations

from typing import NamedTuple

from backends.sglang_dsv3.engine.plan.models import Shape
from backends.sglang_dsv3.engine.plan.weights import Pieces

# Bytes of a value by SGLang's word for the cache's type. `auto` is BF16, but for V4, whose cache is FP8 unless BF16 is asked for.
KV_TYPES = {"auto": 2, "bf16": 2, "bfloat16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}
_FP8 = ("fp8_e4m3", "fp8_e5m2")
# The most of a GPU for weights and KV cache together that is reckoned with: less of a large one, so that graphs, activations and NCCL keep
# several GiB (contracts of July 2026, 2.10). Between the two a larger GPU has no less.
_SHARE, _LARGE_SHARE, _LARGE_GIB = 0.92, 0.90, 200.0
MIB = 1 << 20
_MOST_GRAPH_BATCH = 512


class Layout(NamedTuple):
    """How a model is spread: `tp` ranks over `nodes`, in `dp` groups with a KV cache each, experts over `ep`; `travel`: tokens go to
    experts (an all-to-all backend), `drafts`: the MTP layer is loaded."""

    tp: int
    dp: int = 1
    ep: int = 1
    nodes: int = 1
    travel: bool = False
    drafts: bool = False

    @property
    def group(self) -> int:
        """Ranks that share a KV cache: each has all of it."""
        return self.tp // self.dp


class Cache(NamedTuple):
    """Bytes of KV cache: of a token, the same on each rank of a group, and of a request whatever its length (V4's windows)."""

    token: float
    request: float = 0.0


def cache(shape: Shape, kv_type: str, drafts: bool = False) -> Cache:
    """What the cache takes, as SGLang's pools are laid out (mem_cache/memory_pool.py, deepseek_v4_memory_pool.py)."""
    layers = shape.num_hidden_layers + (1 if drafts else 0)
    if shape.compress_ratios is None:
        return Cache(layers * (_latent(shape, kv_type) + index_key(shape)))
    latent = _latent(shape, kv_type)
    token = sum((latent + (index_key(shape) if ratio == 4 else 0)) / ratio for ratio in shape.ratios if ratio)
    # What is not compressed yet, in float32: rings of 8 tokens (by 4; the indexer has one too) and of 128 (by 128).
    ring = {4: 8 * 2 * 2 * (shape.head_dim + shape.index_head_dim) * 4, 128: 128 * 2 * shape.head_dim * 4}
    request = layers * latent * shape.sliding_window + sum(ring.get(ratio, 0) for ratio in shape.ratios)
    return Cache(token * layers / shape.num_hidden_layers, request)


def _latent(shape: Shape, kv_type: str) -> float:
    """A token's latent in one layer."""
    if shape.compress_ratios is not None:
        rope = shape.qk_rope_head_dim
        # FlashMLA's slot: FP8 but for the rotary part, and eight bytes of scales; BF16 only where it is asked for.
        return 2 * shape.head_dim if kv_type in ("bf16", "bfloat16") else shape.head_dim - rope + 2 * rope + 8
    width = shape.kv_lora_rank + shape.qk_rope_head_dim
    if shape.index_topk is not None and kv_type == "fp8_e4m3":
        # DSA keeps the rotary part in BF16 and a float32 scale for each 128 of the rest.
        return shape.kv_lora_rank + shape.kv_lora_rank // 128 * 4 + 2 * shape.qk_rope_head_dim
    return width * KV_TYPES[kv_type]


def index_key(shape: Shape) -> int:
    """A token's key in the indexer of one layer: FP8 and a float32 scale for each 128."""
    return shape.index_head_dim + shape.index_head_dim // 128 * 4 if shape.index_topk is not None else 0


def absorbed(shape: Shape, layout: Layout) -> float:
    """Bytes of the matrices that MLA's decode makes of kv_b when weights are loaded, in BF16, on each rank."""
    if shape.compress_ratios is not None:
        return 0.0
    width = shape.qk_nope_head_dim + shape.v_head_dim
    return 2.0 * shape.num_hidden_layers * shape.num_attention_heads * width * shape.kv_lora_rank / layout.group


def weights(main: Pieces, mtp: Pieces, layout: Layout) -> float:
    """Bytes on each rank."""
    extra = mtp.rank(layout.tp, layout.group, layout.travel) if layout.drafts else 0.0
    return main.rank(layout.tp, layout.group, layout.travel) + extra


def most(gib: float) -> float:
    """The most GiB for weights and KV cache together that are reckoned with."""
    return _SHARE * gib if gib < _LARGE_GIB else max(_SHARE * _LARGE_GIB, _LARGE_SHARE * gib)


def chunk(gib: float) -> int:
    """Tokens of prompts in one step, where SGLang chooses by the GPU (arg_groups/memory_hook.py)."""
    for below, tokens in ((20, 2048), (60, 4096), (160, 8192)):
        if gib < below:
            return tokens
    return 16384


def reserved(gib: float, layout: Layout, requests: int, chunk_size: int | None = None, floor: bool = True) -> float:
    """GiB that SGLang leaves for activations and graphs where no fraction is given (arg_groups/memory_hook.py): by the chunk, the ranks and
    the largest batch that it records; at least ten on a GPU of more than 60, unless `floor` is off."""
    batch = min(requests, _MOST_GRAPH_BATCH if layout.tp >= 4 or gib >= 160 else 256)
    mib = 512 + max(chunk_size or chunk(gib), 2048) * 1.5 + layout.tp / 8 * 1024 + batch * 2 + 1536
    if layout.dp > 1:
        mib += batch * layout.dp * (4.5 if batch > 300 else 3)
    if gib > 60 and floor:
        mib = max(mib, 10 * 1024)
    return mib * MIB / (1 << 30)


def fitting_chunk(gib: float, layout: Layout, requests: int, left_gib: float) -> int | None:
    """The largest chunk, a power of two, whose activations and graphs go into what is left; None where not even the smallest does."""
    for tokens in (16384, 8192, 4096, 2048):
        if reserved(gib, layout, requests, tokens, floor=False) <= left_gib:
            return tokens
    return None
