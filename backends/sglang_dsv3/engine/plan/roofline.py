"""How fast decoding could be at best: what a step must read and compute, against what the GPUs can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from backends.sglang_dsv3.engine.plan import memory
from backends.sglang_dsv3.engine.plan.gpus import Card
from backends.sglang_dsv3.engine.plan.memory import Layout
from backends.sglang_dsv3.engine.plan.models import Shape
from backends.sglang_dsv3.engine.plan.weights import Pieces, active

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Step(msgspec.Struct, frozen=True):
    """One decode step of a batch. `roof_*`: weights alone, shared out evenly; `tokens_per_s`, `ms`: with what each rank reads of its own,
    with the KV cache, and computing where that takes longer (`bound` says which of `memory` and `compute` it is)."""

    batch: int
    experts: float
    read_gb: float
    roof_ms: float
    roof_tokens_per_s: float
    ms: float
    tokens_per_s: float
    per_request: float
    bound: str


class Work(NamedTuple):
    """What is decoded on what."""

    shape: Shape
    main: Pieces
    layout: Layout
    card: Card
    kv_type: str
    four_bits: bool = False

    @property
    def flops(self) -> float:
        """Operations a second of all ranks together, at the card's fastest dense arithmetic for these weights."""
        tflops = (self.card.fp4 if self.four_bits else None) or self.card.tflops
        return tflops * 1e12 * self.layout.tp


def distinct(shape: Shape, batch: int) -> float:
    """Different experts of a layer that a batch asks for, where all are as likely: E (1 - (1 - k/E) ** batch)."""
    experts = shape.n_routed_experts
    return experts * (1.0 - (1.0 - shape.num_experts_per_tok / experts) ** batch)


def step(work: Work, batch: int, context: int) -> Step:
    """One step in which each of `batch` requests has `context` tokens in the cache."""
    shape, main, layout = work.shape, work.main, work.layout
    experts = distinct(shape, batch)
    routed = main.routed * experts / shape.n_routed_experts
    read = main.always + routed
    bandwidth = work.card.tb_s * 1e12
    roof = read / (layout.tp * bandwidth)
    there = msgspec.structs.replace(main, routed=routed, embedding=0.0)
    cached = batch / layout.dp * cache_read(shape, work.kv_type, context)
    reading = (there.rank(layout.tp, layout.group, layout.travel) + cached) / bandwidth
    computing = batch * (2 * active(shape) + attention_flops(shape, context)) / work.flops
    longest = max(reading, computing)
    return Step(
        batch, experts, read / 1e9, roof * 1e3, batch / roof, longest * 1e3, batch / longest, 1 / longest,
        "memory" if reading >= computing else "compute",
    )  # fmt: skip


def steps(work: Work, context: int, batches: Sequence[int] = BATCHES) -> list[Step]:
    """For each batch."""
    return [step(work, batch, context) for batch in batches]


def attended(shape: Shape, context: int) -> float:
    """Cached entries that a token attends to, over all layers: of a sparse model those that its indexer chooses."""
    if shape.compress_ratios is None:
        return shape.num_hidden_layers * float(min(context, shape.index_topk or context))
    window = min(context, shape.sliding_window)
    chosen = {4: min(context / 4, shape.index_topk or 0), 128: context / 128}
    return sum(window + chosen.get(ratio, 0.0) for ratio in shape.ratios)


def cache_read(shape: Shape, kv_type: str, context: int) -> float:
    """Bytes of KV cache that a token of one request reads: what it attends to, and all of the indexer's keys."""
    plain = msgspec.structs.replace(shape, index_topk=None) if shape.compress_ratios is None else shape
    if shape.compress_ratios is None:
        wide = memory.cache(plain, "bf16" if kv_type == "auto" else kv_type).token / shape.num_hidden_layers
        return attended(shape, context) * wide + shape.num_hidden_layers * memory.index_key(shape) * float(context)
    latent = 2 * shape.head_dim if kv_type in ("bf16", "bfloat16") else shape.head_dim + shape.qk_rope_head_dim + 8
    return attended(shape, context) * latent + shape.ratios.count(4) * memory.index_key(shape) * context / 4


def attention_flops(shape: Shape, context: int) -> float:
    """Operations of a token's attention: each head over the latent of each entry, once for the scores and once for the values."""
    width = 2 * shape.kv_lora_rank + shape.qk_rope_head_dim if shape.compress_ratios is None else 2 * shape.head_dim
    return 2.0 * shape.num_attention_heads * width * attended(shape, context)


def prompt_flops(shape: Shape, tokens: int) -> float:
    """Operations of a prompt of so many tokens; each attends to half of it on average."""
    heads = 2 * shape.num_attention_heads
    width = shape.qk_nope_head_dim + shape.qk_rope_head_dim + shape.v_head_dim if shape.compress_ratios is None else 2 * shape.head_dim
    return tokens * (2 * active(shape) + heads * width * attended(shape, max(1, tokens // 2)))
