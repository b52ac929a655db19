"""One record per request: what the log line, spans, metrics, the ledger and `explain` are all rendered from.

Data goes down the path and never back up: each part of the record is written at one place, named beside it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from gateway.access.limits.rules import Limit, State
from gateway.errors import ClientGone, GatewayError, Headers
from gateway.plugin import AttemptFailed, Call, Reply, Usage, Verdict
from gateway.serving.balance.affinity import UNBOUND, Affinity
from gateway.serving.balance.cached import Placement
from gateway.serving.balance.hosts import Host, Standing
from gateway.serving.balance.queue import Ticket
from gateway.serving.calls import SHAPES
from gateway.serving.kept import Kept
from gateway.wire.asgi import Scope, header
from gateway.wire.error import Shape
from gateway.wire.trace import Trace, new_id, new_span

KEY = "penstock.record"
# An id a client may choose: long enough for a trace id or a ULID, nothing that could break a log line or a header.
_SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:")
MAX_ID = 128
# Of what a client wrote so much is kept: in the log, the ring, spans, errors and Redis, which are bounded by this.
MAX_MODEL = 256
MAX_URL = 2048

# Paths of what asks whether we live, again and again: no line in the log, no span.
PROBES = frozenset({"/livez", "/readyz"})

# What a request's time goes by, one after the other, each moment in one of them, so that they add up to the whole.
PHASES = ("read", "limits", "queue", "retry", "connect", "first_token", "generate", "answer", "client")
# Their numbers; Final, so that compiled code does not look them up.
READ: Final = 0
LIMITS: Final = 1
QUEUE: Final = 2
RETRY: Final = 3
CONNECT: Final = 4
FIRST_TOKEN: Final = 5
GENERATE: Final = 6
ANSWER: Final = 7
CLIENT: Final = 8

# How a request ended, in the words that the log, metrics, spans, the ledger and `explain` share; docs/observability.md shows this table.
OUTCOMES = {
    "ok": "answered whole",
    "client_gone": "the client left before its answer was whole",
    "unauthorized": "no key, or none that is known",
    "refused": "the client's own fault: it is told what to mend",
    "limited": "a limit or budget of its key or model",
    "overloaded": "every engine was full, and the queue or its patience too",
    "unavailable": "no engine could be asked",
    "timeout": "an engine was silent for too long",
    "engine_error": "an engine failed, and no other could help",
    "cut": "an answer that had begun broke off",
    "shutdown": "it was still open when the gateway had to end",
    "internal_error": "a fault of the gateway's own",
}
_REFUSED = frozenset(["unauthorized", "refused", "limited"])
_BY_STATUS = {401: "unauthorized", 429: "limited", 502: "engine_error", 503: "unavailable", 504: "timeout"}
# Attempts after which an engine has done nothing for the request.
_NOTHING_DONE = frozenset(["connect", "busy", "refused"])


class Prefill:
    """The other half of an attempt at a pair: the host that computes the prompt, under a span of its own."""

    __slots__ = ("_give_back", "ended_at", "host", "result", "span", "started_at", "target")

    def __init__(self, host: Host, give_back: Callable[[Host, Verdict | None, str], None], now: float) -> None:
        self._give_back = give_back
        # Until it has done its part.
        self.host: Host | None = host
        self.target = host.target.id
        self.span = new_span()
        self.started_at = now
        self.ended_at = 0.0
        self.result = "ok"

    def done(self) -> None:
        """The prompt is computed, and the decode host has it."""
        self.end(Verdict.OK)

    def end(self, verdict: Verdict | None, cause: str = "ok", why: str = "") -> None:
        """As an attempt's."""
        host, self.host = self.host, None
        if host is not None:
            self.result, self.ended_at = cause, time.monotonic()
            host.last_event_at = self.ended_at
            nobody = "" if cause != "connect" else why.removeprefix("connect: ") or "no connection"
            self._give_back(host, verdict, nobody)


