"""SGLang's processes are forked from the first one instead of spawned, so that its packages are imported once.

SGLang spawns because CUDA cannot be forked; a CPU can. Importing SGLang is nearly all that a start with a tiny checkpoint costs: of one
rank 25.6 s of CPU time spawned and 9.9 s forked, and 1,700 against 1,260 MB of memory for its processes (2026-11-28, 2 shared cores of an
AMD EPYC). At the fork nothing has been computed and no thread pool of torch's is running: the engine of this plugin has one thread
(`OMP_NUM_THREADS=1`).
"""

from __future__ import annotations

import multiprocessing
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType


def install() -> None:
    """Ask SGLang for a call when it has chosen how its processes start, which it does once, in its first process."""
    HookRegistry.register("sglang.srt.entrypoints.engine._set_envs_and_config", _chosen, HookType.AFTER)


def _chosen(result: Any, server_args: Any) -> None:
    multiprocessing.set_start_method("fork", force=True)
