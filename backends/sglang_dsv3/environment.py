"""Which environment variables an `engine` section may set: names that somebody reads, and no secrets.

A secret in a configuration is shown by `check` and stands in the process's environment for as long as the engine runs.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping

from gateway.errors import ConfigError

_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,127}\Z")
# As whole words, or as the end of the name: SGLang has KEY and TOKEN inside names that are no secrets (SGLANG_INIT_NEW_TOKEN_RATIO).
_SECRET = re.compile(r"(?:_|^)(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)\Z|(?:_|^)(?:SECRET|PASSWORD|API_KEY|ACCESS_KEY)_")
# Set by Penstock itself, each with what to say instead.
OURS: Mapping[str, str] = {
    "CUDA_VISIBLE_DEVICES": "it comes from `gpus`",
    "HIP_VISIBLE_DEVICES": "it comes from `gpus`",
    "HF_HUB_OFFLINE": "weights are files here",
    "TRANSFORMERS_OFFLINE": "weights are files here",
    "TOKENIZERS_PARALLELISM": "it is always false",
    "SGLANG_REQUEST_STATE_WAIT_TIMEOUT": "aborts rely on it",
    "SGLANG_FORCE_STREAM_INTERVAL": "aborts rely on it",
    "SGLANG_USE_CPU_ENGINE": "it comes from `gpus`",
    "SGLANG_PLUGINS": "it comes from `gpus`",
    "PYTHONUNBUFFERED": "the engine's log is followed",
    "PYTHONPATH": "the engine has an environment of its own",
    "PYTHONHOME": "the engine has an environment of its own",
    "VIRTUAL_ENV": "the engine has an environment of its own",
    "PYTHONDONTWRITEBYTECODE": "it would double the time of a start",
}
# Families of names that libraries below SGLang read, and of which there is no list to ask.
FAMILIES = (
    "NCCL_", "NVSHMEM_", "UCX_", "GLOO_", "MC_", "DEEP_EP_", "DG_", "CUDA_", "NVIDIA_", "TORCH",
    "PYTORCH_", "TRITON_", "FLASHINFER_", "TILELANG_",
    "HIP_", "HSA_", "ROCM_", "RCCL_", "AITER_", "OMP_", "MKL_", "KMP_", "MALLOC_", "LD_PRELOAD", "LD_LIBRARY_PATH", "TMPDIR",
)  # fmt: skip


def problems(env: Mapping[str, str]) -> Iterator[ConfigError]:
    """What is wrong with names and values whatever SGLang is installed."""
    for name, value in env.items():
        if not _NAME.match(name):
            yield ConfigError(f"env.{name}", "is no name of an environment variable; accepted: capitals, digits and _")
        elif _SECRET.search(name):
            yield ConfigError(f"env.{name}", "looks like a secret, which belongs into a file of its own (the engine's key: api_key_file)")
        elif name in OURS:
            yield ConfigError(f"env.{name}", f"is not for env: {OURS[name]}")
        elif "\0" in value or len(value) > 4096:
            yield ConfigError(f"env.{name}", "must be a text of at most 4096 characters without a null")


def unknown(env: Mapping[str, str], known: Collection[str]) -> Iterator[ConfigError]:
    """Names that nobody reads: neither SGLang, whose own are `known`, nor a library below it."""
    for name in env:
        if name not in known and not name.startswith(FAMILIES):
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; accepted beside SGLang's own: {', '.join(FAMILIES[:7])} and the like"
            yield ConfigError(f"env.{name}", f"is read by nobody{hint}")
