"""What is counted: our own numbers in every worker, merged by the parent, and the text that Prometheus reads.

A library's registry is made for one process; here one scrape must be the whole gateway, workers that died included. A snapshot is plain
lists of numbers, so merging is adding.
"""

from __future__ import annotations

import operator
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple

from gateway.plugin import Stats
from gateway.serving.calls import OPERATIONS
from gateway.telemetry.record import GENERATE, PHASES, Record

# Family -> label values joined by US (0x1f) -> numbers: one for counters and gauges, for histograms a count a bucket and the sum.
Snapshot = dict[str, dict[str, list[float]]]
_JOIN = "\x1f"
# Family -> label values -> number of the bucket -> trace id, value, seconds since 1970.
Exemplars = dict[str, dict[str, dict[str, tuple[str, float, float]]]]
# Phases that have a histogram; reading the request and deciding limits have their own numbers.
_OBSERVED = [(number, name) for number, name in enumerate(PHASES) if name not in ("read", "limits")]
# No client can make more series than this in one family: what comes later is counted together.
MAX_SERIES = 2000
_OTHER = "other"
# 1 ms to 100 s, three to a decade.
_PHASE_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
# Columns of the ledger that are counted by key.
_USED = ("prompt", "cached", "generated", "delivered", "wasted_client", "wasted_host")

# OpenTelemetry's advice for gen_ai.server.* (semantic conventions 1.41), and three more for a time to first token behind a queue.
_DURATION_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)


def operation(route: str) -> str:
    """What OpenTelemetry calls what a route does."""
    return OPERATIONS.get(route, route)


