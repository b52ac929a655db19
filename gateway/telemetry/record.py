"""One record per request: what the log line, and later spans, metrics and the ledger, are all rendered from."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from gateway.errors import Headers
from gateway.plugin import Call, Usage
from gateway.serving.calls import SHAPES
from gateway.wire.asgi import Scope, header
from gateway.wire.error import Shape
from gateway.wire.trace import Trace, new_span

KEY = "penstock.record"
# An id a client may choose: long enough for a trace id or a ULID, nothing that could break a log line or a header.
_SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:")
_MAX_ID = 128


# What a request's time goes by, one after the other, each moment in one of them, so that they add up to the whole.
PHASES = ("read", "limits", "queue", "retry", "connect", "first_token", "generate", "client")
READ, LIMITS, QUEUE, RETRY, CONNECT, FIRST_TOKEN, GENERATE, CLIENT = range(len(PHASES))


class Attempt:
    """One attempt: on which target, under which span, when (monotonic seconds; 0 is not reached), and how it ended ("ok" or the cause)."""

    __slots__ = ("connected_at", "considered", "ended_at", "first_at", "result", "span", "started_at", "target")

    def __init__(self, target: str, span: str, started_at: float) -> None:
        self.target = target
        self.span = span
        self.started_at = started_at
        self.connected_at = 0.0
        self.first_at = 0.0
        self.ended_at = 0.0
        self.result = "ok"
        # Every host there was, and how it stood when this one was picked.
        self.considered: Sequence[tuple[str, str]] = ()


class Record:
    """Timestamps (monotonic seconds) and counts of one request, from its first byte to the end of its body."""

    __slots__ = (
        "attempts",
        "call",
        "call_id",
        "caller",
        "client",
        "continuations",
        "delivered",
        "ended_at",
        "events",
        "finishes",
        "first_event_at",
        "headers",
        "held",
        "key",
        "largest_gap_s",
        "mark",
        "method",
        "model",
        "outcome",
        "path",
        "phase",
        "phases",
        "request_id",
        "route",
        "served",
        "shape",
        "span",
        "started_at",
        "status",
        "stream",
        "target",
        "target_sent",
        "trace",
        "tried",
        "usage",
    )

    def __init__(self, scope: Scope, sampling: int = 0) -> None:
        self.request_id = request_id(scope)
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        # As it was sent: a decoded path may hold line ends.
        self.target_sent: str = scope["raw_path"].decode("latin-1")
        self.client: str = scope["client"][0] if scope.get("client") else ""
        self.shape = SHAPES.get(self.path, Shape.OPENAI)
        self.trace = Trace(header(scope, b"traceparent"), header(scope, b"tracestate"), sampling)
        # Our own span, under which attempts lie.
        self.span = new_span()
        self.started_at = self.mark = time.monotonic()
        # Seconds spent in each of PHASES, and the present one, which began at `mark`.
        self.phases = [0.0] * len(PHASES)
        self.phase = READ
        # Of a stream: blocks of events that were sent, and the longest time the engine took for the next.
        self.events = 0
        self.largest_gap_s = 0.0
        self.first_event_at = 0.0
        self.ended_at = 0.0
        # Path of the route that answers, and the model's name: only such as we know, so that they may be labels.
        self.route = ""
        self.served = ""
        self.call_id = ""
        self.model = ""
        self.key = ""
        # Whose key it is (`keys.Caller`), and what the request holds while it is answered (`admission.Held`).
        self.caller: Any = None
        self.held: Any = None
        # What every answer to this request carries beside its own headers.
        self.headers: Headers = []
        self.stream = False
        self.target = ""
        self.attempts = 0
        self.continuations = 0
        self.tried: list[Attempt] = []
        # The call itself, and why its choices ended, as the engine said.
        self.call: Call | None = None
        self.finishes: Sequence[str] = ()
        self.status = 0
        self.outcome = ""
        self.usage: Usage | None = None
        # Completion tokens that reached the client.
        self.delivered = 0

    @staticmethod
    def of(scope: Scope) -> Record:
        """The record that the outermost middleware put into this scope."""
        found: Record = scope[KEY]
        return found

    def enter(self, phase: int, now: float | None = None) -> float:
        """Another phase begins; the time."""
        now = time.monotonic() if now is None else now
        self.phases[self.phase] += now - self.mark
        self.phase, self.mark = phase, now
        return now


def request_id(scope: Scope) -> str:
    """The client's own `x-request-id` where it is sane, else a new one. Echoed and searchable, never trusted."""
    sent = header(scope, b"x-request-id")
    if sent and len(sent) <= _MAX_ID:
        text = sent.decode("latin-1")
        if _SAFE.issuperset(text):
            return text
    return new_request_id()


def new_request_id() -> str:
    """`req_` and 32 hex digits."""
    return f"req_{os.urandom(16).hex()}"
