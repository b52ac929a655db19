"""Builds the tiny DeepSeek-V3 checkpoint: FP8 (e4m3) weights with 128 x 128 block scales, in DeepSeek-V3's own on-disk layout.

    python build.py FOLDER        10.3 M parameters, 12 MB, about two seconds; the same bytes every time

Runs in the engine's environment (torch, safetensors, numpy) and imports nothing of the gateway. The weights are random: what the model
says makes no sense, how it is computed is DeepSeek-V3's architecture. Shapes are chosen so that every slice of an FP8 matrix at
tp_size 4 is a multiple of the 128 block, which SGLang demands.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
BLOCK = 128
FP8_MAX = 448.0  # the largest finite e4m3 value
SEED = 20241226  # the day DeepSeek-V3 was published
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"

CONFIG: dict[str, object] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "intermediate_size": 1024,
    "moe_intermediate_size": 512,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "vocab_size": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "num_nextn_predict_layers": 0,
    "use_cache": True,
    "pretraining_tp": 1,
    "ep_size": 1,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    },
}
# Kept in the 16-bit type, as in the published checkpoint.
NOT_QUANTISED = ("embed_tokens", "lm_head", "mlp.gate.weight", "norm")


def weights(config: dict[str, object]) -> dict[str, torch.Tensor]:
    """Random float32 tensors under DeepSeek-V3's names; numpy's PCG64 gives the same numbers on every machine."""
    random = np.random.Generator(np.random.PCG64(SEED))
    size = {name: value for name, value in config.items() if isinstance(value, int)}
    hidden, heads = size["hidden_size"], size["num_attention_heads"]

    def normal(*shape: int, std: float | None = None) -> torch.Tensor:
        scale = np.float32(shape[-1] ** -0.5 if std is None else std)
        return torch.from_numpy(random.standard_normal(shape, dtype=np.float32) * scale)

    def mlp(prefix: str, width: int) -> dict[str, torch.Tensor]:
        return {
            f"{prefix}gate_proj.weight": normal(width, hidden),
            f"{prefix}up_proj.weight": normal(width, hidden),
            f"{prefix}down_proj.weight": normal(hidden, width),
        }

    found: dict[str, torch.Tensor] = {"model.embed_tokens.weight": normal(size["vocab_size"], hidden, std=1.0)}
    for layer in range(size["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        attention = f"{prefix}self_attn."
        query_head = size["qk_nope_head_dim"] + size["qk_rope_head_dim"]
        found |= {
            f"{prefix}input_layernorm.weight": 1.0 + normal(hidden, std=0.1),
            f"{attention}q_a_proj.weight": normal(size["q_lora_rank"], hidden),
            f"{attention}q_a_layernorm.weight": 1.0 + normal(size["q_lora_rank"], std=0.1),
            f"{attention}q_b_proj.weight": normal(heads * query_head, size["q_lora_rank"]),
            f"{attention}kv_a_proj_with_mqa.weight": normal(size["kv_lora_rank"] + size["qk_rope_head_dim"], hidden),
            f"{attention}kv_a_layernorm.weight": 1.0 + normal(size["kv_lora_rank"], std=0.1),
            f"{attention}kv_b_proj.weight": normal(heads * (size["qk_nope_head_dim"] + size["v_head_dim"]), size["kv_lora_rank"]),
            f"{attention}o_proj.weight": normal(hidden, heads * size["v_head_dim"]),
            f"{prefix}post_attention_layernorm.weight": 1.0 + normal(hidden, std=0.1),
        }
        if layer < size["first_k_dense_replace"]:
            found |= mlp(f"{prefix}mlp.", size["intermediate_size"])
            continue
        found[f"{prefix}mlp.gate.weight"] = normal(size["n_routed_experts"], hidden)
        found[f"{prefix}mlp.gate.e_score_correction_bias"] = normal(size["n_routed_experts"], std=0.05)
        for expert in range(size["n_routed_experts"]):
            found |= mlp(f"{prefix}mlp.experts.{expert}.", size["moe_intermediate_size"])
        found |= mlp(f"{prefix}mlp.shared_experts.", size["moe_intermediate_size"] * size["n_shared_experts"])
    found["model.norm.weight"] = 1.0 + normal(hidden, std=0.1)
    # Logits spread enough that greedy answers do not hang on rounding.
    found["lm_head.weight"] = normal(size["vocab_size"], hidden, std=0.12)
    return found


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 values and the float32 scale of every 128 x 128 block (`weight_scale_inv`): value * scale is the weight."""
    rows, columns = weight.shape
    down, across = -(-rows // BLOCK), -(-columns // BLOCK)
    padded = torch.zeros(down * BLOCK, across * BLOCK)
    padded[:rows, :columns] = weight
    blocks = padded.view(down, BLOCK, across, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / FP8_MAX
    values = (blocks / scale[:, None, :, None]).view(down * BLOCK, across * BLOCK)[:rows, :columns]
    return values.to(torch.float8_e4m3fn).contiguous(), scale.contiguous()


def stored(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as they lie on disk."""
    out: dict[str, torch.Tensor] = {}
    for name, weight in found.items():
        if weight.dim() == 2 and not any(part in name for part in NOT_QUANTISED):
            out[name], out[f"{name}_scale_inv"] = quantise(weight)
        else:
            out[name] = weight.to(torch.float32 if name.endswith("correction_bias") else torch.bfloat16)
    return out


def build(folder: Path) -> str:
    """Write the checkpoint, whole or not at all; returns the SHA-256 over its files."""
    scratch = folder.with_name(folder.name + f".{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    tensors = stored(weights(CONFIG))
    # Two shards and an index, as DeepSeek-V3 has 163.
    half = [name for name in tensors if name.startswith(("model.embed_tokens", "model.layers.0.", "model.layers.1."))]
    shards = {"model-00001-of-00002.safetensors": half, "model-00002-of-00002.safetensors": [n for n in tensors if n not in half]}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, scratch / shard, metadata={"format": "pt"})
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {name: shard for shard, names in shards.items() for name in names}
    _json(scratch / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))})
    vocabulary = {token["content"]: token["id"] for token in json.loads((HERE / "tokenizer.json").read_text("utf-8"))["added_tokens"]}
    ids = {"bos_token_id": vocabulary[BOS], "eos_token_id": vocabulary[EOS]}
    _json(scratch / "config.json", CONFIG | ids)
    _json(scratch / "generation_config.json", {"_from_model_config": True, **ids, "do_sample": True, "temperature": 1.0, "top_p": 1.0})
    shutil.copyfile(HERE / "tokenizer.json", scratch / "tokenizer.json")
    tokens = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    template = (HERE / "chat_template.jinja").read_text("utf-8")
    _json(
        scratch / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 16384, "add_bos_token": False, "add_eos_token": False,
         "clean_up_tokenization_spaces": False, **tokens, "chat_template": template},
    )  # fmt: skip
    digest = hashlib.sha256()
    for file in sorted(scratch.iterdir()):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    if folder.exists():
        shutil.rmtree(folder)
    scratch.rename(folder)
    return digest.hexdigest()


def _json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"{target}: sha256 {build(target)}")
