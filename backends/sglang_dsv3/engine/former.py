"""A file of the how-to that this product comes from, converted: its keys as an `engine` section, and what became of each, line by line."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import yaml

from backends.sglang_dsv3 import origin
from backends.sglang_dsv3.config import Engine
from gateway.errors import ConfigError, ConfigErrors

_SECTIONS = ("model", "inference", "resource")
# The how-to's own has a dozen lines.
_LARGEST = 1 << 20


class Entry(NamedTuple):
    """A key of the file with its section and its line."""

    line: int
    path: str
    key: str
    value: Any


class Became(NamedTuple):
    """A setting and its value (nothing where the key is left out), and what to say of it."""

    setting: str | None
    value: Any
    words: str


def convert(file: Path) -> tuple[dict[str, Any], list[str]]:
    """The configuration that a file stands for, and a line for each of its keys. Raises ConfigErrors with all that is not understood."""
    entries = list(_entries(file))
    section: dict[str, Any] = {}
    said: list[str] = []
    wrong: list[ConfigError] = []
    for entry in entries:
        where = f"{file.name}:{entry.line}"
        try:
            became = _became(entry)
            if became.setting is not None:
                if became.setting in section:
                    raise ValueError(f"{became.setting} was given above by another key; accepted: one of them")
                section[became.setting] = became.value
            said.append(f"{where}: {entry.path}: {_shown(entry.value)} {became.words}")
        except ValueError as error:
            wrong.append(ConfigError(entry.path, str(error), where))
    if wrong:
        raise ConfigErrors(wrong)
    try:
        msgspec.convert(section, Engine)
    except ConfigError as error:
        raise error.below("engine") from None
    name = section.get("served_model_name", "deepseek-v3")
    hosts = [{"url": "http://127.0.0.1:30000", "agent": "http://127.0.0.1:30001"}]
    backend = {"kind": "sglang_dsv3", "hosts": hosts, "engine": section}
    return {"models": {name: {"backend": "dsv3"}}, "backends": {"dsv3": backend}}, said


def _became(entry: Entry) -> Became:
    """What a key is today; raises ValueError."""
    key, value = entry.key, entry.value
    if key in _CONVERTED:
        return _CONVERTED[key](value)
    if key in origin.FORMER:
        return Became(None, None, f"is left out: {origin.FORMER[key]}")
    known = [*_CONVERTED, *origin.FORMER]
    near = difflib.get_close_matches(key, known, 1)
    raise ValueError(f"is no key of such a file; accepted: {', '.join(known)}{f'; did you mean {near[0]!r}?' if near else ''}")


def _whole(setting: str, words: str) -> Callable[[Any], Became]:
    def convert(value: Any) -> Became:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
            raise ValueError(f"{_shown(value)} is no number of them; accepted: 1 or more")
        return Became(setting, value, f"-> {setting}: {value}{words}")

    return convert


def _text(setting: str, words: str = "") -> Callable[[Any], Became]:
    def convert(value: Any) -> Became:
        if not isinstance(value, str) or not 1 <= len(value) <= 1024:
            raise ValueError(f"{_shown(value)} is no text; accepted: 1 to 1024 characters")
        return Became(setting, value, f"-> {setting}: {value}{words}")

    return convert


def _gpus(value: Any) -> Became:
    fine = isinstance(value, list) and all(isinstance(each, int) and not isinstance(each, bool) and 0 <= each < 1024 for each in value)
    if not fine or not value or len(set(value)) != len(value):
        raise ValueError(f"{_shown(value)} is no list of GPUs; accepted: different indices from 0 on, such as [0, 1, 2, 3]")
    return Became("gpus", value, f"-> gpus: {value}, and tp_size follows: {len(value)}")


def _fraction(value: Any) -> Became:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(f"{_shown(value)} is out of range; accepted: above 0, below 1")
    return Became("memory_fraction", float(value), f"-> memory_fraction: {value}, of each GPU for weights and KV cache together")


def _offload(value: Any) -> Became:
    if value is False or value == 0:
        return Became(None, None, "is left out: nothing is offloaded where cpu_offload_gb is not given")
    if value is True:
        return Became(
            None, None, "is left out: cpu_offload_gb wants a number of GB for each GPU, and makes decoding as slow as PCIe; give one"
        )
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{_shown(value)} is neither true, false nor GB; accepted: true, false, or 0 or more")
    return Became("cpu_offload_gb", value, f"-> cpu_offload_gb: {value}")


def _interval(value: Any) -> Became:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"{_shown(value)} is no interval; accepted: above 0")
    if isinstance(value, int):
        return Became("stream_interval", value, f"-> stream_interval: {value}; it counts tokens, not seconds")
    return Became("stream_interval", 1, "-> stream_interval: 1; it counts tokens today, not seconds, and 1 is each token")


_OTHER_CHECKPOINTS = {
    "int8": "an INT8 checkpoint (w8a8_int8) has to be at model_path",
    "fp4": "an NVFP4 checkpoint (modelopt_fp4), or V4 as it is published, has to be at model_path",
    "fp16": "FP16 weights take 1,342 GB; the official checkpoint is FP8",
}


def _quantization(value: Any) -> Became:
    if value == "fp8":
        return Became(None, None, "is left out: the official checkpoint is FP8 and says it itself")
    if value in _OTHER_CHECKPOINTS:
        return Became(None, None, f"is left out: no checkpoint is quantised on the way; {_OTHER_CHECKPOINTS[value]}")
    raise ValueError(f"{_shown(value)} is not known; accepted: fp8, int8, fp4, fp16")


_CONVERTED: dict[str, Callable[[Any], Became]] = {
    "name": _text("served_model_name", ", and the name below models"),
    "model_path": _text("model_path"),
    "output_dir": _text("model_path"),
    "max_seq_len": _whole("context_length", ""),
    "quantization": _quantization,
    "batch_size": _whole("max_running_requests", ", batched continuously"),
    "max_batch_size": _whole("max_running_requests", ", batched continuously"),
    "cpu_offload": _offload,
    "gpu_ids": _gpus,
    "memory_fraction": _fraction,
    "stream_interval": _interval,
}


def _entries(file: Path) -> Iterator[Entry]:
    """Every key of the file, with its line; raises ConfigError."""
    try:
        with file.open("rb") as opened:
            content = opened.read(_LARGEST + 1)
    except OSError as error:
        raise ConfigError("", f"cannot be read: {error.strerror}", str(file)) from None
    if len(content) > _LARGEST:
        raise ConfigError("", f"is larger than {_LARGEST >> 20} MB, so it is no such file", str(file))
    loader = yaml.SafeLoader(content.decode("utf-8", "replace"))
    try:
        root = loader.get_single_node()
        yield from _below(loader, root, "", file)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise ConfigError("", f"is no YAML: {getattr(error, 'problem', None) or type(error).__name__}", f"{file.name}{line}") from None
    finally:
        loader.dispose()


def _below(loader: yaml.SafeLoader, node: yaml.Node | None, path: str, file: Path) -> Iterator[Entry]:
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1 if node is not None else 1
        raise ConfigError(path, f"is no mapping; accepted: sections {', '.join(_SECTIONS)}, or their keys", f"{file.name}:{line}")
    seen: set[str] = set()
    for key_node, value_node in node.value:
        key = str(loader.construct_object(key_node, deep=True))
        where = f"{path}.{key}" if path else key
        if key in seen:
            raise ConfigError(where, "is given twice", f"{file.name}:{key_node.start_mark.line + 1}")
        seen.add(key)
        if not path and key in _SECTIONS:
            yield from _below(loader, value_node, key, file)
        else:
            yield Entry(key_node.start_mark.line + 1, where, key, loader.construct_object(value_node, deep=True))


def _shown(value: Any) -> str:
    """What stands there; of what holds further lists or mappings, which an alias can make endless, its kind alone."""
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(each, list | dict) for each in value)):
        return "a mapping" if isinstance(value, dict) else "a list of lists"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
