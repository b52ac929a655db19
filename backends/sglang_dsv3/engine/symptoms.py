"""Why an engine ended, from its last words: what to look at and what to change.

Each pattern says where its words come from. Those with a `source` are found in that file of the installed packages by a test; `proven`
means that a test has made the real engine end so. The others were never seen here: they are what CUDA builds and drivers say, and no
machine of ours has one.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from typing import NamedTuple


class Symptom(NamedTuple):
    """One way to end. `retry`: whether another start could go better by itself."""

    kind: str
    pattern: re.Pattern[str]
    advice: str
    source: str = ""
    words: str = ""
    proven: bool = False
    retry: bool = True


def _symptom(kind: str, pattern: str, advice: str, source: str = "", words: str = "", proven: bool = False, retry: bool = True) -> Symptom:
    return Symptom(kind, re.compile(pattern), advice, source, words, proven, retry)


_LESS_MEMORY = (
    "lower engine.context_length or engine.max_running_requests, or set engine.memory_fraction (weights and KV cache share it: "
    "too low leaves no cache, too high no room for activations); engine.cpu_offload_gb moves weights to host memory, at a price in speed"
)
# In this order: the first that fits is the one.
SYMPTOMS = (
    _symptom(
        "no room for the KV cache",
        r"Not enough memory\. Please try to increase --mem-fraction-static",
        "the weights leave no room for the KV cache: raise engine.memory_fraction, or give more or larger GPUs",
        "sglang/srt/model_executor/pool_configurator.py",
        "Not enough memory. Please try to increase --mem-fraction-static.",
    ),
    _symptom(
        "prefill out of memory",
        r"Prefill out of memory\. Try to lower your batch size",
        "lower engine.chunked_prefill_size or engine.max_running_requests",
        "sglang/srt/mem_cache/allocation.py",
        "Prefill out of memory. Try to lower your batch size.",
    ),
    _symptom(
        "CUDA graphs",
        r"Capture cuda graph failed",
        "graphs did not fit: lower engine.memory_fraction or engine.max_running_requests",
        "sglang/srt/model_executor/runner/decode_cuda_graph_runner.py",
        "Capture cuda graph failed:",
    ),
    _symptom("out of GPU memory", r"(CUDA|HIP) out of memory|torch\.(cuda\.)?OutOfMemoryError", _LESS_MEMORY),
    _symptom(
        "NCCL",
        r"NCCL error|ncclUnhandledCudaError|ncclSystemError|ncclRemoteError|NCCL WARN",
        "look at the file with NCCL_DEBUG=INFO for the first WARN: a network interface (NCCL_SOCKET_IFNAME), a firewall between nodes, "
        "too little /dev/shm, or a GPU that fell off the bus",
        "sglang/srt/distributed/device_communicators/pynccl_wrapper.py",
        "NCCL error:",
    ),
    _symptom(
        "driver",
        r"driver on your system is too old|CUDA driver version is insufficient|Found no NVIDIA driver",
        "install a newer NVIDIA driver (`nvidia-smi` names the CUDA version that the present one can do)",
        retry=False,
    ),
    _symptom(
        "port taken",
        r"address already in use|Port is already in use|is not available at|\d+ is not available|port \d+ is in use",
        "another process has engine.port (`ss -ltnp` names it)",
        "sglang/srt/server_args.py",
        "Port is already in use.",
        proven=True,
    ),
    _symptom(
        "shape",
        r"is not divisible by weight quantization block_n",
        "the checkpoint's matrices cannot be cut into so many FP8 blocks: use another number of GPUs",
        "sglang/srt/layers/quantization/fp8.py",
        "is not divisible by",
        retry=False,
    ),
    _symptom(
        "arguments",
        r"(launch_server\.py|sglang serve): error: ",
        "SGLang does not know an argument or its value: look at engine.extra_args",
        proven=True,
        retry=False,
    ),
    _symptom(
        "plugin",
        r"No module named 'sglang'|No module named 'torch'",
        "the engine's environment is not whole: `penstock engine install`",
        retry=False,
    ),
    _symptom(
        "stuck", r"[Ww]atchdog.{0,40}timeout", "a batch did not end within SGLang's watchdog time; look at GPU errors (`nvidia-smi -q`)"
    ),
)


class End(NamedTuple):
    """How a life of the engine ended, in words."""

    how: str
    kind: str = ""
    advice: str = ""
    retry: bool = True


def classify(code: int | None, tail: Sequence[str]) -> End:
    """From the exit code and the last lines of the log."""
    for symptom in SYMPTOMS:
        for line in reversed(tail):
            if symptom.pattern.search(line):
                return End(f"{symptom.kind}: {_short(line)}", symptom.kind, symptom.advice, symptom.retry)
    if code == -signal.SIGKILL:
        return End(
            "SGLang was ended by SIGKILL", "killed", "somebody killed it, or the kernel did for want of host memory (`dmesg | grep -i oom`)"
        )
    if code is not None and code < 0:
        return End(f"SGLang was ended by {signal.Signals(-code).name}")
    said = next((line for line in reversed(tail) if re.search(r"\w*(Error|Exception|error):", line)), tail[-1] if tail else "")
    return End(f"SGLang ended with exit code {code}{f': {_short(said)}' if said else ''}")


def _short(line: str) -> str:
    return line.strip()[-200:]
