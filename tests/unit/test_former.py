"""The how-to's own configuration: converted line by line, and its keys answered where somebody writes them into ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from backends.sglang_dsv3 import origin
from gateway import cli
from tests.unit.test_engine_section import configured

# As the how-to has it, with its comments.
HOW_TO = """# config/sglang_deepseek.yaml
model:
  name: deepseek-v3
  max_seq_len: 32768 # 支持长文本处理
  quantization: fp8 # 可选fp8/int8/fp4
inference:
  batch_size: 32 # 动态批处理最大值
  prefetch_streams: 4 # 预取流数量
  cpu_offload: false # 是否使用CPU卸载
resource:
  gpu_ids: [0,1,2,3] # 多卡部署配置
  memory_fraction: 0.9 # GPU内存预留比例
"""


def convert(folder: Path, text: str) -> Result:
    file = folder / "sglang_deepseek.yaml"
    file.write_text(text)
    return CliRunner().invoke(cli.main, ["engine", "import", str(file)])


def test_the_how_tos_file_becomes_one_that_is_served(tmp_path: Path) -> None:
    done = convert(tmp_path, HOW_TO)
    assert done.exit_code == 0
    assert done.stderr.replace("penstock: sglang_deepseek.yaml:", "").splitlines() == [
        "3: model.name: deepseek-v3 -> served_model_name: deepseek-v3, and the name below models",
        "4: model.max_seq_len: 32768 -> context_length: 32768",
        "5: model.quantization: fp8 is left out: the official checkpoint is FP8 and says it itself",
        "7: inference.batch_size: 32 -> max_running_requests: 32, batched continuously",
        "8: inference.prefetch_streams: 4 is left out: it no longer exists: SGLang has no such streams",
        "9: inference.cpu_offload: false is left out: nothing is offloaded where cpu_offload_gb is not given",
        "11: resource.gpu_ids: [0, 1, 2, 3] -> gpus: [0, 1, 2, 3], and tp_size follows: 4",
        "12: resource.memory_fraction: 0.9 -> memory_fraction: 0.9, of each GPU for weights and KV cache together",
    ]
    made = yaml.safe_load(done.stdout)
    assert made["backends"]["dsv3"]["engine"] == {
        "served_model_name": "deepseek-v3", "context_length": 32768, "max_running_requests": 32, "gpus": [0, 1, 2, 3],
        "memory_fraction": 0.9,
    }  # fmt: skip
    (tmp_path / "penstock.yaml").write_text(done.stdout)
    checked = CliRunner().invoke(cli.main, ["check", "-c", str(tmp_path / "penstock.yaml")])
    assert checked.exit_code == 0, checked.output


@pytest.mark.parametrize(
    ("line", "section", "words"),
    [
        ("stream_interval: 0.01", {"stream_interval": 1}, "it counts tokens today, not seconds, and 1 is each token"),
        ("stream_interval: 4", {"stream_interval": 4}, "it counts tokens, not seconds"),
        ("max_wait_ms: 50", {}, "there is no window to wait in"),
        ("fp8_recipe: e4m3", {}, "scales for blocks of 128 x 128"),
        ("cpu_offload: true", {}, "cpu_offload_gb wants a number of GB for each GPU"),
        ("quantization: int8", {}, "an INT8 checkpoint (w8a8_int8) has to be at model_path"),
        ("quantization: fp4", {}, "an NVFP4 checkpoint"),
        ("max_batch_size: 16", {"max_running_requests": 16}, "-> max_running_requests: 16"),
        ("shard_size: 2GB", {}, "the shards that it was published with"),
        ("model_path: ./model_weights", {"model_path": "./model_weights"}, "-> model_path: ./model_weights"),
        ("max_new_tokens: 100", {}, "it is a request's own `max_tokens` today"),
    ],
)
def test_a_key_of_its_calls_is_converted_or_says_why_not(tmp_path: Path, line: str, section: dict[str, Any], words: str) -> None:
    done = convert(tmp_path, line)
    assert done.exit_code == 0, done.stderr
    assert done.stderr.startswith(f"penstock: sglang_deepseek.yaml:1: {line.partition(':')[0]}: ")
    assert words in done.stderr
    assert yaml.safe_load(done.stdout)["backends"]["dsv3"]["engine"] == section


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model:\n  max_seq_len: long", "sglang_deepseek.yaml:2: model.max_seq_len: long is no number of them; accepted: 1 or more"),
        ("batchsize: 3", "sglang_deepseek.yaml:1: batchsize: is no key of such a file; accepted: name, model_path"),
        ("batchsize: 3", "did you mean 'batch_size'?"),
        ("gpu_ids: [0, 0]", "gpu_ids: [0, 0] is no list of GPUs; accepted: different indices from 0 on"),
        ("gpu_ids: 4", "gpu_ids: 4 is no list of GPUs"),
        ("memory_fraction: 90", "memory_fraction: 90 is out of range; accepted: above 0, below 1"),
        ("quantization: fp6", "quantization: fp6 is not known; accepted: fp8, int8, fp4, fp16"),
        ("stream_interval: -1", "stream_interval: -1 is no interval; accepted: above 0"),
        ("batch_size: 3\nmax_batch_size: 4", "sglang_deepseek.yaml:2: max_batch_size: max_running_requests was given above by another key"),
        ("batch_size: 3\nbatch_size: 4", "sglang_deepseek.yaml:2: batch_size: is given twice"),
        ("- a", "sglang_deepseek.yaml:1: is no mapping; accepted: sections model, inference, resource, or their keys"),
        ("", "sglang_deepseek.yaml:1: is no mapping"),
        ("a: [", "sglang_deepseek.yaml:1: is no YAML"),
        ("batch_size: &a [&b [1, 1], *b]", "batch_size: a list of lists is no number of them"),
    ],
)
def test_what_is_not_understood_is_refused_and_nothing_is_written(tmp_path: Path, text: str, said: str) -> None:
    done = convert(tmp_path, text)
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.main, ["engine", "import", str(tmp_path / "none.yaml")])
    assert done.exit_code == 2
    assert done.stderr.endswith("none.yaml: cannot be read: No such file or directory\n")


def refused(folder: Path, **section: Any) -> str:
    done = CliRunner().invoke(cli.main, ["check", "-c", str(configured(folder, **section))])
    assert done.exit_code == 2
    return done.stderr


@pytest.mark.parametrize("key", sorted(origin.FORMER))
def test_the_same_key_in_our_own_file_is_answered(tmp_path: Path, key: str) -> None:
    assert f"backends.dsv3.engine.{key}: unknown key; {origin.FORMER[key]}\n" in refused(tmp_path, **{key: 1})


def test_a_key_that_counts_something_else_today_says_so(tmp_path: Path) -> None:
    assert "backends.dsv3.engine.stream_interval: expected `int`, got `float`; it counts tokens" in refused(tmp_path, stream_interval=0.01)


def test_its_file_given_as_ours_is_told_how_it_is_converted(tmp_path: Path) -> None:
    file = tmp_path / "sglang_deepseek.yaml"
    file.write_text(HOW_TO)
    done = CliRunner().invoke(cli.main, ["check", "-c", str(file)])
    assert done.exit_code == 2
    for line, section in ((2, "model"), (6, "inference"), (10, "resource")):
        converts = "of a file for `SGLangEngine`, which `penstock engine import FILE` converts"
        assert f"sglang_deepseek.yaml:{line}: {section}: unknown key; {converts}" in done.stderr
    path = tmp_path / "penstock.yaml"
    backend = {"kind": "sglang_dsv3", "hosts": [{"url": "http://127.0.0.1:1"}], "max_seq_len": 5}
    path.write_text(json.dumps({"models": {"m": {"backend": "d"}}, "backends": {"d": backend}}))
    said = "backends.d.max_seq_len: unknown key; it is `context_length` today (below `engine`)"
    assert said in CliRunner().invoke(cli.main, ["check", "-c", str(path)]).stderr
