"""SGLang's command line and environment for a CPU engine, from the `engine` section."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from backends.sglang_dsv3.config import Engine
from backends.sglang_dsv3.engine import environment_folder


def command(config: Engine, home: Path, model_path: Path, served_name: str, port: int) -> list[str]:
    """The argument vector; every flag is checked against the installed SGLang's own parser by a test."""
    return [
        str(environment_folder(home) / "bin" / "python"), "-m", "sglang.launch_server",
        "--model-path", str(model_path),
        "--served-model-name", served_name,
        "--host", "127.0.0.1", "--port", str(port),
        "--device", "cpu", "--dtype", config.dtype, "--tp-size", str(config.tp_size),
        # What runs without a GPU, without AMX, and with the plugin's absorbed MLA.
        "--attention-backend", "torch_native", "--sampling-backend", "pytorch",
        "--disable-overlap-schedule", "--disable-cuda-graph",
        "--context-length", str(config.context_length),
        "--max-running-requests", str(config.max_running_requests),
        # The default takes a share of the machine's memory for the KV cache, gigabytes that a tiny model never needs.
        "--max-total-tokens", str(config.max_total_tokens),
        "--enable-metrics", "--enable-cache-report",
        "--log-level-http", "warning",
        "--sleep-on-idle",  # an idle scheduler polls at a full core otherwise
        # An untrained model loves white space, and JSON allows any amount of it.
        "--constrained-json-disable-any-whitespace",
        *config.extra_args,
    ]  # fmt: skip


def environment(config: Engine, inherited: Mapping[str, str]) -> dict[str, str]:
    """The engine's environment variables, on top of what it inherits."""
    env = dict(inherited)
    # A python told to write no byte code starts SGLang in 57 s instead of 24 s, and its path is none of ours.
    for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
        env.pop(name, None)
    env.update(
        SGLANG_USE_CPU_ENGINE="1",
        SGLANG_PLUGINS="penstock_cpu",
        # Loads the one model file that is needed instead of all two hundred.
        SGLANG_EXTERNAL_MODEL_PACKAGE="penstock_sglang_cpu.models",
        # One thread: with two on two shared cores 32 streams were slower (507 against 729 tokens/s, 2026-11-23).
        OMP_NUM_THREADS="1",
        TORCHDYNAMO_DISABLE="1",  # without it the warm-up compiles C++ for 20 s
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        # How soon SGLang notices that the client of a JSON request is gone: it looks every so many seconds, or tokens.
        SGLANG_REQUEST_STATE_WAIT_TIMEOUT="1",
        SGLANG_FORCE_STREAM_INTERVAL="16",
        PYTHONUNBUFFERED="1",
    )
    if config.tp_size > 1:
        env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(_cores(config.tp_size))
    return env


def _cores(ranks: int) -> Sequence[str]:
    """A core for every rank; ranks share cores when there are more of them."""
    cores = sorted(os.sched_getaffinity(0))
    return [str(cores[rank % len(cores)]) for rank in range(ranks)]
