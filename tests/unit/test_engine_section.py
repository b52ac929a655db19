"""What `penstock engine` knows before it starts anything (section, checkpoint, machine), and what it makes of an engine's end."""

from __future__ import annotations

import json
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from backends.sglang_dsv3.config import Engine
from backends.sglang_dsv3.engine import checkpoint, known, monitor, symptoms
from backends.sglang_dsv3.engine.monitor import Gpu, Monitor
from backends.sglang_dsv3.engine.supervise import Progress
from tests.support.processes import ROOT, environment

pytestmark = pytest.mark.once

EXAMPLES = ROOT / "deploy" / "engine"
GOLDEN = ROOT / "tests" / "data" / "engine"


KNOWN = GOLDEN / "known-0.5.23.json"
RECORDED = msgspec.json.decode(KNOWN.read_bytes(), type=known.Known)


def installed(home: Path) -> Path:
    """A home whose engine environment has been asked what it knows: the recorded answer of SGLang 0.5.23."""
    packages = home / ".venv-engine" / "lib" / "python3.11" / "site-packages"
    (packages / "sglang-0.5.23.dist-info").mkdir(parents=True, exist_ok=True)
    python = home / ".venv-engine" / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    python.touch()
    file = known.kept_at(home)
    assert file is not None
    file.write_bytes(KNOWN.read_bytes())
    return home


def engine(*arguments: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway", "engine", *arguments]
    home = env if "PENSTOCK_HOME" in env else {"PENSTOCK_HOME": str(installed(folder / "home")), **env}
    return subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=folder, env=environment(**home))


