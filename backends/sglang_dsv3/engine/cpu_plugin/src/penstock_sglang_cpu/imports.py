"""Two packages that SGLang imports and a CPU machine cannot have: `torchvision` as published, and `sgl_kernel`.

Loaded at interpreter start by `penstock_sglang_cpu.pth`; imports nothing but the standard library until one of the two is asked for.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

# What SGLang 0.5.23 takes from sgl_kernel while it starts on a CPU (recorded on 2026-11-24); all are of speculative decoding, KV cache
# moves between devices or quantised kernels, none is called when DeepSeek-V3 runs. A name that is not here is an ImportError, so that
# `hasattr(sgl_kernel, ...)` stays truthful.
NAMES = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "verify_tree_greedy_cpu",
)


class _TorchvisionFirst(importlib.abc.MetaPathFinder):
    """The published torchvision is built against CUDA torch: beside a CPU torch its C extension does not load, and importing it fails
    with `operator torchvision::nms does not exist`. Declaring the two operators first is enough; nothing here ever calls them."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None) -> None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for schema in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                           "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"):  # fmt: skip
                self.library.define(schema)
            _KEPT.append(self.library)  # the operators live as long as this object


_KEPT: list[Any] = []


class _KernelLast(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A stand-in for `sgl_kernel`, asked only after every other finder: a real one that is installed is always the one imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "sgl_kernel":
            return importlib.machinery.ModuleSpec(fullname, self)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__doc__ = "A stand-in: importable, never callable. See penstock_sglang_cpu.imports."
        for name in NAMES:
            setattr(module, name, _Missing(f"{spec.name}.{name}"))
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Missing:
    """Can be imported and kept; says what it is as soon as it is used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *arguments: object, **named: object) -> object:
        raise NotImplementedError(f"{self._name} is a CUDA kernel; the CPU engine has none")

    def __repr__(self) -> str:
        return f"<missing {self._name}>"


sys.meta_path.insert(0, _TorchvisionFirst())
sys.meta_path.append(_KernelLast())
