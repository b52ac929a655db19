"""What the installed SGLang knows: its flags and their words, its architectures, its environment variables.

It is asked once, in its own environment (`ask`), which takes as long as importing SGLang does; the answer is kept beside that environment,
by SGLang's version and by what was asked.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from backends.sglang_dsv3 import environment
from backends.sglang_dsv3.config import Engine
from backends.sglang_dsv3.engine import arguments, environment_folder, launch
from backends.sglang_dsv3.engine.arguments import refused
from gateway.errors import ConfigError, ConfigErrors

ASK = Path(__file__).parent / "ask.py"
LIMIT_S = 300.0
# Settings whose words are those of a flag.
WORDS = {
    name: f"--{name.replace('_', '-')}"
    for name in (
        "quantization",
        "kv_cache_dtype",
        "attention_backend",
        "tool_call_parser",
        "reasoning_parser",
        "speculative_algorithm",
        "moe_a2a_backend",
        "moe_runner_backend",
        "hicache_write_policy",
        "hicache_storage_backend",
    )
}


class Known(msgspec.Struct, frozen=True):
    """`flags` have the words they accept, or none where any will do; `takes` has for each the fewest and the most values (None: any number)
    and what they are read as (`int`, `float`, or anything); `capabilities` are CUDA compute capabilities (90 is 9.0)."""

    version: str
    architectures: list[str]
    flags: dict[str, list[str]]
    takes: dict[str, tuple[int, int | None, str]]
    environment: list[str]
    capabilities: dict[str, int]

    @property
    def quantizations(self) -> list[str]:
        """What a checkpoint may name: the flag's words, and those that only a `config.json` says."""
        return sorted({*self.flags["--quantization"], *self.capabilities})


def kept_at(home: Path) -> Path | None:
    """Where the answer is kept; None where no SGLang is installed."""
    found = sorted(environment_folder(home).glob("lib/python3*/site-packages/sglang-*.dist-info"))
    if not found:
        return None
    version = found[-1].name.removeprefix("sglang-").removesuffix(".dist-info")
    asked = hashlib.sha256(ASK.read_bytes()).hexdigest()[:12]
    return environment_folder(home) / f"penstock-known-{version}-{asked}.json"


def known(home: Path, say: Callable[[str], None]) -> Known:
    """What it knows, asked where nobody has; raises ConfigError when it cannot be asked."""
    file = kept_at(home)
    if file is None:
        raise ConfigError("", "SGLang is not in the engine's environment: run `penstock engine install`")
    try:
        return msgspec.json.decode(file.read_bytes(), type=Known)
    except (OSError, msgspec.DecodeError):  # not there yet, or cut off
        say("asking SGLang what it knows, once")
    content = _ask(home)
    try:
        answer = msgspec.json.decode(content, type=Known)
    except msgspec.DecodeError as error:
        raise ConfigError("", f"the installed SGLang could not be asked what it knows: {error}") from None
    try:
        mine = file.with_suffix(f".{os.getpid()}")
        mine.write_bytes(content)
        mine.replace(file)
    except OSError as error:  # an environment that somebody else owns: it is asked again the next time
        say(f"what SGLang knows cannot be kept: {error}")
    return answer


def _ask(home: Path) -> bytes:
    # By the environment and not by the section: SGLang for the CPU is imported with its plugin alone, also where a GPU host's file is read.
    cpu = any(environment_folder(home).glob("lib/python3*/site-packages/penstock_sglang_cpu"))
    env = launch.environment(Engine(gpus=[] if cpu else [0]), os.environ)
    argv = [str(environment_folder(home) / "bin" / "python"), str(ASK)]
    try:
        done = subprocess.run(argv, capture_output=True, env=env, timeout=LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError("", f"the installed SGLang could not be asked what it knows: {error}") from None
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        raise ConfigError("", f"the installed SGLang could not be asked what it knows: {last[0]}")
    return done.stdout.strip().rpartition(b"\n")[2]  # whatever a plugin of SGLang prints before


def verify(config: Engine, known: Known) -> None:
    """Raises ConfigErrors for every word and variable of the section that the installed SGLang does not know."""
    if found := list(_problems(config, known)):
        raise ConfigErrors(found)


def _problems(config: Engine, known: Known) -> Iterator[ConfigError]:
    for name, flag in WORDS.items():
        given, accepted = getattr(config, name), known.flags.get(flag)
        if given is None:
            continue
        if accepted is None:
            yield ConfigError(name, f"SGLang {known.version} has no {flag}")
        elif accepted and given not in accepted:
            yield ConfigError(name, refused(given, accepted, known.version))
    yield from environment.unknown(config.env, known.environment)
    yield from arguments.problems(config.extra_args, known.flags, known.takes, known.version)