def configured(folder: Path, **section: Any) -> Path:
    path = folder / "penstock.yaml"
    backend = {"kind": "sglang_dsv3", "hosts": [{"url": "http://10.0.0.1:30000"}], "engine": section}
    path.write_text(json.dumps({"models": {"m": {"backend": "dsv3"}}, "backends": {"dsv3": backend}}))
    return path


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.txt")))
def test_the_command_line_of_known_hosts_is_what_it_was(tmp_path: Path, name: str) -> None:
    """`tests/engine/test_plugin.py` asks the installed SGLang whether it knows each of them."""
    rank = {"PENSTOCK__BACKENDS__DSV3__ENGINE__NODE_RANK": "1"} if name.endswith("-node1") else {}
    shown = engine(
        "-c",
        str(EXAMPLES / f"{name.removesuffix('-node1')}.yaml"),
        "--show-command",
        folder=tmp_path,
        PENSTOCK_HOME="/opt/penstock",
        **rank,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_start_file_says_only_what_sglang_knows(tmp_path: Path, path: Path) -> None:
    assert (GOLDEN / f"{path.stem}.txt").exists(), "it has no golden command line"
    shown = engine("-c", str(path), "--show-command", folder=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")


def test_the_engines_key_is_on_no_command_line(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-engine-secret")
    path = configured(tmp_path, model_path="/models/x", gpus=[0], api_key_file=str(tmp_path / "key"))
    shown = engine("-c", str(path), "--show-command", folder=tmp_path).stdout
    assert "sk-engine-secret" not in shown
    assert "--config SECRETS.yaml" in shown


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"quantization": "fp9"}, "engine.quantization: 'fp9' is not known to SGLang 0.5.23; one of: awq, fp8, mxfp8"),
        ({"quantization": "fp9"}, "did you mean 'fp8'?"),
        ({"tool_call_parser": "deepseek3"}, "did you mean 'deepseekv3'?"),
        ({"tool_call_parser": "deepseekv5"}, "one of: deepseekv3, deepseekv31, deepseekv32, deepseekv4, deepseekv41, ...; did you mean"),
        ({"reasoning_parser": "deepseek-v5"}, "one of: deepseek-r1, deepseek-v3, deepseek-v4, deepseek-v41, ...; did you mean"),
        ({"attention_backend": "dsa4"}, "did you mean 'dsa'?"),
        ({"attention_backend": "--x"}, "engine.attention_backend: '--x' is not accepted"),
        ({"speculative_algorithm": "EAGEL"}, "did you mean 'EAGLE'?"),
        ({"moe_a2a_backend": "deep_ep"}, "did you mean 'deepep'?"),
        ({"speculative_num_steps": 3}, "engine.speculative_num_steps: does nothing without speculative_algorithm"),
        ({"eplb": True}, "engine.eplb: does nothing without ep_size"),
        ({"hicache_size": 3}, "engine.hicache_size: does nothing without hicache"),
        ({"gpus": [0, 1], "attn_dp_size": 4}, "engine.attn_dp_size: is 4, which does not divide the 2 ranks"),
        ({"env": {"SGLANG_DSV4_FP4_EXPERT": "0"}}, "is read by nobody; did you mean 'SGLANG_DSV4_FP4_EXPERTS'?"),
        ({"env": {"MY_THING": "0"}}, "is read by nobody; accepted beside SGLang's own: NCCL_"),
        ({"env": {"HF_TOKEN": "x"}}, "looks like a secret, which belongs into a file"),
        ({"env": {"AWS_SECRET_ACCESS_KEY": "x"}}, "looks like a secret"),
        ({"env": {"CUDA_VISIBLE_DEVICES": "0"}}, "is not for env: it comes from `gpus`"),
        ({"env": {"a=b": "0"}}, "is no name of an environment variable"),
        ({"context_lenght": 5}, "engine.context_lenght: unknown key; did you mean 'context_length'?"),
        ({"memory_fraction": 90}, "engine.memory_fraction: 90 is out of range; accepted: above 0, below 1"),
        ({"stream_interval": 0.01}, "engine.stream_interval: expected `int`, got `float`"),
        ({"gpus": [0, 0]}, "engine.gpus: must be different indices from 0 on"),
        ({"gpus": [0, 1], "tp_size": 4}, "engine.tp_size: is 4, but 1 x 2 GPUs are given; leave it out"),
        ({"nnodes": 2}, "engine.dist_init_addr: is missing: several nodes need it"),
        ({"nnodes": 2, "node_rank": 2, "dist_init_addr": "a:1"}, "engine.node_rank: must be 0 to 1 with nnodes 2, is 2"),
        ({"port": 0}, "engine.port: 0 is out of range; accepted: 1 to 65535"),
        ({"agent": "here"}, "engine.agent: 'here' is no HOST:PORT"),
        ({"gpus": [0, 1]}, "engine.gpus: this machine has no GPU that could be asked (no NVML"),
        ({"model_path": "/nonexistent"}, "engine.model_path: /nonexistent: there is no config.json, so this is no checkpoint"),
    ],
)
def test_a_wrong_value_is_one_line_and_nothing_is_started(tmp_path: Path, section: dict[str, Any], words: str) -> None:
    done = engine("-c", str(configured(tmp_path, **section)), folder=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for setting in ({"port": port}, {"agent": f"127.0.0.1:{port}"}):
            done = engine("-c", str(configured(tmp_path, **setting)), folder=tmp_path)
            assert done.returncode == 2
            assert f"engine.{next(iter(setting))}: cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr


def test_cuda_packages_are_refused_without_a_driver(tmp_path: Path) -> None:
    done = engine("install", "--device", "cuda", folder=tmp_path, PENSTOCK_HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert "no NVIDIA driver" in done.stderr
    assert list(tmp_path.iterdir()) == []


# The checkpoint


def shard(path: Path, *tensors: str, cut: int = 0) -> None:
    header = json.dumps(
        {name: {"dtype": "F32", "shape": [2], "data_offsets": [8 * n, 8 * n + 8]} for n, name in enumerate(tensors)}
    ).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(8 * len(tensors))
    path.write_bytes(content[: len(content) - cut])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of two tensors each, all there."""
    (tmp_path / "config.json").write_text('{"architectures": ["DeepseekV3ForCausalLM"], "quantization_config": {"quant_method": "fp8"}}')
    (tmp_path / "tokenizer.json").write_text("{}")
    index = {"weight_map": {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors", "d": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    shard(tmp_path / "1.safetensors", "a", "b")
    shard(tmp_path / "2.safetensors", "c", "d")
    return tmp_path


def test_a_whole_checkpoint_is_read_by_its_headers(folder: Path) -> None:
    heard: list[tuple[int, int]] = []
    assert checkpoint.verify(folder, lambda done, of: heard.append((done, of))) == 32
    assert heard == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "2.safetensors").unlink(), "1 of 2 shards are missing, the first is 2.safetensors"),
        (lambda folder: shard(folder / "2.safetensors", "c", "d", cut=3), "it was not downloaded to its end"),
        (lambda folder: (folder / "2.safetensors").write_bytes(b"\x10"), "cut off in its header"),
        (lambda folder: (folder / "2.safetensors").write_bytes(struct.pack("<Q", 1 << 60)), "no safetensors file, or it is cut off"),
        (lambda folder: (folder / "2.safetensors").write_bytes(struct.pack("<Q", 4) + b"nope"), "its header cannot be read"),
        (lambda folder: shard(folder / "2.safetensors", "c", "x"), "1 tensors of the index are not in it, the first is d"),
        (
            lambda folder: (folder / "config.json").write_text('{"architectures": ["DeepseekV4ForCausalLM"]}'),
            "the architecture is DeepseekV4ForCausalLM; the CPU engine runs DeepseekV3ForCausalLM alone, for others give gpus",
        ),
        (
            lambda folder: (folder / "config.json").write_text('{"architectures": ["DeepseekV5ForCausalLM"]}'),
            "the architecture 'DeepseekV5ForCausalLM' is not known to SGLang 0.5.23; one of: Deepseek",
        ),
        (
            lambda folder: (folder / "config.json").write_text(
                '{"architectures": ["DeepseekV3ForCausalLM"], "quantization_config": {"quant_method": "w4afp9"}}'
            ),
            "the quantisation 'w4afp9' is not known to SGLang 0.5.23",
        ),
        (lambda folder: (folder / "config.json").write_text("{}"), "it names no architecture"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "there is no config.json, so this is no checkpoint"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "there is no tokenizer.json"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "there is neither model.safetensors.index.json nor"),
    ],
)
def test_what_is_not_whole_is_refused_with_the_file(folder: Path, spoil: Any, words: str) -> None:
    spoil(folder)
    with pytest.raises(checkpoint.Unusable, match=str(folder)) as refused:
        checkpoint.verify(folder, known=RECORDED, cpu=True)
    assert words in str(refused.value)
    done = engine("-c", str(configured(folder, model_path=str(folder))), folder=folder)
    assert done.returncode == 2
    assert words in done.stderr


# An engine's end


@pytest.mark.parametrize(
    ("line", "kind", "advice", "retry"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "out of GPU memory", "context_length", True),
        (
            "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.",
            "no room for the KV cache",
            "memory_fraction",
            True,
        ),
        ("RuntimeError: NCCL error: unhandled system error", "NCCL", "NCCL_SOCKET_IFNAME", True),
        ("ERROR:    [Errno 98] error while attempting to bind on address: address already in use", "port taken", "engine.port", True),
        ("RuntimeError: The NVIDIA driver on your system is too old (found version 11040).", "driver", "newer NVIDIA driver", False),
        (
            "ValueError: Weight output_partition_size = 96 is not divisible by weight quantization block_n = 128.",
            "shape",
            "number of GPUs",
            False,
        ),
        ("sglang serve: error: unrecognized arguments: --nope", "arguments", "extra_args", False),
    ],
)
def test_an_end_is_named_with_what_to_change(line: str, kind: str, advice: str, retry: bool) -> None:
    end = symptoms.classify(1, ["something", line, "Traceback, and so on", "and a last word"])
    assert (end.kind, end.retry) == (kind, retry)
    assert advice in end.advice
    assert line[-40:] in end.how


def test_an_end_that_nobody_knows_is_told_in_its_own_words() -> None:
    assert symptoms.classify(3, ["fine", "ValueError: strange", "more"]).how == "SGLang ended with exit code 3: ValueError: strange"
    assert "host memory" in symptoms.classify(-signal.SIGKILL, []).advice
    assert symptoms.classify(-signal.SIGSEGV, []).how == "SGLang was ended by SIGSEGV"


def test_loading_is_told_by_tens() -> None:
    told: list[str] = []
    progress = Progress(told.append)
    for percent in range(0, 101, 3):
        progress.hear(f"Loading safetensors checkpoint shards:  {percent}% Completed | {percent}/163")
    assert told == [f"loading weights, {tens}0 %" for tens in range(1, 10)]


# The machine


def test_a_machine_without_nvml_says_so_and_goes_on(tmp_path: Path) -> None:
    machine = Monitor([0, 1], tmp_path / "not" / "there").look()
    assert machine.note.startswith("no NVML")
    assert machine.memory_total > 1 << 30
    assert machine.disk_free > 0
    names = [row[0] for row in monitor.series(machine)]
    assert "penstock_host_memory_used_bytes" in names
    assert not any("gpu" in name for name in names)


class FakeNvml:
    """The calls of NVML that are used, with the answers of an H100 (nvml.h's units); one of them is not answered, as on many GPUs."""

    NVML_TEMPERATURE_GPU = 0
    NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 0, 1, 0

    def __getattr__(self, name: str) -> Any:
        answers: dict[str, Any] = {
            "nvmlDeviceGetName": "NVIDIA H100",
            "nvmlDeviceGetTemperature": 61, "nvmlDeviceGetPowerUsage": 412_000,
            "nvmlDeviceGetEnforcedPowerLimit": 700_000, "nvmlDeviceGetTotalEccErrors": 2,
            "nvmlDeviceGetCurrentClocksEventReasons": 0x1 | 0x40,
        }  # fmt: skip
        if name == "nvmlDeviceGetHandleByIndex":
            return lambda index: index
        if name == "nvmlDeviceGetUtilizationRates":
            return lambda handle: type("Rates", (), {"gpu": 93})
        if name == "nvmlDeviceGetMemoryInfo":
            return lambda handle: type("Memory", (), {"used": 70 << 30, "total": 80 << 30})
        if name not in answers:
            raise RuntimeError("Not Supported")
        return lambda *arguments: answers[name]


def test_a_gpu_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from backends.sglang_dsv3.engine import agent
    from gateway.errors import ConfigError

    monkeypatch.setattr(Monitor, "count", lambda self: 2)
    with pytest.raises(ConfigError, match=r"engine\.gpus: there is no GPU 3; this machine has 2 \(0 to 1\)"):
        agent.prepare(Engine(gpus=[0, 3]), "engine", lambda done, of: None)


def test_a_gpu_is_read_in_plain_units_and_what_it_does_not_tell_is_left_out(tmp_path: Path) -> None:
    """No GPU is here: this is the arithmetic alone. Real figures need a GPU host."""
    watch = Monitor([3], tmp_path)
    watch._nvml, watch.note = FakeNvml(), ""
    machine = watch.look()
    assert machine.gpus == [
        Gpu(3, "NVIDIA H100", 0.93, 70 << 30, 80 << 30, 61.0, 412.0, 700.0, 2, 2, ["thermal, hardware"], None),
    ]
    assert any("GPU 3 is slowed down: thermal, hardware" in hint for hint in machine.hints)
    assert any("2 uncorrected memory errors" in hint for hint in machine.hints)
    rows = {(name, labels.get("gpu")): value for name, _, labels, value in monitor.series(machine)}
    assert rows["penstock_gpu_utilisation_ratio", "3"] == 0.93
    assert rows["penstock_gpu_throttled", "3"] == 1
