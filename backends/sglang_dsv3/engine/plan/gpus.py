"""GPUs: what each kind has, and which a text or this machine's driver names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from backends.sglang_dsv3.engine.monitor import Monitor

GIB = 1 << 30
MEMORY_SOURCE = "published (the driver's own total, nvidia-smi and rocm-smi)"
SPEED_SOURCE = "published (data sheets of NVIDIA and AMD)"
_MOST_GPUS = 1024
_SPEC = re.compile(r"(?:(\d{1,4})x)?(\d{1,4})x([a-z0-9]+)(?:-(\d{2,3}))?\Z")


class Card(NamedTuple):
    """A kind of GPU. `gb`: what its maker calls its memory; `gib`: what its driver counts; `tb_s`: memory bandwidth, 0 where unknown;
    TFLOPS are dense, None where it has no such arithmetic; `capability`: CUDA's (90 is 9.0), None for ROCm."""

    name: str
    gb: int
    gib: float
    tb_s: float = 0.0
    bf16: float | None = None
    fp8: float | None = None
    fp4: float | None = None
    capability: int | None = None

    @property
    def spec(self) -> str:
        """As `--gpus` takes it: with its memory where there are several of that name."""
        return f"{self.name}-{self.gb}" if self.name in _SEVERAL or self.gb == 80 else self.name

    @property
    def tflops(self) -> float:
        """The fastest arithmetic that it has for values of 16 or 8 bits."""
        return self.fp8 or self.bf16 or 0.0


# Capabilities: developer.nvidia.com/cuda-gpus. H800: LMSYS, "Best Practices for Serving DeepSeek-R1 on H20-96G", 2025-09-26, as H20's.
CARDS = (
    Card("A100", 40, 39.6, 1.555, 312, None, None, 80),
    Card("A100", 80, 79.25, 2.039, 312, None, None, 80),
    Card("H20", 96, 95.6, 4.0, 148, 296, None, 90),
    Card("H800", 80, 79.6, 3.35, 989, 1979, None, 90),
    Card("H100", 80, 79.6, 3.35, 989, 1979, None, 90),
    Card("H200", 141, 140.4, 4.8, 989, 1979, None, 90),
    Card("B200", 180, 179.06, 8.0, 2250, 4500, 9000, 100),
    Card("B300", 288, 268.6, 8.0, 2250, 4500, 14000, 103),
    Card("MI300X", 192, 192.0, 5.3, 1307, 2615),
    Card("MI325X", 256, 256.0, 6.0, 1307, 2615),
    Card("MI355X", 288, 288.0, 8.0, 2516, 5033, 10066),
)
_SEVERAL = {card.name for card in CARDS if sum(other.name == card.name for other in CARDS) > 1}


class Host(NamedTuple):
    """So many nodes with so many GPUs of a kind; `measured`: the memory is what this machine's driver says."""

    nodes: int
    each: int
    card: Card
    measured: bool = False

    @property
    def total(self) -> int:
        """All its GPUs."""
        return self.nodes * self.each

    @property
    def spec(self) -> str:
        """As `--gpus` takes it."""
        return f"{f'{self.nodes}x' if self.nodes > 1 else ''}{self.each}x{self.card.spec}"


def accepted() -> str:
    """What `--gpus` takes, in words."""
    return f"8xH200 or 2x8xH100-80, with one of {', '.join(dict.fromkeys(card.name for card in CARDS))}"


def parsed(text: str) -> Host:
    """`8xH200`, `4xA100-40`, `2x8xH100` as a host; raises ValueError with what is accepted."""
    found = _SPEC.match(text.lower())
    if found is None:
        raise ValueError(f"'{text}' is no number of GPUs; accepted: {accepted()}")
    nodes, each, name, gb = int(found[1] or 1), int(found[2]), found[3], found[4]
    named = [card for card in CARDS if card.name.lower() == name]
    if not named:
        near = difflib.get_close_matches(name.upper(), [card.name for card in CARDS], 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"'{text}': no {name.upper()} is known here; accepted: {accepted()}{hint}")
    if not 1 <= nodes * each <= _MOST_GPUS or each == 0:
        raise ValueError(f"'{text}' is no number of GPUs; accepted: 1 to {_MOST_GPUS} of them")
    # A name alone is the larger of its kind.
    chosen = [card for card in named if gb is None or card.gb == int(gb)]
    if not chosen:
        there = ", ".join(f"{card.name}-{card.gb}" for card in named)
        raise ValueError(f"'{text}': there is no {named[0].name} with {gb} GB; accepted: {there}")
    return Host(nodes, each, chosen[-1])


def named(name: str, gib: float) -> Card:
    """The card of a driver's name, such as `NVIDIA H100 80GB HBM3`, with the memory that the driver says; H200 before H20. One that nobody
    here knows has its memory alone."""
    found = [card for card in CARDS if card.name in name.upper()]
    best = max(found, key=lambda card: (len(card.name), -abs(card.gib - gib)), default=None)
    return best._replace(gib=gib) if best is not None else Card(name, round(gib), gib)


def detected(indices: Sequence[int] | None = None, nodes: int = 1) -> Host | None:
    """This machine's GPUs (or those of them), as the driver counts them, the smallest for all; None without a driver to ask."""
    watch = Monitor(indices or [], Path("/"))
    if indices is None and (count := watch.count()):
        watch = Monitor(range(count), Path("/"))
    gpus = [gpu for gpu in watch.look().gpus if gpu.memory_total]
    if not gpus:
        return None
    smallest = min(gpus, key=lambda gpu: gpu.memory_total or 0)
    return Host(nodes, len(gpus), named(smallest.name, (smallest.memory_total or 0) / GIB), measured=True)
