"""What the engine computes is DeepSeek-V3: against an independent implementation, and the same on one rank as on four."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.sglang_dsv3.engine import TINY_MODEL, environment_folder
from tests.support.engine import engine_url
from tests.support.processes import ROOT, Gateway, command, gateway
from tests.support.reference import Reference, log_softmax

CHECKPOINT = ROOT / "checkpoints" / TINY_MODEL
BUILDER = ROOT / "backends" / "sglang_dsv3" / "engine" / "tiny" / "build.py"
PROMPTS = ["Hello", "def f(x):", "Continuous batching means", "a b c d e f", "1 2 3 4 5 6 7 8 9", "The MLA cache holds"]
# SHA-256 over the checkpoint's files, as build.py prints it: the same on every machine.
DIGEST = "e3f3da2cc40ff9b037fec9f03caa8d10c5ca70552101af54e88664ff3d5bdcc8"


def fp32(**engine: Any) -> dict[str, Any]:
    section = {"dtype": "float32", "max_total_tokens": 8192, "max_running_requests": 8, **engine}
    return {"backends": {"dsv3": {"kind": "sglang_dsv3", "hosts": [{"launch": "local"}], "engine": section}}}


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The engine computing in float32, on one rank."""
    with gateway(tmp_path_factory.mktemp("exact"), fp32()) as running:
        running.wait_ready()
        yield running


@pytest.fixture(scope="module")
def one_rank_texts(exact: Gateway) -> list[str]:
    return greedy_texts(exact)


def greedy_texts(running: Gateway) -> list[str]:
    """64 greedy tokens for each prompt, over the public door."""
    texts = []
    for prompt in PROMPTS:
        body = {"model": TINY_MODEL, "prompt": prompt, "max_tokens": 64, "temperature": 0, "ignore_eos": True}
        answer = post(f"{running.base_url}/completions", body)
        assert answer["usage"]["completion_tokens"] == 64
        texts.append(answer["choices"][0]["text"])
    return texts


def post(url: str, body: dict[str, Any]) -> Any:
    sent = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(sent, timeout=120) as response:
        return json.load(response)


def test_log_probabilities_equal_an_independent_implementation(exact: Gateway) -> None:
    """Over the whole vocabulary, at every position of prompt and greedy answer: within 1e-4, FP8 dequantisation included."""
    reference = Reference(CHECKPOINT)
    worst = 0.0
    for prompt in PROMPTS[:3]:
        sampling = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
        body = {"text": prompt, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
        first = post(f"{engine_url(exact)}/generate", body)
        meta = first["meta_info"]
        tokens = [entry[1] for entry in meta["input_token_logprobs"]] + first["output_ids"]
        expected = log_softmax(reference.logits(tokens))
        generated = len(first["output_ids"])
        assert generated == 24
        # Greedy: every generated token is the reference's most likely one.
        assert tokens[-generated:] == expected[-generated - 1 : -1].argmax(-1).tolist()
        # The same tokens as a prompt again give the whole distribution at every position.
        second = post(f"{engine_url(exact)}/generate", {
            "input_ids": tokens, "sampling_params": {"temperature": 0, "max_new_tokens": 1}, "return_logprob": True,
            "logprob_start_len": 0, "top_logprobs_num": reference.config["vocab_size"],
        })  # fmt: skip
        rows = second["meta_info"]["input_top_logprobs"]
        assert len(rows) == len(tokens)
        for position, row in enumerate(rows[1:]):  # row k is the prediction of token k from those before it
            assert len(row) == reference.config["vocab_size"]
            actual = np.empty(len(row))
            for logprob, token, _ in row:
                actual[token] = logprob
            worst = max(worst, float(np.abs(actual - expected[position]).max()))
    print(f"largest difference of a log probability: {worst:.2e}")
    assert worst <= 1e-4


def test_four_ranks_give_the_same_greedy_text_as_one(one_rank_texts: list[str], tmp_path: Path) -> None:
    with gateway(tmp_path, fp32(tp_size=4)) as running:
        running.wait_ready(300)
        schedulers = [child for child in running.parent().children(recursive=True) if "scheduler" in "".join(command(child))]
        assert len(schedulers) == 4
        assert greedy_texts(running) == one_rank_texts


def test_the_checkpoint_is_the_same_bytes_every_time(tmp_path: Path, exact: Gateway) -> None:
    python = environment_folder(ROOT) / "bin" / "python"
    done = subprocess.run([python, BUILDER, tmp_path / "again"], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == DIGEST
    for file in sorted(CHECKPOINT.iterdir()):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_the_checkpoint_has_deepseek_v3s_layout(exact: Gateway) -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["quantization_config"] == {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    }  # fmt: skip
    names = set(json.loads((CHECKPOINT / "model.safetensors.index.json").read_text())["weight_map"])
    for projection in ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "mlp.experts.7.down_proj", "mlp.shared_experts.up_proj"):
        assert {f"model.layers.1.{projection}.weight", f"model.layers.1.{projection}.weight_scale_inv"} <= names
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in names
    assert "lm_head.weight_scale_inv" not in names
    tokenizer = json.loads((CHECKPOINT / "tokenizer_config.json").read_text())
    assert "<｜Assistant｜>" in tokenizer["chat_template"]
