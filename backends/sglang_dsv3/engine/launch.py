"""SGLang's command line and environment, from the `engine` section: on GPUs, or on a CPU with the plugin."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from backends.sglang_dsv3.config import Engine
from backends.sglang_dsv3.engine import environment_folder

# What the tiny checkpoint is served with where nothing is said. SGLang's own choice takes a share of the machine's memory for the KV cache,
# gigabytes that a tiny model never needs.
CPU_CONTEXT, CPU_TOTAL = 4096, 65536


def command(config: Engine, home: Path, model_path: Path, served_name: str, port: int, secrets: Path | None = None) -> list[str]:
    """The argument vector; every flag is checked against the installed SGLang's own parser by a test. `secrets`: a file with the engine's
    key, since a command line can be read by everybody on the machine."""
    cpu = not config.gpus
    given: list[tuple[str, object]] = [
        ("--model-path", model_path),
        ("--served-model-name", served_name),
        ("--weight-version", config.weight_version),
        ("--host", config.host),
        ("--port", port),
        ("--device", "cpu" if cpu else None),
        ("--dtype", config.dtype or ("bfloat16" if cpu else None)),
        ("--quantization", config.quantization),
        ("--kv-cache-dtype", config.kv_cache_dtype),
        ("--attention-backend", config.attention_backend or ("torch_native" if cpu else None)),
        ("--tp-size", config.ranks),
        ("--nnodes", config.nnodes if config.nnodes > 1 else None),
        ("--node-rank", config.node_rank if config.nnodes > 1 else None),
        ("--dist-init-addr", config.dist_init_addr if config.nnodes > 1 else None),
        ("--context-length", config.context_length or (CPU_CONTEXT if cpu else None)),
        ("--max-running-requests", config.max_running_requests),
        ("--max-total-tokens", config.max_total_tokens or (CPU_TOTAL if cpu else None)),
        ("--mem-fraction-static", config.memory_fraction),
        ("--chunked-prefill-size", config.chunked_prefill_size),
        ("--cpu-offload-gb", config.cpu_offload_gb),
        ("--stream-interval", config.stream_interval if config.stream_interval != 1 else None),
        ("--tool-call-parser", config.tool_call_parser),
        ("--reasoning-parser", config.reasoning_parser),
        ("--speculative-algorithm", config.speculative_algorithm),
        ("--speculative-num-steps", config.speculative_num_steps),
        ("--speculative-eagle-topk", config.speculative_eagle_topk),
        ("--speculative-num-draft-tokens", config.speculative_num_draft_tokens),
        ("--attn-dp-size", config.attn_dp_size),
        ("--ep-size", config.ep_size),
        ("--moe-a2a-backend", config.moe_a2a_backend),
        ("--moe-runner-backend", config.moe_runner_backend),
        ("--ep-num-redundant-experts", config.ep_num_redundant_experts),
        ("--hicache-size", config.hicache_size),
        ("--hicache-write-policy", config.hicache_write_policy),
        ("--hicache-storage-backend", config.hicache_storage_backend),
        ("--otlp-traces-endpoint", config.otlp_endpoint),
        ("--log-level-http", "warning"),
        ("--config", secrets),
    ]
    argv = [str(environment_folder(home) / "bin" / "python"), "-m", "sglang.launch_server"]
    for flag, value in given:
        if value is not None:
            argv += [flag, str(value)]
    argv += ["--enable-metrics", "--enable-cache-report"]
    for switch, on in (
        ("--enable-eplb", config.eplb),
        ("--enable-hierarchical-cache", config.hicache),
        ("--enable-deterministic-inference", config.deterministic),
        ("--enable-priority-scheduling", config.priority_scheduling is not None),
        ("--schedule-low-priority-values-first", config.priority_scheduling == "lower_first"),
    ):
        if on:
            argv.append(switch)
    if config.otlp_endpoint is not None:
        argv.append("--enable-trace")
    if cpu:
        argv += [
            # What runs without a GPU, without AMX, and with the plugin's absorbed MLA.
            "--sampling-backend", "pytorch",
            "--disable-overlap-schedule", "--disable-cuda-graph",
            "--sleep-on-idle",  # an idle scheduler polls at a full core otherwise
            # An untrained model loves white space, and JSON allows any amount of it.
            "--constrained-json-disable-any-whitespace",
        ]  # fmt: skip
    return [*argv, *config.extra_args]


def additions(config: Engine) -> dict[str, str]:
    """The environment variables that are set for the engine."""
    env = {
        **config.env,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # How soon SGLang notices that the client of a JSON request is gone: it looks every so many seconds, or tokens.
        "SGLANG_REQUEST_STATE_WAIT_TIMEOUT": "1",
        "SGLANG_FORCE_STREAM_INTERVAL": "16",
        "PYTHONUNBUFFERED": "1",
    }
    if config.gpus:
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, config.gpus)), **env}
    env |= {
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_PLUGINS": "penstock_cpu",
        # Loads the one model file that is needed instead of all two hundred.
        "SGLANG_EXTERNAL_MODEL_PACKAGE": "penstock_sglang_cpu.models",
        # One thread: with two on two shared cores 32 streams were slower (507 against 729 tokens/s, 2026-11-23).
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",  # without it the warm-up compiles C++ for 20 s
    }
    if config.ranks > 1:
        env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(_cores(config.ranks))
    return env


def environment(config: Engine, inherited: Mapping[str, str]) -> dict[str, str]:
    """The engine's whole environment."""
    env = dict(inherited)
    # A python told to write no byte code starts SGLang in 57 s instead of 24 s, and its path is none of ours.
    for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
        env.pop(name, None)
    return {**env, **additions(config)}


def _cores(ranks: int) -> Sequence[str]:
    """A core for every rank; ranks share cores when there are more of them."""
    cores = sorted(os.sched_getaffinity(0))
    return [str(cores[rank % len(cores)]) for rank in range(ranks)]
