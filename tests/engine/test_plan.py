"""The plan held against the real engine: the tiny checkpoint's own headers, and what a running SGLang says of its memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backends.sglang_dsv3.config import Engine
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


def test_the_real_engines_cache_is_the_planned_one(served: Gateway) -> None:
    expected = start.expected(Engine(), ROOT)
    assert expected is not None
    assert expected.kv_gib is not None
    said = json.loads(fetch(f"{engine_url(served)}/server_info"))["internal_states"][0]["memory_usage"]
    assert said["token_capacity"] == pytest.approx(expected.kv_tokens, rel=0.01)
    assert said["kvcache"] == pytest.approx(expected.kv_gib, rel=0.01)
    # What SGLang says of weights on a CPU is how much less of the machine's memory was free afterwards, which others take and give as well.
    assert expected.weights_gib * GIB == pytest.approx(2 * 10.3e6, rel=0.05)
