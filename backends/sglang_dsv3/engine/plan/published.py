"""Models that are planned for without their weights at hand, and what others have measured with them: facts, each with its source."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import NamedTuple

from backends.sglang_dsv3.engine.plan.models import Shape


class Known(NamedTuple):
    """A published model. `scheme`: how it is published."""

    name: str
    family: str
    shape: Shape
    scheme: str
    source: str


_V3 = Shape(
    hidden_size=7168, num_hidden_layers=61, vocab_size=129280, num_attention_heads=128, qk_rope_head_dim=64, moe_intermediate_size=2048,
    n_routed_experts=256, num_experts_per_tok=8, max_position_embeddings=163840, q_lora_rank=1536, n_shared_experts=1,
    first_k_dense_replace=3, num_nextn_predict_layers=1,
)  # fmt: skip
_V4_FLASH = Shape(
    hidden_size=4096, num_hidden_layers=43, vocab_size=129280, num_attention_heads=64, qk_rope_head_dim=64, moe_intermediate_size=2048,
    n_routed_experts=256, num_experts_per_tok=6, max_position_embeddings=1048576, q_lora_rank=1024, n_shared_experts=1,
    num_nextn_predict_layers=1, index_topk=512, compress_ratios=[0, 0, *([4, 128] * 20), 4, 0],
)  # fmt: skip
_V4 = Shape(
    hidden_size=7168, num_hidden_layers=61, vocab_size=129280, num_attention_heads=128, qk_rope_head_dim=64, moe_intermediate_size=3072,
    n_routed_experts=384, num_experts_per_tok=6, max_position_embeddings=1048576, q_lora_rank=1536, n_shared_experts=1,
    num_nextn_predict_layers=1, index_topk=1024, compress_ratios=[128, *([128, 4] * 30), 0], o_groups=16,
)  # fmt: skip
_V32 = Shape(**{**{name: getattr(_V3, name) for name in _V3.__struct_fields__}, "index_topk": 2048})
_HUB = "published (config.json of {})"

MODELS = (
    Known("V3", "DeepSeek-V3 or R1", _V3, "fp8", _HUB.format("deepseek-ai/DeepSeek-V3-0324")),
    Known("R1", "DeepSeek-V3 or R1", _V3, "fp8", _HUB.format("deepseek-ai/DeepSeek-R1")),
    Known("V3.1", "DeepSeek-V3.1", _V3, "fp8", _HUB.format("deepseek-ai/DeepSeek-V3.1")),
    Known("V3.2", "DeepSeek-V3.2 (DSA)", _V32, "fp8", _HUB.format("deepseek-ai/DeepSeek-V3.2")),
    Known("V4-Flash", "DeepSeek-V4", _V4_FLASH, "mxfp4", _HUB.format("nvidia/DeepSeek-V4-Flash-NVFP4")),
    Known("V4", "DeepSeek-V4", _V4, "mxfp4", _HUB.format("nvidia/DeepSeek-V4-Pro-NVFP4")),
)
_ALIASES = {"v3-0324": "v3", "r1-0528": "r1", "v3.1-terminus": "v3.1", "v3.2-exp": "v3.2", "v4-pro": "v4"}


def model(text: str) -> Known:
    """`V3`, `deepseek-v3.2`, `deepseek-ai/DeepSeek-R1-0528`; raises ValueError with those that are known."""
    word = text.lower().removeprefix("deepseek-ai/").removeprefix("deepseek-")
    word = _ALIASES.get(word, word)
    for known in MODELS:
        if known.name.lower() == word:
            return known
    names = [known.name for known in MODELS]
    near = difflib.get_close_matches(word.upper(), [name.upper() for name in names], 1)
    hint = f"; did you mean '{next(name for name in names if name.upper() == near[0])}'?" if near else ""
    raise ValueError(f"'{text}' is no folder with a config.json and no model that is known here; accepted: {', '.join(names)}{hint}")


class Deployment(NamedTuple):
    """A decode throughput that somebody has published, in tokens a second for each GPU; `batch`: requests at once on each GPU; `context`:
    tokens of each in the KV cache; `says`: what of it is the source's, and what follows from that."""

    what: str
    gpus: str
    dp: int
    ep: int
    batch: int
    context: int
    kv_cache_dtype: str
    tokens_per_s: float
    says: str
    source: str


# Contracts of July 2026 list more; these say enough of batch and context to be held against the roofline.
DEPLOYMENTS: Sequence[Deployment] = (
    Deployment(
        "LMSYS with Atlas Cloud, decode on 9 x 8 H100, EP 72", "9x8xH100-80", 72, 72, 256, 2000, "bf16", 22282 / 8,
        "22,282 tokens/s for a node with 2,000-token prompts, 256 requests a GPU", "https://lmsys.org/blog/2025-05-05-large-scale-ep/",
    ),
    Deployment(
        "DeepSeek's own fleet, decode on 18 x 8 H800, EP 144", "18x8xH800-80", 144, 144, 88, 4989, "bf16", 14800 / 8,
        "14.8k tokens/s for a node at 20 to 22 a user (so about 88 users a GPU), 4,989 tokens of cache for each",
        "https://github.com/deepseek-ai/open-infra-index, day 6",
    ),
    Deployment(
        "Ant Group, decode on 2 x 8 H20, EP 16", "2x8xH20", 16, 16, 32, 4864, "fp8_e4m3", 675,
        "675 tokens/s for a GPU at 32 requests each; 4,096 + 1,536 tokens, half of the answer in the cache; with speculation",
        "https://lmsys.org/blog/2025-09-26-sglang-ant-group",
    ),
)  # fmt: skip
