"""Traces: spans made from a request's record when it has ended, and handed to OpenTelemetry's exporter. The one place that knows its SDK.

Whether a request is recorded is decided before it begins, by its trace id or its caller's word; until then nothing is built. One that was
not chosen and fails, or takes longer than `slow_s`, is recorded after the fact: everything is in its record. (Its engine was told that the
trace is not recorded, so it has no span of the engine's.) Exporting is a thread's business with a bounded queue: a collector that is slow
or gone never slows a request.

Names are OpenTelemetry's: HTTP's semantic conventions, and those for GenAI as of v1.41.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

import gateway
from gateway.config import Tracing, without_secrets
from gateway.telemetry.metrics import SPANS, Metrics, operation
from gateway.telemetry.record import LIMITS, PHASES, PROBES, QUEUE, Attempt, Prefill, Record
from gateway.wire.trace import new_span

log = logging.getLogger("penstock.telemetry")

PROVIDER = "deepseek"
# The SDK's own default (OTEL_BSP_MAX_QUEUE_SIZE): what comes when so many wait pushes the oldest out.
_QUEUE = 2048
# A captured prompt or answer is cut off here.
_MAX_CONTENT = 64 << 10
_SCOPE = InstrumentationScope("penstock", gateway.__version__)
_SAMPLED, _NOT = TraceFlags(TraceFlags.SAMPLED), TraceFlags(TraceFlags.DEFAULT)
# What spans say, by their kind; docs/observability.md shows this table, and a test holds every span against it.
ATTRIBUTES = {
    "http.request.method": "SERVER",
    "http.route": "SERVER: the route's path, where there is one",
    "http.response.status_code": "SERVER",
    "url.path": "SERVER",
    "client.address": "SERVER",
    "error.type": "SERVER: the outcome, unless it is ok; CLIENT: why the attempt failed",
    "penstock.request_id": "SERVER: as in the log",
    "penstock.id": "SERVER: the answer's id",
    "penstock.key": "SERVER: the key's name",
    "penstock.stream": "SERVER: whether events were asked for",
    "penstock.outcome": "SERVER: how it ended",
    "penstock.affinity": "SERVER: what bound it to a host",
    **{f"penstock.phase.{name}_ms": "SERVER: time spent there; all of them add up to the span" for name in PHASES},
    "gen_ai.operation.name": "CLIENT: chat, text_completion, embeddings ...",
    "gen_ai.provider.name": "CLIENT: deepseek",
    "gen_ai.request.model": "both",
    "gen_ai.request.stream": "CLIENT",
    "gen_ai.request.choice.count": "CLIENT, above one",
    "gen_ai.request.max_tokens": "CLIENT, where given",
    "gen_ai.request.temperature": "CLIENT, where given",
    "gen_ai.request.top_p": "CLIENT, where given",
    "gen_ai.request.frequency_penalty": "CLIENT, where given",
    "gen_ai.request.presence_penalty": "CLIENT, where given",
    "gen_ai.request.seed": "CLIENT, where given",
    "gen_ai.response.id": "CLIENT",
    "gen_ai.response.model": "CLIENT",
    "gen_ai.response.finish_reasons": "CLIENT, the attempt that ended the answer",
    "gen_ai.response.time_to_first_chunk": "CLIENT, of a stream: seconds",
    "gen_ai.usage.input_tokens": "CLIENT, the attempt that ended the answer",
    "gen_ai.usage.output_tokens": "CLIENT",
    "gen_ai.usage.cache_read.input_tokens": "CLIENT, where the engine says",
    "gen_ai.usage.reasoning.output_tokens": "CLIENT, where the engine says",
    "gen_ai.input.messages": "CLIENT, with tracing.capture_content alone",
    "server.address": "CLIENT",
    "server.port": "CLIENT",
    "penstock.host": "CLIENT: as in /admin/hosts",
    "penstock.attempt": "CLIENT: from 1",
    "penstock.role": "CLIENT, of a pair: prefill or decode, each a span of its own",
    "penstock.cache.expected_tokens": "CLIENT: tokens of the prompt that the host was expected to have in its cache",
    "penstock.moved.from": "CLIENT: where the conversation was before, if elsewhere",
    "penstock.moved.tokens": "CLIENT: tokens that were prefilled again for that",
}
# Parameters of a call that its span shows, under OpenTelemetry's name.
_PARAMETERS = (
    ("max_completion_tokens", "gen_ai.request.max_tokens"),
    ("max_tokens", "gen_ai.request.max_tokens"),
    ("temperature", "gen_ai.request.temperature"),
    ("top_p", "gen_ai.request.top_p"),
    ("frequency_penalty", "gen_ai.request.frequency_penalty"),
    ("presence_penalty", "gen_ai.request.presence_penalty"),
    ("seed", "gen_ai.request.seed"),
)


def bound(ratio: float) -> int:
    """Trace ids whose last 64 bits are below this are recorded: the rule of OpenTelemetry's TraceIdRatioBased."""
    return round(ratio * (1 << 64))


