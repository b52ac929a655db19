"""Every name of SGLang that the plugin relies on, with its parameters as they are in 0.5.23.

`python -m penstock_sglang_cpu.pinned` prints what has moved and exits with 1 if anything has.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import sys
from collections.abc import Sequence
from importlib.metadata import version

SGLANG = "0.5.23"
_EXTEND = (
    "self query output k_cache v_cache req_to_token req_pool_indices seq_lens extend_prefix_lens extend_seq_lens encoder_lens "
    "scaling enable_gqa causal is_cross_attn sliding_window_size"
)
_DECODE = (
    "self query output k_cache v_cache req_to_token req_pool_indices seq_lens encoder_lens scaling enable_gqa causal is_cross_attn "
    "sliding_window_size"
)
# module, dotted name in it, parameters (None where only the name matters)
NAMES: Sequence[tuple[str, str, str | None]] = (
    ("sglang.srt.models.deepseek_common.attention_backend_handler", "AttentionBackendRegistry.register", "backend_name handler_func"),
    ("sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods", "AttnForwardMethod.MLA", None),
    ("sglang.srt.layers.attention.torch_native_backend", "TorchNativeAttnBackend._run_sdpa_forward_extend", _EXTEND),
    ("sglang.srt.layers.attention.torch_native_backend", "TorchNativeAttnBackend._run_sdpa_forward_decode", _DECODE),
    ("sglang.srt.layers.quantization.fp8", "Fp8Config.get_supported_act_dtypes", ""),
    ("sglang.srt.layers.quantization.fp8", "Fp8LinearMethod.process_weights_after_loading", "self layer"),
    ("sglang.srt.layers.quantization.fp8", "Fp8LinearMethod.apply", "self layer x bias"),
    ("sglang.srt.layers.quantization.fp8", "Fp8MoEMethod.process_weights_after_loading", "self layer"),
    ("sglang.srt.layers.quantization.fp8", "Fp8MoEMethod.apply", "self layer dispatch_output"),
    ("sglang.srt.layers.quantization.fp8_utils", "block_quant_dequant", "x_q_block x_s block_size dtype"),
    ("sglang.srt.layers.moe.fused_moe_native", "moe_forward_native", "layer x topk_output moe_runner_config"),
    ("sglang.srt.layers.moe.token_dispatcher", "StandardCombineInput", None),
    ("sglang.srt.models.deepseek_common.deepseek_weight_loader", "block_quant_to_tensor_quant", None),
    ("sglang.srt.models.deepseek_v2", "DeepseekV3ForCausalLM", None),
    ("sglang.srt.plugins.hook_registry", "HookRegistry.register", "target hook hook_type source"),
    ("sglang.srt.plugins.hook_registry", "HookType.AFTER", None),
    ("sglang.srt.entrypoints.engine", "_set_envs_and_config", "server_args"),
)


def problems() -> list[str]:
    """What does not fit, one line each; empty when everything is where it was."""
    found: list[str] = []
    if version("sglang") != SGLANG:
        found.append(f"sglang is {version('sglang')}, made for {SGLANG}")
    for module, dotted, expected in NAMES:
        try:
            here = importlib.import_module(module)
            for part in dotted.split("."):
                # In the owner itself: what a class merely inherits is not the method that was read.
                if part not in (here.__members__ if isinstance(here, enum.EnumMeta) else vars(here)):
                    raise AttributeError(f"{here.__name__} has no {part} of its own")
                here = getattr(here, part)
        except (ImportError, AttributeError) as error:
            found.append(f"{module}.{dotted} is gone: {error}")
            continue
        if expected is not None:
            actual = " ".join(name for name in inspect.signature(here).parameters)
            if actual != expected:
                found.append(f"{module}.{dotted} takes ({actual}), made for ({expected})")
    return found


if __name__ == "__main__":
    moved = problems()
    print("\n".join(moved) or f"all {len(NAMES)} names are as in SGLang {SGLANG}")
    sys.exit(bool(moved))
