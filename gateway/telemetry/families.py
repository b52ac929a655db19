"""What a metric is, and those that hosts say of themselves."""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """One metric: counter, gauge or (with buckets) histogram."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_ENGINE_LABELS = ("backend", "host")
ENGINE = {
    name: Family(f"penstock_engine_{name}", "gauge", words, _ENGINE_LABELS)
    for name, words in (
        ("running_requests", "Requests the engine has in its batch."),
        ("queued_requests", "Requests that wait in the engine."),
        ("max_running_requests", "Requests its batch can hold."),
        ("kv_usage_ratio", "Share of the KV cache in use."),
        ("cache_hit_ratio", "Share of prompt tokens found in the prefix cache."),
        ("generation_tokens_per_second", "Tokens it generates a second."),
        ("batching_efficiency_ratio", "Running over possible requests, while any wait."),
        ("ready", "Whether the agent beside it says that it takes requests."),
        ("kv_events_precise", "1 where all that leaves its cache is heard, 0 while some of it may have been missed."),
        ("kv_events_evicted_blocks", "Blocks that it has said to have left its cache, since it is listened to."),
        ("kv_events_missed", "KV events that it sent and nobody heard or got again."),
    )
}
MACHINE = {
    name: Family(f"penstock_host_{name}", "gauge", words, _ENGINE_LABELS)
    for name, words in (
        ("memory_used_ratio", "Share of the host's memory in use."),
        ("swap_used_bytes", "Swap in use."),
        ("disk_free_bytes", "Free disk where the weights lie."),
    )
}
GPU = {
    name: Family(f"penstock_gpu_{name}", "gauge", words, (*_ENGINE_LABELS, "gpu"))
    for name, words in (
        ("utilisation_ratio", "Share of time in which a kernel ran."),
        ("memory_used_ratio", "Share of a GPU's memory in use."),
        ("temperature_celsius", "Temperature of a GPU."),
        ("power_watts", "Power drawn."),
        ("ecc_uncorrected", "Uncorrected memory errors since the driver was loaded."),
        ("throttled", "Whether it is slowed down by heat or power."),
    )
}