class Attempt:
    """One attempt at one host: on which target, under which span, when (monotonic seconds; 0 is not reached), and how it ended.

    It holds the host's place and the reply until `end`, which alone writes what became of it, here, at the host and in the record.
    """

    __slots__ = (
        "_give_back", "_record", "connected_at", "considered", "continues", "ended_at", "ended_empty", "first_at", "held", "host",
        "placement", "prefill", "reply", "result", "span", "started_at", "target", "weights",
    )  # fmt: skip

    def __init__(
        self,
        record: Record,
        host: Host | None,
        give_back: Callable[[Host, Verdict | None, str], None],
        target: str,
        weights: str,
        continues: bool,
        now: float,
    ) -> None:
        # Let go of at the end: a record that is kept must not be held by itself.
        self._record: Record | None = record
        self._give_back = give_back
        # None where only closing words are missing, which take no host.
        self.host = host
        # The target's id and what it serves now; when the answer ends it may be gone, or serve something else.
        self.target = target
        self.weights = weights
        # Whether it goes on with an answer that broke off elsewhere.
        self.continues = continues
        self.span = new_span()
        self.started_at = now
        self.connected_at = 0.0
        self.first_at = 0.0
        self.ended_at = 0.0
        # "ok", or the cause of its end.
        self.result = "ok"
        # Every host there was, and how it stood when this one was picked.
        self.considered: Sequence[Standing] = ()
        # What the host was expected to have in its cache, and what it had; where the model's policy asks.
        self.placement: Placement | None = None
        self.reply: Reply | None = None
        # Of a stream, what was read of it before it was sure that it is to be relayed, and whether that is all of it, and says nothing.
        self.held = b""
        self.ended_empty = False
        # Of a pair, this being the half that decodes.
        self.prefill: Prefill | None = None

    @property
    def cause(self) -> str:
        """What ended it, in whichever half."""
        prefill = self.prefill
        return self.result if prefill is None or prefill.result == "ok" or self.result != "given up" else prefill.result

    def begun(self) -> None:
        """The answer has begun: what the attempt took was no retry, but connecting, and waiting for the first event; or for the whole of a
        JSON answer, of which nobody can say when its first token was there."""
        record, reply = self._record, self.reply
        assert record is not None
        assert reply is not None
        now = time.monotonic()
        self.connected_at = reply.connected_at or self.started_at
        self.first_at = now
        record.phase = CONNECT
        stream = record.stream
        record.enter(FIRST_TOKEN if stream else ANSWER, self.connected_at)
        record.enter(GENERATE if stream else CLIENT, now)
        if not record.first_event_at:
            record.first_event_at = now
        if self.placement is not None:
            self.placement.begun()

    def end(self, verdict: Verdict | None, cause: str = "ok", why: str = "") -> None:
        """Close the reply, give the host's place back with what this end says of it (None: nothing), and note it all. `why`: the cause in
        words, where there is more to say. Idempotent."""
        reply, host, record = self.reply, self.host, self._record
        self.reply = self.host = self._record = None
        if record is None:
            return
        usage: Usage | None = None
        prefill = self.prefill
        if prefill is not None:
            prefill.end(*((Verdict.OK, "ok") if self.first_at else (None, "given up")))
        if reply is not None:
            usage = reply.close()
            if usage is not None:
                record.usage = usage
            record.finishes = reply.finishes or record.finishes
            if reply.late is not None:
                record.late.append(reply.late)
            self.result = cause
            self.ended_at = time.monotonic()
            if (cause if prefill is None else self.cause) not in _NOTHING_DONE:
                record.prefilled = True
        if self.placement is not None:
            self._learn(self.placement, record, usage)
        if host is not None:
            nobody = "" if cause != "connect" else why.removeprefix("connect: ") or "no connection"
            self._give_back(host, verdict, nobody)

    def _learn(self, placement: Placement, record: Record, usage: Usage | None) -> None:
        """Engines count several choices, and an answer that goes on, in ways of their own."""
        call = record.call
        if not self.first_at:
            placement.failed()
        elif usage is None or usage.estimated or self.continues or call is None or call.choices > 1:
            placement.given_up()
        else:
            placement.ended(usage.prompt_tokens, usage.cached_tokens)


