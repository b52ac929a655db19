"""What is counted: every metric there is, and our own numbers in every worker.

A library's registry is made for one process; here one scrape must be the whole gateway, workers that died included. A snapshot is plain
lists of numbers, so merging is adding (`exposition.py`).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Mapping
from typing import Final, final

from gateway.serving.balance.cached import Placement
from gateway.serving.calls import OPERATIONS
from gateway.telemetry.families import ENGINE, GPU, MACHINE, Family
from gateway.telemetry.record import GENERATE, PHASES, Record

# Family -> label values joined by US (0x1f) -> numbers: one for counters and gauges, for histograms a count a bucket and the sum.
Snapshot = dict[str, dict[str, list[float]]]
JOIN: Final = "\x1f"
# Family -> label values -> number of the bucket -> trace id, value, seconds since 1970.
Exemplars = dict[str, dict[str, dict[str, tuple[str, float, float]]]]
# Phases that have a histogram; reading the request and deciding limits have their own numbers.
_OBSERVED: Final = tuple(number for number, name in enumerate(PHASES) if name not in ("read", "limits"))
# No client can make more series than this in one family: what comes later is counted together.
MAX_SERIES: Final = 2000
_OTHER = "other"
# 1 ms to 100 s, three to a decade.
_PHASE_S: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_PER_TOKEN_S: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
# Columns of the ledger that are counted by key.
_USED: Final = ("prompt", "cached", "generated", "delivered", "wasted_client", "wasted_host")

# OpenTelemetry's advice for gen_ai.server.* (semantic conventions 1.41), and three more for a time to first token behind a queue.
_DURATION_S: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN_S: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)


def operation(route: str) -> str:
    """What OpenTelemetry calls what a route does."""
    return OPERATIONS.get(route, route)


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
AFFINITY = Family("penstock_affinity_total", "counter", "Requests by what bound them to a host.", ("model", "source"))
IGNORED = Family(
    "penstock_session_names_ignored_total", "counter", "Names of sessions that were no text of 1 to 256 bytes, by where they stood.",
    ("source",),
)  # fmt: skip
PREFIX_TOKENS = Family(
    "penstock_prefix_tokens_total", "counter",
    "Prompt tokens of answers whose engine says what it had cached: all of them, expected in its cache, found there.",
    ("model", "host", "kind"),
)  # fmt: skip
MOVES = Family("penstock_conversation_moves_total", "counter", "Conversations that went on at another host.", ("model", "host"))
MOVED_TOKENS = Family("penstock_conversation_moved_tokens_total", "counter", "Tokens prefilled again for that.", ("model", "host"))
USED = Family("penstock_usage_tokens_total", "counter", "Tokens by key, as the ledger counts them.", ("key", "model", "kind"))
LIMITED = Family("penstock_limited_total", "counter", "Requests refused by a limit, by whose key.", ("limit", "model", "key"))
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
BUDGET_USED = Family(
    "penstock_budget_used_ratio", "gauge", "Share of a budget or a day's tokens that a key or team has used of its present period.",
    ("of", "name", "limit"),
)  # fmt: skip
ALERTS = Family("penstock_alerts_total", "counter", "Words of used budgets to the webhook, by how that went.", ("result",))
ISSUER_UP = Family("penstock_issuer_up", "gauge", "Workers that an identity provider gives its keys.", ("issuer",))
ISSUER_FETCHES = Family(
    "penstock_issuer_fetches_total", "counter", "Times that an identity provider was asked for its keys.", ("issuer", "result")
)
TASK_FAILURES = Family("penstock_task_failures_total", "counter", "Background tasks of ours that failed and were begun again.", ("task",))
LOST = Family("penstock_lost_requests_total", "counter", "Requests that were open at a gateway that died, as another one found.")
PHASE = Family(
    "penstock_phase_seconds",
    "histogram",
    "Where time was spent: queue, retry, connect, first_token (the engine's queue and prefill), generate, answer (JSON), client.",
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
SHED = Family("penstock_shed_total", "counter", "Requests that got no place at a host, by what stood against it.", ("model", "reason"))
DEADLINES_IGNORED = Family(
    "penstock_deadlines_ignored_total", "counter", "Headers of waiting requests that gave no time that a client waits.", ("header",)
)
LOOP_LAG = Family("penstock_loop_lag_seconds", "gauge", "How late a worker's event loop was, the worst of the last second, added up.")
FILES = Family("penstock_open_files", "gauge", "Open file descriptors of all workers.")
HOST_STATE = Family("penstock_host_state", "gauge", "1 for the state a host is in.", ("backend", "host", "state"))
HOST_ROLE = Family("penstock_host_role", "gauge", "1 for the part that a host has in a pair.", ("backend", "host", "role"))
HOST_IN_FLIGHT = Family("penstock_host_in_flight", "gauge", "Requests of ours that a host works on.", ("backend", "host"))
HOST_CHANGES = Family("penstock_host_changes_total", "counter", "Changes of a host's state, to which.", ("backend", "host", "state"))
OPEN = Family("penstock_open_requests", "gauge", "Requests that are being answered.")
WORKERS = Family("penstock_workers", "gauge", "Worker processes that serve.", ("generation",))
WORKER_ENDS = Family("penstock_worker_ends_total", "counter", "Worker processes that ended without having been told to.")
RELOADS = Family("penstock_reloads_total", "counter", "Reloads of the configuration.", ("result",))
MEMORY = Family("penstock_resident_memory_bytes", "gauge", "Resident memory of our own processes.", ("process",))
JUDGED = Family(
    "penstock_sentinel_answers_total", "counter", "Answers that were held to a rule, and those that broke it.",
    ("backend", "host", "weights", "rule", "result"),
)  # fmt: skip
FINISHES = Family(
    "penstock_sentinel_finish_reasons_total", "counter", "Why the choices of judged answers ended.", ("backend", "host", "reason")
)
UNJUDGED = Family("penstock_sentinel_left_out_total", "counter", "Answers that were taken to be judged and were not, by why.", ("reason",))
JUDGE_CPU = Family("penstock_sentinel_cpu_seconds_total", "counter", "What the process that judges answers has taken of a core.")
DOUBTED = Family(
    "penstock_sentinel_alert", "gauge", "1 while a host breaks a rule far more often than those that serve the same weights.",
    ("backend", "host", "rule"),
)  # fmt: skip
REASKED = Family(
    "penstock_sentinel_reasked_total", "counter", "Answers that were to be asked for once more, by what was wrong and what came of it.",
    ("model", "wrong", "result"),
)  # fmt: skip
FAMILIES = (
    REQUESTS, ATTEMPTS, RETRIES, CONTINUATIONS, TOKENS, DURATION, FIRST_TOKEN, PER_TOKEN, GAP, PHASE, USED, LIMITED,
    AFFINITY, IGNORED, PREFIX_TOKENS, MOVES, MOVED_TOKENS,
    STORE_FAILURES, STORE_LATE, STORE_UP, STORE_LATENCY, LOST, KEY_LIST_AGE, STORED_KEYS, TASK_FAILURES,
    JUDGED, FINISHES, UNJUDGED, JUDGE_CPU, DOUBTED, REASKED, BUDGET_USED, ALERTS, ISSUER_UP, ISSUER_FETCHES,
    SPANS, QUEUED, SHED, DEADLINES_IGNORED, HOST_STATE, HOST_ROLE, HOST_IN_FLIGHT, HOST_CHANGES,
    *ENGINE.values(), *MACHINE.values(), *GPU.values(), OPEN, WORKERS, WORKER_ENDS, RELOADS, MEMORY, LOOP_LAG, FILES,
)  # fmt: skip


@final
class _Alike:
    """The series that requests of one kind add to, looked up once for all of them: labels take longer to join and to find than to count."""

    __slots__ = ("affinity", "attempt", "duration", "first_token", "gap", "labels", "per_token", "phases", "requests", "tokens")

    def __init__(self, requests: list[float], affinity: list[float], attempt: list[float], labels: tuple[str, ...]) -> None:
        self.requests = requests
        self.affinity = affinity
        self.attempt = attempt
        # Of the histograms by operation and model.
        self.labels = labels
        # Made when they are first added to, so that none stands there empty.
        self.duration: list[float] | None = None
        self.first_token: list[float] | None = None
        self.gap: list[float] | None = None
        self.per_token: list[float] | None = None
        self.tokens: tuple[list[float], list[float]] | None = None
        self.phases: list[list[float] | None] = [None] * len(PHASES)


class Metrics:
    """The numbers of one process."""

    def __init__(self) -> None:
        self._values: Snapshot = {family.name: {} for family in FAMILIES}
        # The same lists by their labels as they are given.
        self._known: dict[str, dict[tuple[str, ...], list[float]]] = {family.name: {} for family in FAMILIES}
        # Route, model, status, outcome, what bound it, target and the attempt's result.
        self._alike: dict[tuple[str, str, int, str, str, str, str], _Alike] = {}
        # Key and model -> column of the ledger.
        self._used: dict[tuple[str, str], dict[str, list[float]]] = {}
        # Of the last value in each bucket: its trace, the value, and when.
        self.exemplars: Exemplars = {}

    def failed(self, task: str) -> None:
        """A background task has failed: see `gateway.supervision`."""
        self.add(TASK_FAILURES, (task,))

    def add(self, family: Family, labels: tuple[str, ...] = (), amount: float = 1.0) -> None:
        """Count something."""
        self._series(family, labels)[0] += amount

    def used(self, key: str, model: str, counts: Mapping[str, int]) -> None:
        """What a settled request adds to the tokens of its key."""
        columns = self._used.get((key, model))
        if columns is None:
            if len(self._used) >= MAX_SERIES:
                self._used.clear()
            columns = self._used[key, model] = {}
        for column in _USED:
            if column in counts:
                if column not in columns:
                    columns[column] = self._series(USED, (key, model, column))
                columns[column][0] += counts[column]

    def put(self, family: Family, value: float, labels: tuple[str, ...] = ()) -> None:
        """How a gauge stands."""
        self._series(family, labels)[0] = value

    def observe(self, family: Family, labels: tuple[str, ...], value: float) -> None:
        """Put a value into its bucket; the last one has no bound."""
        _observe(self._series(family, labels), family.buckets, value)

    def _example(self, family: Family, labels: tuple[str, ...], value: float, trace: str) -> None:
        """Remember a trace as an example of a value."""
        key, index = JOIN.join(labels), bisect_left(family.buckets, value)
        self.exemplars.setdefault(family.name, {}).setdefault(key, {})[str(index)] = (trace, value, round(time.time(), 3))

    def _series(self, family: Family, labels: tuple[str, ...]) -> list[float]:
        known = self._known[family.name]
        found = known.get(labels)
        if found is None:
            if len(known) >= MAX_SERIES:
                known.clear()
            found = known[labels] = self._find(family, labels)
        return found

    def _find(self, family: Family, labels: tuple[str, ...]) -> list[float]:
        values = self._values[family.name]
        key = JOIN.join(labels)
        found = values.get(key)
        if found is None:
            if len(values) >= MAX_SERIES:
                key = JOIN.join([_OTHER] * len(labels))
            found = values.setdefault(key, [0.0] * (len(family.buckets) + 2 if family.buckets else 1))
        return found

    def request(self, record: Record) -> None:
        """All that a finished request adds."""
        model, attempts = record.served, record.attempts
        if record.reasked:
            self.add(REASKED, (model, record.reasked, record.reask_result))
        for source in record.ignored:
            self.add(IGNORED, (source,))
        ticket = record.ticket
        if ticket is not None:
            if ticket.shed:
                self.add(SHED, (model, ticket.shed))
            for header in ticket.ignored:
                self.add(DEADLINES_IGNORED, (header,))
        if not attempts:
            self.add(REQUESTS, (record.route, model, str(record.status), record.outcome))
            if model:
                self.add(AFFINITY, (model, record.affinity))
                self._spent(record, model)
            return
        for attempt in attempts:
            placement = attempt.placement
            if placement is not None and (placement.cached_tokens is not None or placement.moved_from):
                self._placed(placement, model)
            half = attempt.prefill
            if half is not None:
                self.add(ATTEMPTS, (half.target, half.result))
        last = attempts[-1]
        alike = self._kind(record.route, model, record.status, record.outcome, record.affinity, last.target, last.result)
        alike.requests[0] += 1
        alike.affinity[0] += 1
        alike.attempt[0] += 1
        if len(attempts) > 1:
            self._before(record, model)
        self._phases(record, model, alike)
        took = record.ended_at - record.started_at
        if alike.duration is None:
            alike.duration = self._series(DURATION, alike.labels)
        _observe(alike.duration, _DURATION_S, took)
        streams = record.stream and record.first_event_at > 0
        if streams:
            if alike.first_token is None:
                alike.first_token = self._series(FIRST_TOKEN, alike.labels)
            _observe(alike.first_token, _FIRST_TOKEN_S, record.first_event_at - record.started_at)
        if record.trace.sampled:
            self._example(DURATION, alike.labels, took, record.trace.id)
            if streams:
                self._example(FIRST_TOKEN, alike.labels, record.first_event_at - record.started_at, record.trace.id)
        usage = record.usage
        if usage is not None and not usage.estimated:
            if alike.tokens is None:
                alike.tokens = self._series(TOKENS, (model, "prompt")), self._series(TOKENS, (model, "completion"))
            alike.tokens[0][0] += usage.prompt_tokens
            alike.tokens[1][0] += usage.completion_tokens
        if record.events:
            if alike.gap is None:
                alike.gap = self._series(GAP, (model,))
            _observe(alike.gap, _PHASE_S, record.largest_gap_s)
            if usage is not None and usage.completion_tokens > 1:
                if alike.per_token is None:
                    alike.per_token = self._series(PER_TOKEN, alike.labels)
                _observe(alike.per_token, _PER_TOKEN_S, record.phases[GENERATE] / (usage.completion_tokens - 1))

    def _kind(self, route: str, model: str, status: int, outcome: str, affinity: str, target: str, result: str) -> _Alike:
        kind = (route, model, status, outcome, affinity, target, result)
        found = self._alike.get(kind)
        if found is None:
            if len(self._alike) >= MAX_SERIES:
                self._alike.clear()
            requests = self._series(REQUESTS, (route, model, str(status), outcome))
            bound, attempt = self._series(AFFINITY, (model, affinity)), self._series(ATTEMPTS, (target, result))
            found = self._alike[kind] = _Alike(requests, bound, attempt, (operation(route), model))
        return found

    def _before(self, record: Record, model: str) -> None:
        """The attempts before the last."""
        if record.continuations:
            self.add(CONTINUATIONS, (model,), record.continuations)
        for before in record.attempts[:-1]:
            self.add(ATTEMPTS, (before.target, before.result))
            if not before.first_at:
                self.add(RETRIES, (model, before.cause))

    def _placed(self, placement: Placement, model: str) -> None:
        """What a host was expected to have of a prompt, what it had, and what a move has cost."""
        host = placement.host
        if placement.cached_tokens is not None:
            self.add(PREFIX_TOKENS, (model, host, "prompt"), placement.prompt_tokens)
            self.add(PREFIX_TOKENS, (model, host, "expected"), placement.expected_tokens)
            self.add(PREFIX_TOKENS, (model, host, "cached"), placement.cached_tokens)
        if placement.moved_from:
            self.add(MOVES, (model, host))
            self.add(MOVED_TOKENS, (model, host), placement.moved_tokens)

    def _phases(self, record: Record, model: str, alike: _Alike) -> None:
        phases = record.phases
        for number in _OBSERVED:
            spent = phases[number]
            if spent > 0:
                series = alike.phases[number]
                if series is None:
                    series = alike.phases[number] = self._series(PHASE, (PHASES[number], model, record.target, record.ending))
                _observe(series, _PHASE_S, spent)

    def _spent(self, record: Record, model: str) -> None:
        """Of a request that never reached a host."""
        for number in _OBSERVED:
            spent = record.phases[number]
            if spent > 0:
                self.observe(PHASE, (PHASES[number], model, record.target, record.ending), spent)
        labels, took = (operation(record.route), model), record.ended_at - record.started_at
        self.observe(DURATION, labels, took)
        if record.trace.sampled:
            self._example(DURATION, labels, took, record.trace.id)

    def snapshot(self) -> Snapshot:
        """The numbers as they are now; not a copy."""
        return self._values


def _observe(series: list[float], buckets: tuple[float, ...], value: float) -> None:
    series[bisect_left(buckets, value)] += 1
    series[-1] += value
