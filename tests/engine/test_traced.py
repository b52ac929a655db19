"""One trace from the client through the gateway to the scheduler: the real engine continues ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import raw
from tests.support.otlp import Collector, collector
from tests.support.processes import Gateway, gateway, until

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def sink() -> Iterator[Collector]:
    with collector() as running:
        yield running


@pytest.fixture(scope="module")
def traced(sink: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    engine = {"otlp_endpoint": f"127.0.0.1:{sink.port}"}
    config = {
        "models": {"deepseek-v3-tiny": {"backend": "dsv3"}},
        "backends": {"dsv3": {"kind": "sglang_dsv3", "hosts": [{"launch": "local"}], "engine": engine}},
        "tracing": {"otlp_endpoint": sink.endpoint},
    }
    folder: Path = tmp_path_factory.mktemp("traced")
    with gateway(folder, config, OTEL_BSP_SCHEDULE_DELAY="200") as running:
        running.wait_ready()
        yield running


def test_the_engines_span_is_a_child_of_our_attempt(traced: Gateway, sink: Collector) -> None:
    trace, caller = os.urandom(16).hex(), os.urandom(8).hex()
    body = {**raw.chat("hi", stream=True, max_tokens=8), "model": "deepseek-v3-tiny"}
    answer = raw.call(traced.port, "POST", CHAT, body, {"traceparent": f"00-{trace}-{caller}-01"})
    assert answer.status == 200
    server, (attempt,) = sink.tree(trace)
    assert server.parent == caller
    until("the engine's spans are there", lambda: any(span.parent == attempt.id for span in sink.spans), 30, 0.2)
    of_engine = [span for span in sink.spans if span.trace == trace and span.service != "penstock"]
    assert len(of_engine) > 1, "and below it what the scheduler did"
    assert attempt.attributes["gen_ai.usage.output_tokens"] == 8
    assert attempt.attributes["gen_ai.response.finish_reasons"] == ["length"]


def test_an_engine_that_is_told_not_to_records_nothing(traced: Gateway, sink: Collector) -> None:
    trace = os.urandom(16).hex()
    body = {**raw.chat("hi", max_tokens=2), "model": "deepseek-v3-tiny"}
    raw.call(traced.port, "POST", CHAT, body, {"traceparent": f"00-{trace}-00f067aa0ba902b7-00"})
    later = raw.call(traced.port, "POST", CHAT, body)
    sink.tree(later.headers["x-trace-id"])
    assert [span for span in sink.spans if span.trace == trace] == []