class Record:
    """One request, from its first byte to the end of its body; times are monotonic seconds."""

    __slots__ = (
        "affinity", "answer", "attempts", "call", "call_id", "caller", "client", "continuations", "cost", "delivered", "ended_at",
        "error", "events", "finishes", "first_event_at", "headers", "ignored", "key", "largest_gap_s", "late", "limits", "mark",
        "method", "model", "outcome", "path", "phase", "phases", "point", "prefilled", "reask_result", "reasked", "refused_by",
        "request_id", "route", "sampled", "served", "settling", "shape", "span", "started_at", "status", "stream", "ticket", "trace",
        "url", "usage", "wasted", "why",
    )  # fmt: skip

    def __init__(self, scope: Scope, sampling: int = 0) -> None:
        # By whoever makes it.
        self.request_id = request_id(scope)
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        # As it was sent: a decoded path may hold line ends.
        self.url: str = scope["raw_path"][:MAX_URL].decode("latin-1")
        client = scope.get("client")
        self.client: str = client[0] if client else ""
        shape = SHAPES.get(self.path)
        self.shape = shape if shape is not None else _family(scope)
        self.trace = Trace(header(scope, b"traceparent"), header(scope, b"tracestate"), sampling)
        # Our own span, under which attempts lie.
        self.span = new_span()
        self.started_at = self.mark = time.monotonic()
        # Seconds spent in each of PHASES, and the present one, which began at `mark`. By `enter`, and by the relay, which tells the
        # engine's time from the client's.
        self.phases = [0.0] * len(PHASES)
        self.phase = READ
        # By middleware/request_id: what the client was answered, and when the last byte had left.
        self.status = 0
        self.ended_at = 0.0
        # By middleware/auth: whose key it is (`keys.Caller`), and its name.
        self.caller: Any = None
        self.key = ""
        # By routes: the path of the route that answers; only such as we know, so that it may be a label.
        self.route = ""
        # By `asks`: the call, until the request was observed (a record outlives its answer, a prompt must not), and of it what is kept.
        self.call: Call | None = None
        self.call_id = ""
        self.model = ""
        self.stream = False
        # By exchange: the model's name where we serve it, so that it may be a label.
        self.served = ""
        # By `bound_by`: in a word, what binds it to a host, and where that lies on the ring. By exchange, names of what would have, if it
        # were a session's.
        self.affinity = ""
        self.point: int | None = None
        self.ignored: list[str] = []
        # What every answer says: by exchange of a parameter that was probably meant otherwise, by middleware/rate_limit of its limits.
        self.headers: Headers = []
        # By middleware/rate_limit: its limits, what it asked of each and how that stood then, and which of them was in its way; and at
        # its settlement what it costs and how many completion tokens reached the client; while that waits for an engine's word, a task.
        self.limits: Sequence[tuple[Limit, float, State]] = ()
        self.refused_by: Limit | None = None
        self.cost = 0.0
        self.delivered = 0
        self.settling: asyncio.Task[None] | None = None
        # By dispatch: every attempt, and how often an answer that had begun went on elsewhere. What became of each attempt, and what the
        # answer used, by `Attempt.end`.
        self.attempts: list[Attempt] = []
        # Its place in the queue, of those that had to wait for a host: the last one, if it waited several times.
        self.ticket: Ticket | None = None
        self.continuations = 0
        self.usage: Usage | None = None
        self.finishes: Sequence[str] = ()
        self.late: list[asyncio.Future[Usage | None]] = []
        # Whether an engine has worked on the prompt, as far as is known.
        self.prefilled = False
        self.first_event_at = 0.0
        # By relay, of a stream: blocks of events that were sent, and the longest time the engine took for the next.
        self.events = 0
        self.largest_gap_s = 0.0
        # By exchange: whether the answer is to be judged; and by relay what the client was given of it, until the request was observed.
        self.sampled = False
        self.answer: bytes | Kept | None = None
        # By dispatch, of an answer that was asked once more of another host: what was wrong with it, and what became of that; and what the
        # first one had used, which reached nobody.
        self.reasked = self.reask_result = ""
        self.wasted: Usage | None = None
        # By `end`: one of OUTCOMES, the error's own code, and in words what people should know of it (never what a client has sent).
        self.outcome = ""
        self.error = ""
        self.why = ""

    @staticmethod
    def of(scope: Scope) -> Record:
        """The record that the outermost middleware put into this scope."""
        found: Record = scope[KEY]
        return found

    def asks(self, call: Call) -> None:
        """What the request is for, once its body was read."""
        self.call = call
        self.call_id, self.stream = call.id, call.stream
        model = call.model
        self.model = model if len(model) <= MAX_MODEL else model[: MAX_MODEL - 3] + "..."

    def bound_by(self, bound: Affinity) -> None:
        """What binds it to a host."""
        self.affinity = bound.source
        if bound is not UNBOUND:
            self.point = bound.point
        self.headers.append((b"x-penstock-affinity", bound.source.encode()))

    def enter(self, phase: int, now: float = 0.0) -> float:
        """Another phase begins; the time."""
        if not now:
            now = time.monotonic()
        self.phases[self.phase] += now - self.mark
        self.phase, self.mark = phase, now
        return now

    def end(self, error: BaseException | None) -> None:
        """How it ended; the first word counts, since what comes after an end is only its consequence."""
        if not self.outcome:
            self.outcome, self.error, self.why = _outcome(error, self.first_event_at > 0)

    @property
    def target(self) -> str:
        """The host that answered, or was asked last."""
        return self.attempts[-1].target if self.attempts else ""

    @property
    def client_gone(self) -> bool:
        """Whether its client left before its answer was whole."""
        return self.outcome == "client_gone"

    @property
    def refused(self) -> bool:
        """Whether it was the client's own fault, or its limits'."""
        return self.outcome in _REFUSED

    @property
    def failed(self) -> bool:
        """Whether somebody else than the client is to blame."""
        return not (self.outcome == "ok" or self.outcome == "client_gone" or self.outcome in _REFUSED)

    @property
    def ending(self) -> str:
        """The outcome in one of four words, where many series would be too many: ok, client_gone, refused or failed."""
        return ending_of(self.outcome)


