"""Whether a checkpoint is whole, before twenty minutes are spent on loading it: its headers are read, its weights are not.

A safetensors file is eight bytes with the length of a JSON header, the header (every tensor's type, shape and place), and the tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from backends.sglang_dsv3.engine.arguments import refused
from backends.sglang_dsv3.engine.known import Known
from backends.sglang_dsv3.engine.plan import models

# What the CPU engine's plugin was made for; docs/engine.md says what stops the others.
ON_CPU = ("DeepseekV3ForCausalLM",)
INDEX = "model.safetensors.index.json"
# The official checkpoint's headers are 200 kB each; one that says more than this is no header.
MAX_HEADER_BYTES = 100 << 20


class Unusable(Exception):
    """Why a checkpoint cannot be served: one line, with the file."""


class Metadata(msgspec.Struct, frozen=True):
    """What an index says of the whole."""

    total_size: int | None = None


class Index(msgspec.Struct):
    """Which file each tensor is in."""

    weight_map: dict[str, str]
    metadata: Metadata = Metadata()


class _Tensor(msgspec.Struct):
    data_offsets: tuple[int, int]


def verify(
    folder: Path, progress: Callable[[int, int], None] = lambda done, of: None, known: Known | None = None, cpu: bool = False
) -> int:
    """Bytes of weights in a whole checkpoint; `progress` hears of files done. With `known`, that SGLang has its architecture and its
    quantisation; with `cpu`, that the CPU engine runs it. Raises Unusable."""
    config = _read(folder / "config.json", models.Checkpoint)
    _model(folder / "config.json", config, known, cpu)
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        raise Unusable(f"{folder}: there is no tokenizer.json")
    return sum(sizes(folder, progress).values())


def sizes(folder: Path, progress: Callable[[int, int], None] = lambda done, of: None) -> dict[str, int]:
    """Bytes of every tensor, by name, from the headers of files that are whole. Raises Unusable."""
    expected = _expected(folder)
    found: dict[str, int] = {}
    for number, (file, tensors) in enumerate(sorted(expected.items())):
        found |= _shard(folder / file, tensors)
        progress(number + 1, len(expected))
    return found


def index(folder: Path) -> Index | None:
    """A folder's index; None where it has none. Raises Unusable."""
    found: Index | None = _read(folder / INDEX, Index) if (folder / INDEX).is_file() else None
    return found


def _model(path: Path, config: models.Checkpoint, known: Known | None, cpu: bool) -> None:
    if not config.architectures:
        raise Unusable(f"{path}: it names no architecture")
    architecture = config.architectures[0]
    if known is not None and architecture not in known.architectures:
        raise Unusable(f"{path}: the architecture {refused(architecture, known.architectures, known.version)}")
    if cpu and architecture not in ON_CPU:
        raise Unusable(f"{path}: the architecture is {architecture}; the CPU engine runs {', '.join(ON_CPU)} alone, for others give gpus")
    method = config.quantization_config.quant_method if config.quantization_config is not None else None
    if known is not None and method is not None and method != "modelopt" and method not in known.quantizations:
        raise Unusable(f"{path}: the quantisation {refused(method, known.quantizations, known.version)}")


def _expected(folder: Path) -> dict[str, set[str]]:
    """Tensors by file, as the index has them; without one there is a single file."""
    said = index(folder)
    if said is None:
        if (folder / "model.safetensors").is_file():
            return {"model.safetensors": set()}
        raise Unusable(f"{folder}: there is neither {INDEX} nor model.safetensors")
    found: dict[str, set[str]] = {}
    for tensor, file in said.weight_map.items():
        found.setdefault(file, set()).add(tensor)
    missing = sorted(file for file in found if not (folder / file).is_file())
    if missing:
        raise Unusable(f"{folder / INDEX}: {len(missing)} of {len(found)} shards are missing, the first is {missing[0]}")
    return found


def _shard(path: Path, tensors: set[str]) -> dict[str, int]:
    """Bytes of each tensor of a file that is whole and has those that are expected of it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
        if length > MAX_HEADER_BYTES or 8 + length > size:
            raise Unusable(f"{path}: this is no safetensors file, or it is cut off in its header ({size} bytes)")
        header = dict(_tensors(path, file.read(length)))
    ends = max((offsets[1] for offsets in header.values()), default=0)
    if 8 + length + ends != size:
        raise Unusable(f"{path}: it has {size} bytes, its header says {8 + length + ends}; it was not downloaded to its end")
    if lost := sorted(tensors - set(header)):
        raise Unusable(f"{path}: {len(lost)} tensors of the index are not in it, the first is {lost[0]}")
    return {name: end - start for name, (start, end) in header.items()}


def _tensors(path: Path, header: bytes) -> Iterator[tuple[str, tuple[int, int]]]:
    try:
        for name, value in msgspec.json.decode(header, type=dict[str, msgspec.Raw]).items():
            if name != "__metadata__":
                yield name, msgspec.json.decode(value, type=_Tensor).data_offsets
    except msgspec.DecodeError as error:
        raise Unusable(f"{path}: its header cannot be read: {error}") from None


def _read(path: Path, kind: Any) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        raise Unusable(f"{path.parent}: there is no {path.name}, so this is no checkpoint") from None
    except msgspec.ValidationError as error:
        raise Unusable(f"{path}: cannot be read: {models.place(str(error))}") from None
    except (OSError, msgspec.DecodeError) as error:
        raise Unusable(f"{path}: cannot be read: {error}") from None
