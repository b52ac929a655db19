"""The settings of the how-to that this product comes from (a file for `SGLangEngine`): what each is called today, or why it is no more."""

from __future__ import annotations

from collections.abc import Mapping

# Keys of that file and of the calls around it, wherever in it they stand.
FORMER: Mapping[str, str] = {
    "max_seq_len": "it is `context_length` today",
    "batch_size": "it is `max_running_requests` today: the most that run at once, and nobody waits for a batch",
    "max_batch_size": "it is `max_running_requests` today: the most that run at once, and nobody waits for a batch",
    "gpu_ids": "it is `gpus` today",
    "cpu_offload": "it is `cpu_offload_gb` today, a number of GB for each GPU instead of true or false",
    "prefetch_streams": "it no longer exists: SGLang has no such streams",
    "max_wait_ms": "it no longer exists: requests are batched continuously, one joins at the next step, and there is no window to wait in",
    "fp8_recipe": "it no longer exists: DeepSeek's FP8 is e4m3 with scales for blocks of 128 x 128, as its checkpoint has it",
    "shard_size": "it no longer exists: a checkpoint has the shards that it was published with",
    "config_path": "it no longer exists: `penstock engine -c FILE` names the file",
    "trust_remote_code": "it no longer exists: SGLang has DeepSeek's model code of its own, and nothing of a checkpoint is run",
    "max_new_tokens": "it is a request's own `max_tokens` today",
    "name": "it is `served_model_name` today, and the name below `models`",
    "output_dir": "it is `model_path` today",
}
# Of a key that is still called so and takes other values.
CHANGED: Mapping[str, str] = {
    "stream_interval": "it counts tokens between two flushes of a stream today, not seconds: 1 is each token",
}
