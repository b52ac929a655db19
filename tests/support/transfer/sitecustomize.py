"""What keeps SGLang 0.5.23 from handing over a KV cache without a GPU, taken away in the processes of a test. It copies page numbers into
pinned memory, beside the forward pass: `RuntimeError: pin_memory=True requires a CUDA or other accelerator backend; no pinned memory
allocator is available on this system` (disaggregation/prefill.py, `_send_kv_chunk`). Its other way, which takes them from where they are,
needs none."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence

NAME = "sglang.srt.disaggregation.mooncake.conn"


class _Unpinned(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        loader = spec.loader
        assert loader is not None
        load = loader.exec_module

        def load_and_mend(module: types.ModuleType) -> None:
            load(module)
            assert module.MooncakeKVSender.supports_host_tensor_indices
            module.MooncakeKVSender.supports_host_tensor_indices = False

        loader.exec_module = load_and_mend  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Unpinned())
