"""The numbers of several processes as one, and the text that Prometheus reads."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from itertools import accumulate

from gateway.plugin import Stats
from gateway.telemetry.families import ENGINE, GPU, MACHINE, Family
from gateway.telemetry.metrics import FAMILIES, HOST_IN_FLIGHT, HOST_ROLE, HOST_STATE, JOIN, KEY_LIST_AGE, Exemplars, Snapshot

# Of several processes' values the largest counts, not their sum.
_WORST = frozenset({KEY_LIST_AGE.name})


def merge(snapshots: Iterable[Snapshot]) -> Snapshot:
    """The sum of several processes' numbers."""
    total: Snapshot = {}
    for snapshot in snapshots:
        for name, series in snapshot.items():
            into = total.setdefault(name, {})
            for key, values in series.items():
                before = into.get(key)
                both = max if name in _WORST else operator.add
                into[key] = list(values) if before is None else list(map(both, before, values))
    return total


def render(snapshot: Snapshot) -> bytes:
    """Prometheus' text format, version 0.0.4."""
    return "".join(f"{line}\n" for family in FAMILIES for line in _lines(family, snapshot.get(family.name, {}), None)).encode()


def render_openmetrics(snapshot: Snapshot, exemplars: Exemplars) -> bytes:
    """OpenMetrics 1.0, with a trace as an example in buckets that have one."""
    lines = [line for family in FAMILIES for line in _lines(family, snapshot.get(family.name, {}), exemplars.get(family.name, {}))]
    return "".join(f"{line}\n" for line in (*lines, "# EOF")).encode()


def _lines(
    family: Family, series: dict[str, list[float]], exemplars: dict[str, dict[str, tuple[str, float, float]]] | None
) -> Iterator[str]:
    name = family.name.removesuffix("_total") if exemplars is not None and family.kind == "counter" else family.name
    yield f"# HELP {name} {family.help}"
    yield f"# TYPE {name} {family.kind}"
    for key, values in sorted(series.items()):
        pairs = [_pair(label, value) for label, value in zip(family.labels, key.split(JOIN), strict=False)]
        if family.kind != "histogram":
            yield f"{family.name}{_braces(pairs)} {values[0]:.17g}"
            continue
        examples = (exemplars or {}).get(key, {})
        bounds = [*(str(float(bound) if exemplars is not None else bound) for bound in family.buckets), "+Inf"]
        for index, (shown, count) in enumerate(zip(bounds, accumulate(values[:-1]), strict=True)):
            example = examples.get(str(index))
            more = f' # {{trace_id="{example[0]}"}} {example[1]:.17g} {example[2]:.3f}' if example is not None else ""
            yield f"{family.name}_bucket{_braces([*pairs, _pair('le', shown)])} {count:.17g}{more}"
        yield f"{family.name}_sum{_braces(pairs)} {values[-1]:.17g}"
        yield f"{family.name}_count{_braces(pairs)} {sum(values[:-1]):.17g}"


def _braces(pairs: list[str]) -> str:
    return f"{{{','.join(pairs)}}}" if pairs else ""


def _pair(name: str, value: str) -> str:
    value = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'{name}="{value}"'


def of_hosts(rows: Iterable[tuple[str, str, str, int, Stats | None, str]]) -> Snapshot:
    """Gauges of hosts, from (backend, host, state, in flight, what is known of its engine and its machine, role)."""
    found: Snapshot = {}

    def put(family: Family, value: float | None, *labels: str) -> None:
        if value is not None:
            found.setdefault(family.name, {})[JOIN.join(labels)] = [float(value)]

    for backend, host, state, in_flight, stats, role in rows:
        put(HOST_STATE, 1, backend, host, state)
        put(HOST_IN_FLIGHT, in_flight, backend, host)
        if role:
            put(HOST_ROLE, 1, backend, host, role)
        if stats is not None:
            for name, family in (*ENGINE.items(), *MACHINE.items()):
                put(family, getattr(stats, name), backend, host)
            for gpu in stats.gpus:
                for name, family in GPU.items():
                    put(family, getattr(gpu, name), backend, host, str(gpu.index))
    return found


def latest(exemplars: Iterable[Exemplars]) -> Exemplars:
    """Of several processes' examples the youngest of each bucket."""
    total: Exemplars = {}
    for one in exemplars:
        for family, series in one.items():
            for key, buckets in series.items():
                into = total.setdefault(family, {}).setdefault(key, {})
                for bucket, example in buckets.items():
                    if bucket not in into or into[bucket][2] < example[2]:
                        into[bucket] = example
    return total
