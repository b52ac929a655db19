"""Spans as a collector gets them, through OpenTelemetry's own protocol: one tree a request, whatever happened to it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gateway.access.keys import hashed
from gateway.telemetry.record import PHASES
from tests.support import raw
from tests.support.otlp import Collector, Span, collector
from tests.support.processes import Gateway, Rehearsal, gateway, held_back, rehearsal, until

CHAT = "/v1/chat/completions"
KEY = {"authorization": "Bearer sk-trace-secret"}
FAST: dict[str, Any] = {"OTEL_BSP_SCHEDULE_DELAY": "100"}


@pytest.fixture(scope="module")
def sink() -> Iterator[Collector]:
    with collector() as running:
        yield running


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[Rehearsal, Rehearsal]]:
    with rehearsal() as one, rehearsal() as two:
        yield one, two


def configuration(engines: tuple[Rehearsal, ...], endpoint: str, **tracing: Any) -> dict[str, Any]:
    return {
        "models": {"deepseek-v3": {"backend": "dsv3"}},
        "backends": {"dsv3": {"kind": "sglang_dsv3", "hosts": [{"url": engine.url, "priority": at} for at, engine in enumerate(engines)]}},
        "keys": [{"name": "tracer", "hash": hashed("sk-trace-secret")}, {"name": "slow", "hash": hashed("sk-slow"), "rpm": 1}],
        "tracing": {"otlp_endpoint": endpoint, **tracing},
    }


@pytest.fixture(scope="module")
def traced(engines: tuple[Rehearsal, Rehearsal], sink: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("traced"), configuration(engines, sink.endpoint), **FAST) as running:
        running.wait_all_hosts()
        yield running


def ask(to: Gateway, prompt: str = "hi", headers: dict[str, str] | None = None, **more: Any) -> raw.Answer:
    return raw.call(to.port, "POST", CHAT, raw.chat(prompt, **more), {**KEY, **(headers or {})})


def phases(server: Span) -> dict[str, float]:
    return {name: server.attributes.get(f"penstock.phase.{name}_ms", 0.0) / 1e3 for name in PHASES}


def test_a_request_is_one_tree(traced: Gateway, sink: Collector, engines: tuple[Rehearsal, Rehearsal]) -> None:
    answer = ask(traced, "[[tokens 7]]", max_tokens=50, temperature=0.5, seed=3)
    server, (attempt,) = sink.tree(answer.headers["x-trace-id"])
    assert (server.name, server.kind, server.parent, server.failed) == (f"POST {CHAT}", "SERVER", "", False)
    assert server.attributes["http.route"] == CHAT
    assert server.attributes["http.response.status_code"] == 200
    assert server.attributes["penstock.key"] == "tracer"
    assert server.attributes["penstock.request_id"] == answer.headers["x-request-id"]
    assert (attempt.name, attempt.kind) == ("chat deepseek-v3", "CLIENT")
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "deepseek",
        "gen_ai.request.model": "deepseek-v3",
        "gen_ai.request.max_tokens": 50,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 3,
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.response.id": answer.json()["id"],
        "penstock.attempt": 1,
        "penstock.host": engines[0].url.removeprefix("http://"),
        "server.address": "127.0.0.1",
    }
    assert {name: attempt.attributes[name] for name in expected} == expected
    assert server.start_ns <= attempt.start_ns <= attempt.end_ns <= server.end_ns
    assert "hi" not in json.dumps([span.attributes for span in (server, attempt)])


def test_the_phases_add_up_and_each_shows_its_own_delay(traced: Gateway, sink: Collector) -> None:
    """40 tokens at 10 ms each from the engine, and a client that reads nothing for a second."""
    content = json.dumps(raw.chat("[[tokens 40]] [[pace 0.01]]", stream=True)).encode()
    began = time.monotonic()
    answer = raw.call(traced.port, "POST", CHAT, content, KEY)
    took = time.monotonic() - began
    server, below = sink.tree(answer.headers["x-trace-id"])
    spent = phases(server)
    assert sum(spent.values()) == pytest.approx(server.seconds, abs=1e-4), "each moment is in one of them"
    assert spent["generate"] >= 0.4
    assert spent["client"] < 0.2
    assert server.seconds <= took + 0.05
    assert server.events == ["first token"]
    assert len(below) == 1
    assert below[0].attributes["gen_ai.response.time_to_first_chunk"] >= spent["first_token"] - 1e-3


def test_waiting_for_a_place_and_for_a_whole_answer_show_where_they_were_spent(
    engines: tuple[Rehearsal, Rehearsal], sink: Collector, tmp_path: Path
) -> None:
    """One place at the host: the second of two requests waits for what the first has left, and says so, as a span too."""
    config = configuration(engines[:1], sink.endpoint)
    config["backends"]["dsv3"]["hosts"][0]["max_in_flight"] = 1
    with gateway(tmp_path, config, **FAST) as running, ThreadPoolExecutor(2) as clients:
        running.wait_all_hosts()
        both = [clients.submit(ask, running, "[[tokens 40]] [[pace 0.01]]") for _ in range(2)]
        trees = [sink.tree(one.result().headers["x-trace-id"]) for one in both]
        (first, _), (second, below) = sorted(trees, key=lambda tree: phases(tree[0])["queue"])
        assert phases(first)["queue"] < 0.2
        assert phases(first)["answer"] >= 0.4, "of a JSON answer the engine's time until it is whole"
        assert phases(first)["first_token"] == phases(first)["generate"] == 0.0, "nobody knows when its first token was there"
        attempt = next(span for span in below if span.kind == "CLIENT")
        assert "gen_ai.response.time_to_first_chunk" not in attempt.attributes
        assert phases(second)["queue"] >= 0.2
        waited = next(span for span in below if span.name == "wait for a host")
        assert waited.seconds == pytest.approx(phases(second)["queue"], abs=1e-3)
        for server in (first, second):
            assert sum(phases(server).values()) == pytest.approx(server.seconds, abs=1e-4)


def test_time_spent_on_a_slow_client_is_not_the_engines(traced: Gateway, engines: tuple[Rehearsal, Rehearsal], sink: Collector) -> None:
    before = int(engines[0].seen()["events_sent"])
    content = json.dumps(raw.chat("[[tokens 60000]]", stream=True)).encode()
    with raw.connect(traced.port) as peer:
        peer.sendall(raw.request("POST", CHAT, content, KEY))
        head = peer.recv(65536)
        held_back(engines[0], before)  # for a second and a half
        raw.rest(peer)
    trace = next(line.split(b": ")[1].decode() for line in head.split(b"\r\n") if line.startswith(b"x-trace-id"))
    server, _ = sink.tree(trace)
    assert phases(server)["client"] >= 1.0
    assert sum(phases(server).values()) == pytest.approx(server.seconds, abs=1e-4)


def test_a_thousand_chunks_are_the_same_few_spans(traced: Gateway, sink: Collector) -> None:
    answer = ask(traced, "[[tokens 1000]]", stream=True)
    server, below = sink.tree(answer.headers["x-trace-id"])
    assert len(below) == 1
    assert (server.events, below[0].events) == (["first token"], ["first token"])


def test_a_retry_is_a_second_attempt(traced: Gateway, sink: Collector, engines: tuple[Rehearsal, Rehearsal]) -> None:
    raw.call(int(engines[0].url.rsplit(":", 1)[1]), "POST", "/rehearsal", {"failing": True})
    try:
        answer = ask(traced, "a retry", stream=True)
    finally:
        raw.call(int(engines[0].url.rsplit(":", 1)[1]), "POST", "/rehearsal", {"failing": False})
    server, (first, second) = sink.tree(answer.headers["x-trace-id"])
    assert answer.status == 200
    assert (first.failed, first.attributes["error.type"], second.failed) == (True, "broken", False)
    assert [span.attributes["penstock.attempt"] for span in (first, second)] == [1, 2]
    second_host = second.attributes["penstock.host"]
    assert server.events == ["first token", f"retry on {second_host}"]
    assert not server.failed
    assert phases(server)["retry"] > 0


def test_a_continuation_is_told(traced: Gateway, sink: Collector) -> None:
    answer = ask(traced, "[[times 1]] [[die 5]] [[tokens 9]] a continuation", stream=True)
    assert b"token 8" in answer.body
    server, (first, second) = sink.tree(answer.headers["x-trace-id"])
    assert first.attributes["error.type"] == "cut"
    assert f"continued on {second.attributes['penstock.host']}" in server.events
    assert second.attributes["gen_ai.usage.output_tokens"] == 9


def test_a_refusal_by_a_limit_has_no_attempt(traced: Gateway, sink: Collector) -> None:
    headers = {"authorization": "Bearer sk-slow"}
    answers = [ask(traced, headers=headers) for _ in range(2)]
    assert [answer.status for answer in answers] == [200, 429]
    server, below = sink.tree(answers[1].headers["x-trace-id"])
    assert not [span for span in below if span.name != "limits"], "only what it waited for the decision"
    assert server.attributes["penstock.outcome"] == "limited"
    assert not server.failed, "the client's own fault is no error of the server's"


def test_a_client_that_leaves_is_told(traced: Gateway, sink: Collector) -> None:
    trace = os.urandom(16).hex()
    content = json.dumps(raw.chat("[[tokens 500]] [[pace 0.01]]", stream=True)).encode()
    with raw.connect(traced.port) as peer:
        peer.sendall(raw.request("POST", CHAT, content, {**KEY, "traceparent": f"00-{trace}-00f067aa0ba902b7-01"}))
        peer.recv(1000)
    server, _ = sink.tree(trace)
    assert "client gone" in server.events


def test_a_callers_trace_goes_on_through_us_to_the_engine(traced: Gateway, sink: Collector, engines: tuple[Rehearsal, Rehearsal]) -> None:
    trace, caller = os.urandom(16).hex(), os.urandom(8).hex()
    ask(traced, headers={"traceparent": f"00-{trace}-{caller}-01", "tracestate": "vendor=x,other=y"})
    seen = {name.lower(): value for name, value in engines[0].seen()["last_headers"].items()}
    server, (attempt,) = sink.tree(trace)
    assert server.parent == caller
    assert seen["traceparent"] == f"00-{trace}-{attempt.id}-01"
    assert seen["tracestate"] == "vendor=x,other=y"


def test_an_invalid_parent_begins_a_trace_and_drops_its_state(
    traced: Gateway, sink: Collector, engines: tuple[Rehearsal, Rehearsal]
) -> None:
    bad = "00-00000000000000000000000000000000-00f067aa0ba902b7-01"
    answer = ask(traced, headers={"traceparent": bad, "tracestate": "vendor=x"})
    server, _ = sink.tree(answer.headers["x-trace-id"])
    assert server.parent == ""
    assert "tracestate" not in {name.lower() for name in engines[0].seen()["last_headers"]}


def test_a_caller_that_does_not_record_is_believed(traced: Gateway, sink: Collector, engines: tuple[Rehearsal, Rehearsal]) -> None:
    trace = os.urandom(16).hex()
    ask(traced, headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-00"})
    assert {name.lower(): value for name, value in engines[0].seen()["last_headers"].items()}["traceparent"].endswith("-00")
    sink.tree(ask(traced).headers["x-trace-id"])  # one that came later is there
    assert sink.of(trace) == []


def test_probes_leave_no_spans(traced: Gateway, sink: Collector) -> None:
    for path in ("/livez", "/readyz"):
        assert raw.call(traced.port, "GET", path).status == 200
    sink.tree(ask(traced).headers["x-trace-id"])
    assert not any(span.attributes.get("url.path") in ("/livez", "/readyz") for span in sink.spans)


def test_what_fails_or_is_slow_is_kept_though_it_was_not_chosen(
    engines: tuple[Rehearsal, Rehearsal], sink: Collector, tmp_path: Path
) -> None:
    config = configuration(engines[:1], sink.endpoint, sample_ratio=0, slow_s=0.3)
    with gateway(tmp_path, config, **FAST) as running:
        running.wait_all_hosts()
        fine = ask(running)
        broken = ask(running, "[[refuse 503]] kept")
        late = ask(running, "[[tokens 40]] [[pace 0.01]]")
        server, below = sink.tree(broken.headers["x-trace-id"])
        attempt = next(span for span in below if span.kind == "CLIENT")
        assert (server.failed, server.attributes["penstock.outcome"], attempt.attributes["error.type"]) == (
            True,
            "overloaded",
            "busy",
        )
        assert sink.tree(late.headers["x-trace-id"])[0].seconds >= 0.3
        assert sink.of(fine.headers["x-trace-id"]) == []


def test_half_of_them_is_half_of_them(engines: tuple[Rehearsal, Rehearsal], sink: Collector, tmp_path: Path) -> None:
    with gateway(tmp_path, configuration(engines[:1], sink.http_endpoint, sample_ratio=0.5, protocol="http/protobuf"), **FAST) as running:
        running.wait_all_hosts()
        traces = [ask(running).headers["x-trace-id"] for _ in range(120)]
        expected = {trace for trace in traces if int(trace[16:], 16) < 1 << 63}
        assert 30 < len(expected) < 90
        until("they are there, over HTTP", lambda: {trace for trace in traces if sink.of(trace)} == expected, 15, 0.1)


def test_the_standard_variables_are_enough(engines: tuple[Rehearsal, Rehearsal], sink: Collector, tmp_path: Path) -> None:
    config = {**configuration(engines[:1], sink.endpoint), "tracing": {}}
    env: dict[str, Any] = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": sink.endpoint,
        "OTEL_SERVICE_NAME": "by-name",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        **FAST,
    }
    with gateway(tmp_path, config, **env) as running:
        running.wait_all_hosts()
        trace = ask(running).headers["x-trace-id"]
        until("it is there", lambda: sink.of(trace, "by-name"), 15)


def test_content_leaves_only_when_it_is_asked_for(engines: tuple[Rehearsal, Rehearsal], sink: Collector, tmp_path: Path) -> None:
    with gateway(tmp_path, configuration(engines[:1], sink.endpoint, capture_content=True), **FAST) as running:
        running.wait_all_hosts()
        _, (attempt,) = sink.tree(ask(running, "a captured prompt").headers["x-trace-id"])
        assert json.loads(attempt.attributes["gen_ai.input.messages"]) == [{"role": "user", "content": "a captured prompt"}]
    assert not any(
        "a captured prompt" in json.dumps(span.attributes) for span in sink.spans if span is not attempt and span.id != attempt.id
    )


def test_a_collector_that_is_gone_slows_nothing_and_is_said_once(engines: tuple[Rehearsal, Rehearsal], tmp_path: Path) -> None:
    env: dict[str, Any] = {**FAST, "OTEL_BSP_MAX_QUEUE_SIZE": "20", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "10"}
    with gateway(tmp_path, configuration(engines[:1], "http://127.0.0.1:1"), **env) as running:
        running.wait_all_hosts()
        for _ in range(100):
            assert ask(running).status == 200

        def counted(result: str) -> float:
            lines = running.admin("/metrics").body.decode().splitlines()
            return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f'penstock_spans_total{{result="{result}"}}'))

        until("it is counted", lambda: counted("dropped") > 0 and counted("failed") > 0, 20, 0.2)
        assert running.output().count("traces cannot be sent to") == 1
        stopped = time.monotonic()
    assert time.monotonic() - stopped < 10, "and does not keep it from stopping"


def test_every_attribute_is_in_the_documents(traced: Gateway, sink: Collector) -> None:
    from gateway.telemetry.tracer import ATTRIBUTES

    sink.tree(ask(traced, n=2, stream=True, top_p=0.5, presence_penalty=1).headers["x-trace-id"])
    said = {name for span in sink.spans if span.service == "penstock" for name in span.attributes}
    assert len(said) > 20
    assert said <= set(ATTRIBUTES)


def test_no_secret_is_in_a_span(traced: Gateway, sink: Collector) -> None:
    ask(traced, "the words of a prompt", stream=True)
    sink.tree(ask(traced).headers["x-trace-id"])
    text = json.dumps([span.attributes for span in sink.spans])
    assert "sk-trace-secret" not in text
    assert "the words of a prompt" not in text
