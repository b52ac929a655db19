"""The machine beside the engine: every GPU by NVML, host memory, swap and disk by psutil, and which GPUs are near which cores.

A machine without NVML says so and goes on; nothing here may end an engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil

_GIB = 1 << 30
# NVML's bits for why a GPU's clock is below what it could be (nvml.h, nvmlClocksEventReasons*), but for being idle or set so.
_THROTTLES = {0x4: "power cap", 0x8: "hardware slowdown", 0x20: "thermal, software", 0x40: "thermal, hardware", 0x80: "power brake"}


class Gpu(msgspec.Struct, frozen=True):
    """One GPU. Shares are 0 to 1, memory in bytes, power in watts, temperature in degrees Celsius; None is what it does not tell."""

    index: int
    name: str
    utilisation: float | None = None
    memory_used: int | None = None
    memory_total: int | None = None
    temperature: float | None = None
    power: float | None = None
    power_limit: float | None = None
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    throttled: list[str] = []
    numa_node: int | None = None


class Machine(msgspec.Struct, frozen=True):
    """The whole of it. `note`: what could not be asked, and why."""

    memory_used: int
    memory_total: int
    swap_used: int
    disk_free: int
    cores: int
    numa_nodes: int
    gpus: list[Gpu] = []
    hints: list[str] = []
    note: str = ""


class Monitor:
    """Looks when it is asked. `gpus`: the engine's own; `path`: where its weights lie."""

    def __init__(self, gpus: Sequence[int], path: Path) -> None:
        self._gpus = gpus
        self._path = path
        self._nvml: Any = None
        self.note = ""
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
        except Exception as error:  # no driver, no library, no permission: each has an exception of its own
            self.note = f"no NVML: {error}"

    def count(self) -> int | None:
        """How many GPUs the driver knows; None without one."""
        return int(self._nvml.nvmlDeviceGetCount()) if self._nvml is not None else None

    def look(self) -> Machine:
        """The machine as it is now."""
        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
        where = next(path for path in (self._path, *self._path.parents) if path.exists())
        gpus = [self._gpu(index) for index in self._gpus] if self._nvml is not None else []
        nodes = _numa_nodes()
        return Machine(
            memory.total - memory.available, memory.total, swap.used, psutil.disk_usage(str(where)).free, psutil.cpu_count() or 1, nodes,
            gpus, list(_hints(memory.available, swap.used, nodes, gpus)), self.note,
        )  # fmt: skip

    def _gpu(self, index: int) -> Gpu:
        nvml = self._nvml
        found: dict[str, Any] = {"index": index, "name": "?"}
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
        except Exception as error:
            return Gpu(index, f"not there: {error}")

        def ask(name: str, question: Any) -> None:
            with contextlib.suppress(Exception):  # not every GPU tells everything
                found[name] = question()

        ask("name", lambda: nvml.nvmlDeviceGetName(handle))
        ask("utilisation", lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
        ask("memory_used", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used)
        ask("memory_total", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total)
        ask("temperature", lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)))
        ask("power", lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000)
        ask("power_limit", lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000)
        for kind, number in (
            ("ecc_corrected", nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
            ("ecc_uncorrected", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
        ):
            ask(kind, lambda number=number: nvml.nvmlDeviceGetTotalEccErrors(handle, number, nvml.NVML_VOLATILE_ECC))
        ask("throttled", lambda: _reasons(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)))
        ask("numa_node", lambda: _numa_node_of(nvml.nvmlDeviceGetPciInfo(handle).busId))
        return Gpu(**found)


def _reasons(bits: int) -> list[str]:
    return [words for bit, words in _THROTTLES.items() if bits & bit]


def _numa_nodes() -> int:
    return len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1


def _numa_node_of(bus: Any) -> int | None:
    name = bus.decode() if isinstance(bus, bytes) else str(bus)
    node = int(Path(f"/sys/bus/pci/devices/{name[-12:].lower()}/numa_node").read_text())
    return node if node >= 0 else None


def _hints(available: int, swap_used: int, nodes: int, gpus: Sequence[Gpu]) -> Iterator[str]:
    if swap_used > _GIB:
        yield f"{swap_used / _GIB:.1f} GiB are swapped out: an engine that swaps stalls; give the host more memory, or turn swap off"
    if available < 4 * _GIB:
        yield f"only {available / _GIB:.1f} GiB of host memory are left"
    near = sorted({gpu.numa_node for gpu in gpus if gpu.numa_node is not None})
    if nodes > 1 and len(near) == 1:
        bind = f"numactl --cpunodebind={near[0]} --membind={near[0]}"
        yield f"all GPUs are at NUMA node {near[0]}: `{bind} penstock engine ...` keeps the rest near them"
    for gpu in gpus:
        if gpu.throttled:
            yield f"GPU {gpu.index} is slowed down: {', '.join(gpu.throttled)}"
        if gpu.ecc_uncorrected:
            yield f"GPU {gpu.index} had {gpu.ecc_uncorrected} uncorrected memory errors since its driver was loaded"


# Name, help, and how it is read off.
_HOST: tuple[tuple[str, str, Callable[[Machine], float]], ...] = (
    ("penstock_host_memory_used_bytes", "Host memory in use.", lambda machine: machine.memory_used),
    ("penstock_host_memory_bytes", "Host memory.", lambda machine: machine.memory_total),
    ("penstock_host_swap_used_bytes", "Swap in use.", lambda machine: machine.swap_used),
    ("penstock_host_disk_free_bytes", "Free disk where the weights lie.", lambda machine: machine.disk_free),
)
_GPU: tuple[tuple[str, str, Callable[[Gpu], float | None]], ...] = (
    ("penstock_gpu_utilisation_ratio", "Share of time in which a kernel ran.", lambda gpu: gpu.utilisation),
    ("penstock_gpu_memory_used_bytes", "GPU memory in use.", lambda gpu: gpu.memory_used),
    ("penstock_gpu_memory_bytes", "GPU memory.", lambda gpu: gpu.memory_total),
    ("penstock_gpu_temperature_celsius", "Temperature of the GPU.", lambda gpu: gpu.temperature),
    ("penstock_gpu_power_watts", "Power drawn.", lambda gpu: gpu.power),
    ("penstock_gpu_power_limit_watts", "Power it may draw.", lambda gpu: gpu.power_limit),
    ("penstock_gpu_ecc_uncorrected", "Uncorrected memory errors since the driver was loaded.", lambda gpu: gpu.ecc_uncorrected),
    ("penstock_gpu_throttled", "Whether it is slowed down by heat or power.", lambda gpu: int(bool(gpu.throttled))),
)


def series(machine: Machine) -> Iterator[tuple[str, str, dict[str, str], float]]:
    """Every gauge as (name, help, labels, value)."""
    for name, help, read in _HOST:
        yield name, help, {}, float(read(machine))
    for name, help, of in _GPU:
        for gpu in machine.gpus:
            value = of(gpu)
            if value is not None:
                yield name, help, {"gpu": str(gpu.index)}, float(value)
