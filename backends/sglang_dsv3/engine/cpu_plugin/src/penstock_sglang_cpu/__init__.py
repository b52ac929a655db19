"""SGLang general plugin (entry point group `sglang.srt.plugins`): the DeepSeek-V3 architecture on a CPU without AMX.

SGLang calls `activate` in every one of its processes, before a model is built.
"""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger(__name__)


def activate() -> None:
    """Check every name that is relied on, then put the CPU's ways in place. Does nothing unless SGLANG_USE_CPU_ENGINE=1.

    A name that has moved ends the process: SGLang would log an exception and go on without us, to fail later in a stranger place.
    """
    if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
        return
    from penstock_sglang_cpu import pinned

    problems = pinned.problems()
    if problems:
        sys.exit("penstock-sglang-cpu does not fit this SGLang:\n  " + "\n  ".join(problems))
    from penstock_sglang_cpu import attention, fp8, processes  # only now: they import the very names that were checked

    attention.install()
    fp8.install()
    processes.install()
    logger.info("penstock-sglang-cpu: absorbed MLA on torch_native, FP8 block weights dequantised once")
