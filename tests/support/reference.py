"""DeepSeek-V3 written down a second time, in numpy and float64, straight from the published architecture: nothing of SGLang or torch.

Reads a checkpoint's own files (safetensors header, bfloat16 and e4m3 bytes, 128 x 128 block scales) and gives logits for every
position. Notation of the DeepSeek-V2/V3 reports: multi-head latent attention, here in its plain (not absorbed) form, YaRN rotary
embedding, sigmoid gating with a correction bias, group-limited top-k, one shared expert.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
BLOCK = 128


def _e4m3_table() -> Array:
    """The 256 values of e4m3 (finite numbers and one NaN): sign, 4 bits of exponent with bias 7, 3 bits of mantissa."""
    values = np.zeros(256)
    for code in range(256):
        sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 0xF, code & 7
        if exponent == 0xF and mantissa == 7:
            values[code] = np.nan
        elif exponent == 0:
            values[code] = sign * mantissa / 8 * 2.0**-6
        else:
            values[code] = sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return values


E4M3 = _e4m3_table()


def read_tensors(folder: Path) -> dict[str, Array]:
    """Every weight of a checkpoint as float64, FP8 ones multiplied with their block scales."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stored: dict[str, Array] = {}
    for shard in sorted(set(index["weight_map"].values())):
        raw = (folder / shard).read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        for name, entry in header.items():
            if name != "__metadata__":
                assert index["weight_map"][name] == shard
                start, end = entry["data_offsets"]
                stored[name] = _decode(raw[8 + size + start : 8 + size + end], entry["dtype"]).reshape(entry["shape"])
    scales = {name for name in stored if name.endswith("_scale_inv")}
    for name in scales:
        weight = stored[name.removesuffix("_scale_inv")]
        scale = np.repeat(np.repeat(stored[name], BLOCK, axis=0), BLOCK, axis=1)
        weight *= scale[: weight.shape[0], : weight.shape[1]]
    return {name: value for name, value in stored.items() if name not in scales}


def _decode(raw: bytes, dtype: str) -> Array:
    if dtype == "F8_E4M3":
        return E4M3[np.frombuffer(raw, np.uint8)]
    if dtype == "BF16":
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    assert dtype == "F32", dtype
    return np.frombuffer(raw, np.float32).astype(np.float64)


class Reference:
    """The model of one checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.weights = read_tensors(folder)

    def logits(self, tokens: list[int]) -> Array:
        """[positions, vocabulary] for one sequence."""
        config = self.config
        hidden = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            hidden = hidden + self._attention(prefix + "self_attn.", self._norm(prefix + "input_layernorm.weight", hidden))
            inner = self._norm(prefix + "post_attention_layernorm.weight", hidden)
            dense = layer < config["first_k_dense_replace"]
            hidden = hidden + (self._mlp(prefix + "mlp.", inner) if dense else self._experts(prefix + "mlp.", inner))
        out: Array = self._norm("model.norm.weight", hidden) @ self.weights["lm_head.weight"].T
        return out

    def _norm(self, name: str, x: Array) -> Array:
        out: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"]) * self.weights[name]
        return out

    def _linear(self, name: str, x: Array) -> Array:
        return x @ self.weights[name].T

    def _attention(self, prefix: str, x: Array) -> Array:
        config, count = self.config, len(x)
        heads, nope, rope = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        value, latent = config["v_head_dim"], config["kv_lora_rank"]
        compressed = self._norm(prefix + "q_a_layernorm.weight", self._linear(prefix + "q_a_proj.weight", x))
        query = self._linear(prefix + "q_b_proj.weight", compressed).reshape(count, heads, nope + rope)
        joint = self._linear(prefix + "kv_a_proj_with_mqa.weight", x)
        key_value = self._linear(prefix + "kv_b_proj.weight", self._norm(prefix + "kv_a_layernorm.weight", joint[:, :latent]))
        key_value = key_value.reshape(count, heads, nope + value)
        query_rope = self._rotate(query[..., nope:])
        key_rope = self._rotate(joint[:, None, latent:])  # one rotary key for all heads
        scores = np.einsum("qhd,khd->hqk", query[..., :nope], key_value[..., :nope])
        scores += np.einsum("qhd,kd->hqk", query_rope, key_rope[:, 0])
        scaling = config["rope_scaling"]
        stretch = 0.1 * scaling["mscale_all_dim"] * math.log(scaling["factor"]) + 1.0
        scores *= (nope + rope) ** -0.5 * stretch * stretch
        scores = np.where(np.tri(count, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", weights, key_value[..., nope:]).reshape(count, heads * value)
        return self._linear(prefix + "o_proj.weight", mixed)

    def _rotate(self, x: Array) -> Array:
        """YaRN rotary embedding over neighbouring pairs; x is [positions, heads, rope]."""
        config, scaling = self.config, self.config["rope_scaling"]
        size, base, original = config["qk_rope_head_dim"], config["rope_theta"], scaling["original_max_position_embeddings"]
        exponent = np.arange(0, size, 2) / size
        plain = base**-exponent

        def dimension(rotations: float) -> float:
            return float(size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base)))

        low = max(math.floor(dimension(scaling["beta_fast"])), 0)
        high = min(math.ceil(dimension(scaling["beta_slow"])), size - 1)
        keep = 1.0 - np.clip((np.arange(size // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
        frequencies = plain / scaling["factor"] * (1.0 - keep) + plain * keep
        angles = np.arange(len(x))[:, None] * frequencies
        cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        out = np.empty_like(x)
        out[..., 0::2] = even * cosine - odd * sine
        out[..., 1::2] = odd * cosine + even * sine
        return out

    def _mlp(self, prefix: str, x: Array) -> Array:
        gate = self._linear(prefix + "gate_proj.weight", x)
        return self._linear(prefix + "down_proj.weight", gate / (1 + np.exp(-gate)) * self._linear(prefix + "up_proj.weight", x))

    def _experts(self, prefix: str, x: Array) -> Array:
        config = self.config
        groups, per_group = config["n_group"], config["n_routed_experts"] // config["n_group"]
        affinity = 1 / (1 + np.exp(-self._linear(prefix + "gate.weight", x)))
        biased = affinity + self.weights[prefix + "gate.e_score_correction_bias"]
        grouped = biased.reshape(len(x), groups, per_group)
        group_score = np.sort(grouped, axis=-1)[..., -2:].sum(-1)
        out = self._mlp(prefix + "shared_experts.", x)
        for position in range(len(x)):
            allowed = np.argsort(group_score[position])[-config["topk_group"] :]
            candidates = [expert for expert in range(config["n_routed_experts"]) if expert // per_group in allowed]
            chosen = sorted(candidates, key=lambda expert: biased[position, expert])[-config["num_experts_per_tok"] :]
            share = affinity[position, chosen] / affinity[position, chosen].sum() * config["routed_scaling_factor"]
            for weight, expert in zip(share, chosen, strict=True):
                out[position] += weight * self._mlp(f"{prefix}experts.{expert}.", x[position : position + 1])[0]
        return out


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    out: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return out