class Family(NamedTuple):
    """One metric: counter, gauge or (with buckets) histogram."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


REQUESTS = Family(
    "penstock_requests_total", "counter", "Requests answered, or given up by their clients.", ("route", "model", "status", "outcome")
)
ATTEMPTS = Family("penstock_attempts_total", "counter", "Attempts by target and how they went.", ("target", "result"))
CONTINUATIONS = Family("penstock_continuations_total", "counter", "Answers that went on at another host.", ("model",))
TOKENS = Family("penstock_tokens_total", "counter", "Tokens as the engines reported them.", ("model", "kind"))
DURATION = Family(
    "gen_ai_server_request_duration_seconds",
    "histogram",
    "From a request's first byte to its answer's last.",
    ("gen_ai_operation_name", "gen_ai_request_model"),
    _DURATION_S,
)
FIRST_TOKEN = Family(
    "gen_ai_server_time_to_first_token_seconds",
    "histogram",
    "From a request's first byte to the first event of its stream.",
    ("gen_ai_operation_name", "gen_ai_request_model"),
    _FIRST_TOKEN_S,
)
USED = Family("penstock_usage_tokens_total", "counter", "Tokens by key, as the ledger counts them.", ("key", "model", "kind"))
LIMITED = Family("penstock_limited_total", "counter", "Requests refused by a limit.", ("limit", "model"))
STORE_FAILURES = Family("penstock_store_failures_total", "counter", "Times that the shared store stopped answering.")
STORE_LATE = Family(
    "penstock_store_late_total", "counter", "Answers of the shared store that were late: what came up meanwhile was decided by the worker."
)
STORE_UP = Family("penstock_store_up", "gauge", "Workers whose shared store answers.")
SPANS = Family("penstock_spans_total", "counter", "Spans, by what became of them.", ("result",))
STORE_LATENCY = Family(
    "penstock_store_seconds", "histogram", "Round trips to the shared store, each with all that was to be decided.", (),
    (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5),
)  # fmt: skip
KEY_LIST_AGE = Family(
    "penstock_key_list_age_seconds",
    "gauge",
    "How long ago the stored keys were last known to be what is stored, by the worker that is worst off.",
)
STORED_KEYS = Family(
    "penstock_stored_keys", "gauge", "Keys that were made while the gateway runs, by whether they can be used.", ("state",)
)
TASK_FAILURES = Family("penstock_task_failures_total", "counter", "Background tasks of ours that failed and were begun again.", ("task",))
LOST = Family("penstock_lost_requests_total", "counter", "Requests that were open at a gateway that died, as another one found.")
PHASE = Family(
    "penstock_phase_seconds",
    "histogram",
    "Where time was spent: queue, retry, connect, first_token (the engine's queue and prefill), generate, client (not reading).",
    ("phase", "model", "host", "outcome"),
    _PHASE_S,
)
PER_TOKEN = Family(
    "gen_ai_server_time_per_output_token_seconds",
    "histogram",
    "The engine's mean time for a token after the first, one value a stream.",
    ("gen_ai_operation_name", "gen_ai_request_model"),
    _PER_TOKEN_S,
)
GAP = Family(
    "penstock_largest_gap_seconds", "histogram", "The longest the engine took between two events of a stream.", ("model",), _PHASE_S
)
RETRIES = Family("penstock_retries_total", "counter", "Further attempts, by what became of the one before.", ("model", "cause"))
QUEUED = Family("penstock_queue_waiting", "gauge", "Requests that wait for a place at a host.", ("backend",))
LOOP_LAG = Family("penstock_loop_lag_seconds", "gauge", "How late a worker's event loop was, the worst of the last second, added up.")
FILES = Family("penstock_open_files", "gauge", "Open file descriptors of all workers.")
HOST_STATE = Family("penstock_host_state", "gauge", "1 for the state a host is in.", ("backend", "host", "state"))
HOST_IN_FLIGHT = Family("penstock_host_in_flight", "gauge", "Requests of ours that a host works on.", ("backend", "host"))
HOST_CHANGES = Family("penstock_host_changes_total", "counter", "Changes of a host's state, to which.", ("backend", "host", "state"))
_ENGINE_LABELS = ("backend", "host")
ENGINE = {
    name: Family(f"penstock_engine_{name}", "gauge", words, _ENGINE_LABELS)
    for name, words in (
        ("running_requests", "Requests the engine has in its batch."),
        ("queued_requests", "Requests that wait in the engine."),
        ("max_running_requests", "Requests its batch can hold."),
        ("kv_usage_ratio", "Share of the KV cache in use."),
        ("cache_hit_ratio", "Share of prompt tokens found in the prefix cache."),
        ("generation_tokens_per_second", "Tokens it generates a second."),
        ("batching_efficiency_ratio", "Running over possible requests, while any wait."),
        ("ready", "Whether the agent beside it says that it takes requests."),
    )
}
MACHINE = {
    name: Family(f"penstock_host_{name}", "gauge", words, _ENGINE_LABELS)
    for name, words in (
        ("memory_used_ratio", "Share of the host's memory in use."),
        ("swap_used_bytes", "Swap in use."),
        ("disk_free_bytes", "Free disk where the weights lie."),
    )
}
GPU = {
    name: Family(f"penstock_gpu_{name}", "gauge", words, (*_ENGINE_LABELS, "gpu"))
    for name, words in (
        ("utilisation_ratio", "Share of time in which a kernel ran."),
        ("memory_used_ratio", "Share of a GPU's memory in use."),
        ("temperature_celsius", "Temperature of a GPU."),
        ("power_watts", "Power drawn."),
        ("ecc_uncorrected", "Uncorrected memory errors since the driver was loaded."),
        ("throttled", "Whether it is slowed down by heat or power."),
    )
}
OPEN = Family("penstock_open_requests", "gauge", "Requests that are being answered.")
WORKERS = Family("penstock_workers", "gauge", "Worker processes that serve.", ("generation",))
WORKER_ENDS = Family("penstock_worker_ends_total", "counter", "Worker processes that ended without having been told to.")
RELOADS = Family("penstock_reloads_total", "counter", "Reloads of the configuration.", ("result",))
MEMORY = Family("penstock_resident_memory_bytes", "gauge", "Resident memory of our own processes.", ("process",))
FAMILIES = (
    REQUESTS, ATTEMPTS, RETRIES, CONTINUATIONS, TOKENS, DURATION, FIRST_TOKEN, PER_TOKEN, GAP, PHASE, USED, LIMITED,
    STORE_FAILURES, STORE_LATE, STORE_UP, STORE_LATENCY, LOST, KEY_LIST_AGE, STORED_KEYS, TASK_FAILURES,
    SPANS, QUEUED, HOST_STATE, HOST_IN_FLIGHT, HOST_CHANGES,
    *ENGINE.values(), *MACHINE.values(), *GPU.values(), OPEN, WORKERS, WORKER_ENDS, RELOADS, MEMORY, LOOP_LAG, FILES,
)  # fmt: skip


class Metrics:
    """The numbers of one process."""

    def __init__(self) -> None:
        self._values: Snapshot = {family.name: {} for family in FAMILIES}
        # The same lists by their labels as they are given: to join those for each request takes longer than to count it.
        self._known: dict[str, dict[tuple[str, ...], list[float]]] = {family.name: {} for family in FAMILIES}
        # Of the last value in each bucket: its trace, the value, and when.
        self.exemplars: Exemplars = {}

    def add(self, family: Family, labels: tuple[str, ...] = (), amount: float = 1.0) -> None:
        """Count something."""
        self._series(family, labels, 1)[0] += amount

    def used(self, key: str, model: str, counts: Mapping[str, int]) -> None:
        """What a settled request adds to the tokens of its key."""
        for column in _USED:
            if column in counts:
                self._series(USED, (key, model, column), 1)[0] += counts[column]

    def put(self, family: Family, value: float, labels: tuple[str, ...] = ()) -> None:
        """How a gauge stands."""
        self._series(family, labels, 1)[0] = value

    def observe(self, family: Family, labels: tuple[str, ...], value: float, trace: str = "") -> None:
        """Put a value into its bucket (the last one has no bound); `trace` is remembered as an example of it."""
        series = self._series(family, labels, len(family.buckets) + 2)
        index = bisect_left(family.buckets, value)
        series[index] += 1
        series[-1] += value
        if trace:
            key = _JOIN.join(labels)
            self.exemplars.setdefault(family.name, {}).setdefault(key, {})[str(index)] = (trace, value, round(time.time(), 3))

    def _series(self, family: Family, labels: tuple[str, ...], size: int) -> list[float]:
        known = self._known[family.name]
        found = known.get(labels)
        if found is None:
            if len(known) >= MAX_SERIES:
                known.clear()
            found = known[labels] = self._find(family, labels, size)
        return found

    def _find(self, family: Family, labels: tuple[str, ...], size: int) -> list[float]:
        values = self._values[family.name]
        key = _JOIN.join(labels)
        found = values.get(key)
        if found is None:
            if len(values) >= MAX_SERIES:
                key = _JOIN.join([_OTHER] * len(labels))
            found = values.setdefault(key, [0.0] * size)
        return found

    def request(self, record: Record) -> None:
        """All that a finished request adds."""
        model = record.served
        self.add(REQUESTS, (record.route, model, str(record.status), record.outcome))
        for attempt in record.attempts:
            self.add(ATTEMPTS, (attempt.target, attempt.result))
        if not model:
            return
        if record.continuations:
            self.add(CONTINUATIONS, (model,), record.continuations)
        if len(record.attempts) > 1:
            for before in record.attempts[:-1]:
                if not before.first_at:
                    self.add(RETRIES, (model, before.result))
        self._phases(record, model)
        labels = (operation(record.route), model)
        trace = record.trace.id if record.trace.sampled else ""
        self.observe(DURATION, labels, record.ended_at - record.started_at, trace)
        if record.stream and record.first_event_at:
            self.observe(FIRST_TOKEN, labels, record.first_event_at - record.started_at, trace)
        usage = record.usage
        if usage is not None and not usage.estimated:
            self.add(TOKENS, (model, "prompt"), usage.prompt_tokens)
            self.add(TOKENS, (model, "completion"), usage.completion_tokens)
        if record.events:
            self.observe(GAP, (model,), record.largest_gap_s)
            if usage is not None and usage.completion_tokens > 1:
                self.observe(PER_TOKEN, labels, record.phases[GENERATE] / (usage.completion_tokens - 1))

    def _phases(self, record: Record, model: str) -> None:
        ending, target = record.ending, record.target
        for number, name in _OBSERVED:
            spent = record.phases[number]
            if spent > 0:
                series = self._series(PHASE, (name, model, target, ending), len(_PHASE_S) + 2)
                series[bisect_left(_PHASE_S, spent)] += 1
                series[-1] += spent

    def snapshot(self) -> Snapshot:
        """The numbers as they are now; not a copy."""
        return self._values


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
        pairs = [_pair(label, value) for label, value in zip(family.labels, key.split(_JOIN), strict=False)]
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


def of_hosts(rows: Iterable[tuple[str, str, str, int, Stats | None]]) -> Snapshot:
    """Gauges of hosts, from (backend, host, state, in flight, what is known of its engine and its machine)."""
    found: Snapshot = {}

    def put(family: Family, value: float | None, *labels: str) -> None:
        if value is not None:
            found.setdefault(family.name, {})[_JOIN.join(labels)] = [float(value)]

    for backend, host, state, in_flight, stats in rows:
        put(HOST_STATE, 1, backend, host, state)
        put(HOST_IN_FLIGHT, in_flight, backend, host)
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
