"""What telemetry costs a request, in microseconds of CPU: metrics, tracing sampled out, recorded, and with export. `make bench`."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.peers import machine
from gateway.config import Tracing
from gateway.plugin import Endpoint, Reply, Usage, Verdict
from gateway.serving import calls
from gateway.telemetry import tracer as telemetry
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.record import CLIENT, QUEUE, RETRY, Attempt, Record
from tests.support.otlp import collector

REQUESTS, ROUNDS = 2000, 7
CHAT = "/v1/chat/completions"
SCOPE = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "headers": [], "client": ("127.0.0.1", 1)}
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 64, "temperature": 0.5}).encode()


def record(sampling: int) -> Record:
    """A stream that has ended, one attempt."""
    made = Record(dict(SCOPE), sampling)
    made.asks(calls.parse(Endpoint.CHAT, BODY))
    made.route, made.served, made.stream, made.status = CHAT, "m", True, 200
    made.enter(QUEUE)
    attempt = Attempt(made, None, lambda host, verdict, connected: None, "10.0.0.1:30000", "w", False, made.enter(RETRY))
    made.attempts.append(attempt)
    attempt.reply = Reply()
    attempt.begun()
    made.usage, made.events, made.largest_gap_s = Usage(12, 64), 64, 0.01
    attempt.end(Verdict.OK)
    made.end(None)
    made.ended_at = made.enter(CLIENT)
    return made


def cpu_us(made: list[Record], work: Callable[[Record], Any], clock: Callable[[], float], after: Callable[[], Any]) -> float:
    gc.collect()
    gc.disable()
    started = clock()
    for one in made:
        work(one)
    after()
    took = clock() - started
    gc.enable()
    return took / len(made) * 1e6


def main() -> None:
    found: dict[str, list[float]] = {"metrics": [], "sampled out": [], "recorded": [], "recorded and exported": []}
    with collector() as sink:
        tracer = telemetry.Tracer(Tracing(otlp_endpoint=sink.endpoint), Metrics())
        counts = Metrics()
        flush = tracer._processor.force_flush
        for _ in range(ROUNDS):
            nothing = lambda: None  # noqa: E731
            out, chosen = [record(0) for _ in range(REQUESTS)], [record(1 << 64) for _ in range(REQUESTS)]
            found["metrics"].append(cpu_us(out, counts.request, time.thread_time, nothing))
            found["sampled out"].append(cpu_us(out, tracer.finish, time.thread_time, nothing))
            flush()
            # On the request's own path: this thread's time. With the export: that of the whole process, the collector's share included.
            found["recorded"].append(cpu_us(chosen[:1000], tracer.finish, time.thread_time, nothing))
            flush()
            found["recorded and exported"].append(cpu_us(chosen[1000:], tracer.finish, time.process_time, flush))
        tracer.close()
    rows = {name: round(statistics.median(values), 1) for name, values in found.items()}
    for name, value in rows.items():
        print(f"{name:<24}{value:>8} us")
    result = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "command": "make bench", "machine": machine(), "cpu_us_per_request": rows}
    (Path(__file__).parent / "results" / "telemetry.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
