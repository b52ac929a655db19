"""What is counted: our own numbers in every worker, merged by the parent, and the text that Prometheus reads.

A library's registry is made for one process; here one scrape must be the whole gateway, workers that died included. A snapshot is plain
lists of numbers, so merging is adding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple

from gateway.context import RequestContext

# Family -> label values joined by US (0x1f) -> numbers: one for counters and gauges, for histograms a count a bucket and the sum.
Snapshot = dict[str, dict[str, list[float]]]
_JOIN = "\x1f"
# No client can make more series than this in one family: what comes later is counted together.
MAX_SERIES = 2000
_OTHER = "other"
# Columns of the ledger that are counted by key.
_USED = ("prompt", "cached", "generated", "delivered", "wasted_client", "wasted_host")

# OpenTelemetry's advice for gen_ai.server.* (semantic conventions 1.41), and three more for a time to first token behind a queue.
_DURATION_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}


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
STORE_UP = Family("penstock_store_up", "gauge", "Workers whose shared store answers.")
SPANS = Family("penstock_spans_total", "counter", "Spans, by what became of them.", ("result",))
STORE_LATENCY = Family(
    "penstock_store_seconds", "histogram", "Round trips to the shared store, each with all that was to be decided.", (),
    (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5),
)  # fmt: skip
LOST = Family("penstock_lost_requests_total", "counter", "Requests that were open at a gateway that died, as another one found.")
OPEN = Family("penstock_open_requests", "gauge", "Requests that are being answered.")
WORKERS = Family("penstock_workers", "gauge", "Worker processes that serve.", ("generation",))
WORKER_ENDS = Family("penstock_worker_ends_total", "counter", "Worker processes that ended without having been told to.")
RELOADS = Family("penstock_reloads_total", "counter", "Reloads of the configuration.", ("result",))
MEMORY = Family("penstock_resident_memory_bytes", "gauge", "Resident memory of our own processes.", ("process",))
FAMILIES = (
    REQUESTS,
    ATTEMPTS,
    CONTINUATIONS,
    TOKENS,
    DURATION,
    FIRST_TOKEN,
    USED,
    LIMITED,
    STORE_FAILURES,
    STORE_UP,
    STORE_LATENCY,
    LOST,
    SPANS,
    OPEN,
    WORKERS,
    WORKER_ENDS,
    RELOADS,
    MEMORY,
)


class Metrics:
    """The numbers of one process."""

    def __init__(self) -> None:
        self._values: Snapshot = {family.name: {} for family in FAMILIES}
        # Every request adds to these; no more of them than of the ledger's rows.
        self._used: dict[tuple[str, str, str], list[float]] = {}

    def add(self, family: Family, labels: tuple[str, ...] = (), amount: float = 1.0) -> None:
        """Count something."""
        self._series(family, labels, 1)[0] += amount

    def used(self, key: str, model: str, counts: Mapping[str, int]) -> None:
        """What a settled request adds to the tokens of its key."""
        for column in _USED:
            if column in counts:
                place = (key, model, column)
                series = self._used.get(place)
                if series is None:
                    series = self._used[place] = self._series(USED, place, 1)
                series[0] += counts[column]

    def put(self, family: Family, value: float) -> None:
        """How a gauge without labels stands."""
        self._series(family, (), 1)[0] = value

    def observe(self, family: Family, labels: tuple[str, ...], value: float) -> None:
        """Put a value into its bucket (the last one has no bound)."""
        series = self._series(family, labels, len(family.buckets) + 2)
        for index, bound in enumerate(family.buckets):
            if value <= bound:
                series[index] += 1
                break
        else:
            series[-2] += 1
        series[-1] += value

    def _series(self, family: Family, labels: tuple[str, ...], size: int) -> list[float]:
        values = self._values[family.name]
        key = _JOIN.join(labels)
        found = values.get(key)
        if found is None:
            if len(values) >= MAX_SERIES:
                key = _JOIN.join([_OTHER] * len(labels))
            found = values.setdefault(key, [0.0] * size)
        return found

    def request(self, record: RequestContext) -> None:
        """All that a finished request adds."""
        model = record.served
        self.add(REQUESTS, (record.route, model, str(record.status), record.outcome))
        for attempt in record.tried:
            self.add(ATTEMPTS, (attempt.target, attempt.result))
        if not model:
            return
        if record.continuations:
            self.add(CONTINUATIONS, (model,), record.continuations)
        labels = (OPERATIONS.get(record.route, record.route.rsplit("/", 1)[-1]), model)
        self.observe(DURATION, labels, record.ended_at - record.started_at)
        if record.stream and record.first_event_at:
            self.observe(FIRST_TOKEN, labels, record.first_event_at - record.started_at)
        if record.usage is not None and not record.usage.estimated:
            self.add(TOKENS, (model, "prompt"), record.usage.prompt_tokens)
            self.add(TOKENS, (model, "completion"), record.usage.completion_tokens)

    def snapshot(self) -> Snapshot:
        """The numbers as they are now; not a copy."""
        return self._values


def merge(snapshots: Iterable[Snapshot]) -> Snapshot:
    """The sum of several processes' numbers."""
    total: Snapshot = {}
    for snapshot in snapshots:
        for name, series in snapshot.items():
            into = total.setdefault(name, {})
            for key, values in series.items():
                before = into.get(key)
                into[key] = list(values) if before is None else [one + two for one, two in zip(before, values, strict=True)]
    return total


def render(snapshot: Snapshot) -> bytes:
    """Prometheus' text format, version 0.0.4."""
    return "".join(f"{line}\n" for family in FAMILIES for line in _lines(family, snapshot.get(family.name, {}))).encode()


def _lines(family: Family, series: dict[str, list[float]]) -> Iterator[str]:
    yield f"# HELP {family.name} {family.help}"
    yield f"# TYPE {family.name} {family.kind}"
    for key, values in sorted(series.items()):
        pairs = [_pair(name, value) for name, value in zip(family.labels, key.split(_JOIN), strict=False)]
        if family.kind != "histogram":
            yield f"{family.name}{_braces(pairs)} {values[0]:.17g}"
            continue
        for bound, count in zip((*family.buckets, "+Inf"), accumulate(values[:-1]), strict=True):
            yield f"{family.name}_bucket{_braces([*pairs, _pair('le', str(bound))])} {count:.17g}"
        yield f"{family.name}_sum{_braces(pairs)} {values[-1]:.17g}"
        yield f"{family.name}_count{_braces(pairs)} {sum(values[:-1]):.17g}"


def _braces(pairs: list[str]) -> str:
    return f"{{{','.join(pairs)}}}" if pairs else ""


def _pair(name: str, value: str) -> str:
    value = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'{name}="{value}"'