def ending_of(outcome: str) -> str:
    """See `Record.ending`."""
    if outcome == "ok" or outcome == "client_gone":
        return outcome
    return "refused" if outcome in _REFUSED else "failed"


def _outcome(error: BaseException | None, begun: bool) -> tuple[str, str, str]:
    """One of OUTCOMES, the error's own code, and why."""
    if error is None:
        return "ok", "", ""
    if isinstance(error, ClientGone):
        return "client_gone", "", ""
    if isinstance(error, asyncio.CancelledError):
        return "shutdown", "", ""
    if isinstance(error, AttemptFailed):
        if begun:
            return ("timeout" if error.cause == "timeout" else "cut"), error.cause, str(error)
        error = error.error
    if not isinstance(error, GatewayError):
        return "internal_error", type(error).__name__, f"{type(error).__name__}, see the log"
    code = error.code or ""
    if code == "engine_overloaded":
        return "overloaded", code, error.detail or error.message
    outcome = _BY_STATUS.get(error.status, "refused" if error.status < 500 else "internal_error")
    # What is said of a client's own fault may quote what it has sent.
    return outcome, code, error.detail or ("" if outcome == "refused" else error.message)


def _family(scope: Scope) -> Shape:
    """In whose words a path is answered that is nobody's own: Anthropic's for who speaks so."""
    anthropic = scope["path"].startswith("/v1/messages/") or header(scope, b"anthropic-version") is not None
    return Shape.ANTHROPIC if anthropic else Shape.OPENAI


def request_id(scope: Scope) -> str:
    """The client's own `x-request-id` where it is sane, else a new one. Echoed and searchable, never trusted."""
    sent = header(scope, b"x-request-id")
    if sent and len(sent) <= MAX_ID:
        text = sent.decode("latin-1")
        if _SAFE.issuperset(text):
            return text
    return new_request_id()


def new_request_id() -> str:
    """`req_` and 32 hex digits."""
    return f"req_{new_id()}"