def ratio(settings: Tracing) -> float:
    """Which share of traces without a parent is recorded: the setting, or OTEL_TRACES_SAMPLER and its argument, or all."""
    if settings.sample_ratio is not None:
        return settings.sample_ratio
    sampler = os.environ.get("OTEL_TRACES_SAMPLER", "")
    if sampler.endswith("always_off"):
        return 0.0
    return float(os.environ.get("OTEL_TRACES_SAMPLER_ARG", "1")) if sampler.endswith("traceidratio") else 1.0


class _Counted(SpanExporter):
    """The exporter, with a count of what became of the spans, and one line in the log when that changes."""

    def __init__(self, inner: SpanExporter, metrics: Metrics, endpoint: str) -> None:
        self._inner = inner
        self._metrics = metrics
        self._endpoint = without_secrets(endpoint)
        self._well = True
        self.taken = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """In the exporter's own thread."""
        self.taken += len(spans)
        try:
            result = self._inner.export(spans)
        except Exception as error:
            log.debug("%s", without_secrets(repr(error)))
            result = SpanExportResult.FAILURE
        well = result is SpanExportResult.SUCCESS
        self._metrics.add(SPANS, ("exported" if well else "failed",), len(spans))
        if well != self._well:
            self._well = well
            log.warning("traces reach %s again" if well else "traces cannot be sent to %s; requests go on without", self._endpoint)
        return result

    def shutdown(self) -> None:
        """Close the exporter."""
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """See the exporter's own."""
        return self._inner.force_flush(timeout_millis)


