"""FP8 block weights on a CPU: read by SGLang's own loader, dequantised once, multiplied in the compute type (W8A16).

SGLang refuses FP8 on a CPU without AMX (`Fp8LinearMethod on CPU requires that CPU has AMX support`).
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization import fp8
from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant
from sglang.srt.models.deepseek_common import deepseek_weight_loader


def install() -> None:
    """Replace what SGLang does after loading FP8 weights and when it multiplies with them."""
    fp8.Fp8Config.get_supported_act_dtypes = classmethod(lambda cls: [torch.bfloat16, torch.half, torch.float32])
    fp8.Fp8LinearMethod.process_weights_after_loading = _linear_loaded
    fp8.Fp8LinearMethod.apply = _linear_apply
    fp8.Fp8MoEMethod.process_weights_after_loading = _experts_loaded
    fp8.Fp8MoEMethod.apply = _experts_apply
    # The absorbed half of kv_b_proj: as the CUDA branch does for 128 x 128 blocks, not requantised to one scale per tensor.
    deepseek_weight_loader.block_quant_to_tensor_quant = lambda weight, scale, block: (
        block_quant_dequant(weight, scale, block, _compute_type()),
        None,
    )


def _compute_type() -> torch.dtype:
    """What `--dtype` says: the loader makes it torch's default while it builds and loads the model."""
    return torch.get_default_dtype()


def _linear_loaded(self: Any, layer: torch.nn.Module) -> None:
    if not self.block_quant:
        raise ValueError("only FP8 with block scales is supported on a CPU")
    block = self.quant_config.weight_block_size
    # `weight` stays FP8: the loader of absorbed MLA reads it again.
    layer.penstock_weight = block_quant_dequant(layer.weight.data, layer.weight_scale_inv.data, block, _compute_type())


def _linear_apply(self: Any, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.nn.functional.linear(x, layer.penstock_weight.to(x.dtype), bias)


def _experts_loaded(self: Any, layer: torch.nn.Module) -> None:
    block = self.quant_config.weight_block_size
    for name in ("w13_weight", "w2_weight"):
        weight, scale = getattr(layer, name), getattr(layer, f"{name}_scale_inv")
        dequantised = block_quant_dequant(weight.data, scale.data, block, _compute_type())
        setattr(layer, name, torch.nn.Parameter(dequantised, requires_grad=False))


def _experts_apply(self: Any, layer: torch.nn.Module, dispatch_output: Any) -> Any:
    hidden, routing = dispatch_output.hidden_states, dispatch_output.topk_output
    return StandardCombineInput(hidden_states=moe_forward_native(layer, hidden, routing, self.moe_runner_config))
