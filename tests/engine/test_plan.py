"""The plan held against the real engine: the tiny checkpoint's own headers, and what a running SGLang says of its memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backends.sglang_dsv3.config import Engine
from backends.sglang_dsv3.engine import environment_folder
from backends.sglang_dsv3.engine.plan import models, question, start, weights
from backends.sglang_dsv3.engine.plan.gpus import GIB
from tests.support.engine import engine_url
from tests.support.processes import ROOT, Gateway, fetch

TINY = ROOT / "checkpoints" / "deepseek-v3-tiny"


def test_a_real_checkpoints_headers_are_what_its_config_makes(served: Gateway) -> None:
    """Piece by piece, and in all as many bytes as its files have beside their headers."""
    found, shape = models.read(TINY)
    of = question.folder(TINY)
    main, _ = weights.computed(shape, weights.scheme("fp8"))
    assert (found.scheme, of.basis) == ("fp8", "computed from its tensors' headers")
    assert of.main.total == sum(path.stat().st_size - 8 - _header(path) for path in TINY.glob("*.safetensors"))
    for name in weights.Pieces.__struct_fields__:
        assert getattr(of.main, name) == pytest.approx(getattr(main, name), rel=0.01), name


def _header(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[:8], "little")


# What the plan takes over from SGLang's sources, by file: its reserve, and the slots of its pools.
RULES = {
    "arg_groups/memory_hook.py": [
        "reserved_mem = 512", "reserved_mem += activation_tokens * 1.5", "reserved_mem += cfg.tp_size * cfg.pp_size / 8 * 1024",
        "reserved_mem = max(reserved_mem, 10 * 1024)", "decode_cuda_graph_config.max_bs * 2", "reserved_mem += 1.5 * 1024",
        "max_bs * cfg.attn_dp_size * 3", "max_bs * cfg.attn_dp_size * 1.5", "elif gpu_mem < 160 * 1024",
        "round((gpu_mem - reserved_mem) / gpu_mem, 3)",
    ],
    "model_executor/pool_configurator.py": ["self.qk_nope_head_dim + self.qk_rope_head_dim * 2 + 8"],
    "mem_cache/deepseek_v4_memory_pool.py": ["index_head_dim + index_head_dim // 128 * 4", "return 8 if compress_ratio == 4 else 128"],
    "models/deepseek_v2.py": ["use_attn_tp_group=get_parallel().enable_dp_lm_head"],
}  # fmt: skip


@pytest.mark.parametrize("file", RULES)
def test_rules_of_sglangs_that_are_reckoned_with_are_still_its_rules(file: str) -> None:
    package = next(environment_folder(ROOT).glob("lib/python3*/site-packages/sglang"))
    text = (package / "srt" / file).read_text(encoding="utf-8")
    assert [rule for rule in RULES[file] if rule not in text] == []


def test_the_real_engines_cache_is_the_planned_one(served: Gateway) -> None:
    expected = start.expected(Engine(), ROOT)
    assert expected is not None
    assert expected.kv_gib is not None
    said = json.loads(fetch(f"{engine_url(served)}/server_info"))["internal_states"][0]["memory_usage"]
    assert said["token_capacity"] == pytest.approx(expected.kv_tokens, rel=0.01)
    assert said["kvcache"] == pytest.approx(expected.kv_gib, rel=0.01)
    # What SGLang says of weights on a CPU is how much less of the machine's memory was free afterwards, which others take and give as well.
    assert expected.weights_gib * GIB == pytest.approx(2 * 10.3e6, rel=0.05)