class Tracer:
    """Turns records into spans and hands them on."""

    def __init__(self, settings: Tracing, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        # The SDK and its transports say every failure anew, with a traceback: ours says when it begins and ends.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        logging.getLogger("urllib3").setLevel(logging.CRITICAL)
        inner, endpoint = _exporter(settings)
        self._exporter = _Counted(inner, metrics, endpoint)
        self._processor = BatchSpanProcessor(self._exporter)
        self._queue = int(os.environ.get("OTEL_BSP_MAX_QUEUE_SIZE", _QUEUE))
        self._offered = self._dropped = 0
        self._resource = (
            Resource.create({"service.name": settings.service_name, "service.version": gateway.__version__})
            if ("OTEL_SERVICE_NAME" not in os.environ)
            else Resource.create({"service.version": gateway.__version__})
        )
        self._offset = 0.0

    def finish(self, record: Record) -> None:
        """A request has ended: record it, if it is to be."""
        if record.route in PROBES:
            return
        if not record.trace.sampled:
            slow = self._settings.slow_s is not None and record.ended_at - record.started_at >= self._settings.slow_s
            if not (slow or (record.failed and self._settings.keep_errors)):
                return
        for span in self.spans(record):
            # What is over the queue's length pushes out the oldest: then one more was lost.
            if self._offered - self._exporter.taken - self._dropped >= self._queue:
                self._dropped += 1
                self._metrics.add(SPANS, ("dropped",))
            self._offered += 1
            self._processor.on_end(span)

    def close(self) -> None:
        """Send what waits, for a second or so; never waits for a collector that is gone."""
        closing = threading.Thread(target=self._processor.shutdown, daemon=True)
        closing.start()
        closing.join(1.5)

    def spans(self, record: Record) -> Iterator[ReadableSpan]:
        """The request's own, and one for each stretch in which time was spent on something else: waits and attempts."""
        # Monotonic to wall-clock, once for all spans of a request: a clock that is set must neither turn them around nor leave those of
        # later requests where it was.
        self._offset = time.time() - time.monotonic()
        trace = int(record.trace.id, 16)
        server = SpanContext(trace, int(record.span or new_span(), 16), False, _SAMPLED)
        parent = SpanContext(trace, int(record.trace.parent, 16), True, _SAMPLED) if record.trace.parent else None
        name = f"{record.method} {record.route}" if record.route else record.method
        attributes, events = _server(record), list(self._events(record))
        times = record.started_at, record.ended_at
        yield self._span(name, SpanKind.SERVER, server, parent, *times, attributes, events, record.failed)
        at = record.started_at + record.phases[0]
        for phase, label in ((LIMITS, "limits"), (QUEUE, "wait for a host")):
            if record.phases[phase] > 0.0005:
                own = SpanContext(trace, int(new_span(), 16), False, _SAMPLED)
                yield self._span(label, SpanKind.INTERNAL, own, server, at, at + record.phases[phase], {}, [], False)
            at += record.phases[phase]
        for number, attempt in enumerate(record.attempts):
            own = SpanContext(trace, int(attempt.span, 16), False, _SAMPLED)
            ended = attempt.ended_at or record.ended_at
            events = [Event("first token", {}, self._ns(attempt.first_at))] if attempt.first_at and record.stream else []
            title = f"{operation(record.route)} {record.model}"
            attributes = self._attempt(record, attempt, number)
            yield self._span(title, SpanKind.CLIENT, own, server, attempt.started_at, ended, attributes, events, attempt.result != "ok")
            half = attempt.prefill
            if half is not None:
                own = SpanContext(trace, int(half.span, 16), False, _SAMPLED)
                attributes, failed = _prefill(record, half, number), half.result != "ok"
                ended = half.ended_at or record.ended_at
                yield self._span(f"prefill {record.model}", SpanKind.CLIENT, own, server, half.started_at, ended, attributes, [], failed)

    def _events(self, record: Record) -> Iterator[Event]:
        if record.first_event_at and record.stream:
            yield Event("first token", {}, self._ns(record.first_event_at))
        for before, after in zip(record.attempts, record.attempts[1:], strict=False):
            name = "continued on" if before.first_at else "retry on"
            yield Event(f"{name} {after.target}", {"cause": before.cause, "from": before.target}, self._ns(after.started_at))
        if record.client_gone:
            yield Event("client gone", {}, self._ns(record.ended_at))

    def _attempt(self, record: Record, attempt: Attempt, number: int) -> dict[str, Any]:
        call, usage = record.call, record.usage
        found: dict[str, Any] = {
            "gen_ai.operation.name": operation(record.route),
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": record.model,
            "gen_ai.request.stream": record.stream,
            **_at(attempt.target, number),
        }
        if attempt.prefill is not None:
            found["penstock.role"] = "decode"
        if call is not None:
            if call.choices > 1:
                found["gen_ai.request.choice.count"] = call.choices
            for field, name in _PARAMETERS:
                if field in call.fields:
                    found[name] = msgspec.json.decode(call.fields[field])
            if self._settings.capture_content and "messages" in call.fields:
                found["gen_ai.input.messages"] = bytes(call.fields["messages"])[:_MAX_CONTENT].decode("utf-8", "replace")
        placement = attempt.placement
        if placement is not None:
            found["penstock.cache.expected_tokens"] = placement.expected_tokens
            if placement.moved_from:
                found["penstock.moved.from"], found["penstock.moved.tokens"] = placement.moved_from, placement.moved_tokens
        if attempt.result != "ok":
            found["error.type"] = attempt.result
        if attempt.first_at:
            found["gen_ai.response.id"], found["gen_ai.response.model"] = record.call_id, record.model
            if record.stream:
                found["gen_ai.response.time_to_first_chunk"] = attempt.first_at - attempt.started_at
        if number == len(record.attempts) - 1 and attempt.first_at:
            if record.finishes:
                found["gen_ai.response.finish_reasons"] = list(record.finishes)
            if usage is not None:
                found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"] = usage.prompt_tokens, usage.completion_tokens
                for name, value in (("cache_read.input", usage.cached_tokens), ("reasoning.output", usage.reasoning_tokens)):
                    if value is not None:
                        found[f"gen_ai.usage.{name}_tokens"] = value
        return found

    def _span(
        self, name: str, kind: SpanKind, own: SpanContext, parent: SpanContext | None, start: float, end: float, attributes: dict[str, Any],
        events: list[Event], failed: bool,
    ) -> ReadableSpan:  # fmt: skip
        status = Status(StatusCode.ERROR) if failed else Status(StatusCode.UNSET)
        return ReadableSpan(
            name, own, parent, self._resource, attributes, events, (), kind, status=status,
            start_time=self._ns(start), end_time=self._ns(max(start, end)), instrumentation_scope=_SCOPE,
        )  # fmt: skip

    def _ns(self, monotonic: float) -> int:
        return int((monotonic + self._offset) * 1e9)


def _at(target: str, number: int) -> dict[str, Any]:
    address, _, port = target.rpartition(":")
    found: dict[str, Any] = {"server.address": address or target, "penstock.host": target, "penstock.attempt": number + 1}
    return {**found, "server.port": int(port)} if port.isdigit() else found


def _prefill(record: Record, half: Prefill, number: int) -> dict[str, Any]:
    found = {"gen_ai.operation.name": operation(record.route), "gen_ai.provider.name": PROVIDER, "gen_ai.request.model": record.model}
    found |= {**_at(half.target, number), "penstock.role": "prefill"}
    return found if half.result == "ok" else {**found, "error.type": half.result}


def _server(record: Record) -> dict[str, Any]:
    found: dict[str, Any] = {
        "http.request.method": record.method,
        "http.response.status_code": record.status,
        "url.path": record.path,
        "client.address": record.client,
        "penstock.request_id": record.request_id,
    }
    if record.route:
        found["http.route"] = record.route
    if record.model:
        found["gen_ai.request.model"], found["penstock.stream"], found["penstock.id"] = record.model, record.stream, record.call_id
    if record.affinity:
        found["penstock.affinity"] = record.affinity
    if record.key:
        found["penstock.key"] = record.key
    found["penstock.outcome"] = record.outcome
    if record.outcome != "ok":
        found["error.type"] = record.outcome
    for phase, seconds in zip(PHASES, record.phases, strict=True):
        if seconds > 0:
            found[f"penstock.phase.{phase}_ms"] = round(seconds * 1e3, 3)
    return found


def _exporter(settings: Tracing) -> tuple[SpanExporter, str]:
    """By the setting's scheme or the standard variables; gRPC unless they say HTTP."""
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or settings.protocol
    endpoint = settings.otlp_endpoint
    shown = (
        endpoint or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or "the collector"
    )
    if protocol.startswith("http"):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http

        if endpoint is not None and not endpoint.rstrip("/").endswith("/v1/traces"):
            endpoint = f"{endpoint.rstrip('/')}/v1/traces"
        return Http(endpoint=endpoint, timeout=5), shown
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc

    return Grpc(endpoint=endpoint, insecure=(endpoint or "").startswith("http://") or None, timeout=5), shown
