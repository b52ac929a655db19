"""The attempt loop: a place at a host, one attempt, and either an answer that has begun or an honest word why not.

Until an answer has begun (the commit point) nothing has reached the client, and another host may be tried: each once, within the
request's deadline, and where the first host has worked on the prompt already, within the retry budget. After it an answer that breaks may
be continued elsewhere, where the backend finds that sound.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from gateway.access.admission import Admission
from gateway.config import Settings
from gateway.errors import GatewayError, GatewayTimeout, Unavailable
from gateway.plugin import AttemptFailed, Call, Reply, Target, Usage, Verdict
from gateway.serving import calls
from gateway.serving.balance.hosts import Host, NoHost
from gateway.serving.balance.policies import First
from gateway.serving.registry import Registry, Served
from gateway.telemetry.record import CONNECT, FIRST_TOKEN, GENERATE, LIMITS, QUEUE, RETRY, Record
from gateway.telemetry.record import Attempt as Tried
from gateway.wire.trace import new_span

log = logging.getLogger("penstock.dispatch")

# A prompt is prefilled at least so fast; what it needs beyond `first_token_s` is granted.
PREFILL_TOKENS_PER_S = 1000.0
# While every other host is full a slow one is looked at again after so long.
PATIENCE_S = 1.0
# For asking whether there is anybody, without taking a turn in the model's own policy.
_ANY = First()
# Causes of failures after which the host has not worked on the prompt: trying another one repeats nothing.
_NOTHING_DONE = frozenset(["connect", "busy"])


class Attempt:
    """An answer that has begun, and the place it holds until `end`."""

    __slots__ = ("host", "place", "reply", "served")

    def __init__(self, served: Served, host: Host | None, place: tuple[str, str], reply: Reply) -> None:
        self.served = served
        self.host = host
        # The target's id and what it served when the answer began; later it may be gone, or be another.
        self.place = place
        self.reply = reply

    def end(self, verdict: Verdict | None) -> None:
        """Give the place back, with what the answer's end says of its host (None: nothing). Idempotent."""
        host, self.host = self.host, None
        self.reply.close()
        if host is not None:
            self.served.pool.end(host, verdict)


class _Stall:
    """Ends an attempt that has no first event in time, unless nobody else could do better: then it is looked at again and again."""

    def __init__(self, limit_s: float, others_are_full: Callable[[], bool]) -> None:
        self._limit_s = limit_s
        self._others_are_full = others_are_full
        self._scope = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        await self._scope.__aenter__()
        self._timer = asyncio.get_running_loop().call_later(self._limit_s, self._look)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._scope.__aexit__(kind, error, trace)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        if self._others_are_full():
            self._timer = loop.call_later(PATIENCE_S, self._look)
        else:
            self._scope.reschedule(loop.time())


class Dispatcher:
    """Owns the commit point."""

    def __init__(self, registry: Registry, settings: Settings, admission: Admission) -> None:
        self._registry = registry
        self._admission = admission
        self._timeouts = settings.timeouts
        self._retry = settings.retry

    async def send(self, call: Call, record: Record) -> Attempt:
        """An answer that has begun (first event or whole body); raises GatewayError."""
        served = self._registry.serving(call.model, call.endpoint, record.caller.models)
        record.served = call.model
        record.call = call
        calls.limit(call, served.entry.default_max_tokens)
        record.enter(LIMITS)
        await self._admission.admit(call, served.name, record)
        call.connect_s = self._timeouts.connect_s
        pool = served.pool
        mode = served.entry.continuation
        if mode != "off" and call.stream and self._retry.max_continuations > 0 and pool.backend.resumable(call):
            call.keep = mode
        pool.budget.deposit(call.prompt_tokens, time.monotonic())
        try:
            async with asyncio.timeout(self._timeouts.request_s):
                return await self._attempts(served, call, record, set(), free=False)
        except TimeoutError:
            phase = "its first token" if call.stream else "its answer"
            raise GatewayTimeout(f"The engine did not send {phase} within {self._timeouts.request_s:g} s.") from None

    async def _attempts(self, served: Served, call: Call, record: Record, tried: set[str], free: bool) -> Attempt:
        """Try hosts until one has begun to answer. `free`: retries are not charged to the budget."""
        pool, last = served.pool, None
        key = calls.leading(call) if served.entry.balance == "prefix_affinity" else b""
        while True:
            record.enter(QUEUE)
            host = await pool.place(served.policy, key, tried, record.caller, self._timeouts.queue_s)
            if not isinstance(host, Host):
                raise not_ready(pool.waiting_for()) if last is None else _exhausted(last.error, record.attempts) from last
            charged = last is not None and not free and last.cause not in _NOTHING_DONE
            if last is not None and charged and not pool.budget.withdraw(call.prompt_tokens, time.monotonic()):
                pool.end(host, None)
                log.warning("%s: the retry budget is spent", record.request_id)
                raise _exhausted(last.error, 2) from last
            tried.add(host.target.id)
            place = host.target.id, host.target.weights
            record.target = host.target.id
            record.attempts += 1
            attempt = Tried(host.target.id, new_span(), record.enter(RETRY))
            attempt.considered = pool.considered(host)
            record.tried.append(attempt)
            call.headers = record.trace.headers(attempt.span)
            try:
                reply = await self._attempt(served, host, call, tried)
            except AttemptFailed as failure:
                last = failure
                verdict = pool.backend.classify(failure)
                attempt.result, attempt.ended_at = failure.cause, time.monotonic()
                pool.end(host, verdict, connected=failure.cause != "connect")
                if verdict is Verdict.CLIENT_FAULT:
                    raise failure.error from failure
                log.warning("attempt %d of %s on %s: %s", record.attempts, record.request_id, host.target.id, failure)
            except BaseException as error:
                attempt.result, attempt.ended_at = type(error).__name__, time.monotonic()
                pool.end(host, None)
                raise
            else:
                _begun(record, attempt, reply)
                return Attempt(served, host, place, reply)

    async def _attempt(self, served: Served, host: Host, call: Call, tried: set[str]) -> Reply:
        if not call.stream:
            return await served.pool.backend.send(host.target.id, call)
        limit_s = self._timeouts.first_token_s + call.prompt_tokens / PREFILL_TOKENS_PER_S
        stall = _Stall(limit_s, lambda: served.pool.choose(_ANY, b"", tried) is NoHost.FULL)
        try:
            async with stall:
                return await served.pool.backend.send(host.target.id, call)
        except TimeoutError:
            error = GatewayTimeout(f"The engine did not send its first token within {limit_s:.0f} s.", detail=host.target.id)
            raise AttemptFailed("timeout", error) from None

    async def resume(self, broken: Attempt, call: Call, delivered: bytes, usage: Usage | None, record: Record) -> Attempt | None:
        """Another host's continuation of an answer to `call` that broke off after `delivered`; None where there is none to be had."""
        served = broken.served
        pool = served.pool
        if not call.keep or record.continuations >= self._retry.max_continuations:
            return None
        again = pool.backend.resume(call, delivered, None if usage is None or usage.estimated else usage)
        if again is None:
            return None
        record.continuations += 1
        if isinstance(again, Reply):
            return Attempt(served, None, broken.place, again)
        dead, weights = broken.place
        if not weights:
            return None
        # Nobody who serves something else, or of whom that is not known.
        others = {host.target.id for host in pool.hosts if host.target.id == dead or host.target.weights != weights}
        try:
            async with asyncio.timeout(self._timeouts.request_s):
                return await self._attempts(served, again, record, others, free=True)
        except (GatewayError, TimeoutError) as error:
            log.warning("%s cannot be continued: %s", record.request_id, error)
            return None


def _begun(record: Record, attempt: Tried, reply: Reply) -> None:
    """An answer has begun: what its attempt took was no retry, but connecting, and waiting for the first event (or the whole body)."""
    now = time.monotonic()
    attempt.connected_at = reply.connected_at or attempt.started_at
    attempt.first_at = now
    record.phase = CONNECT
    record.enter(FIRST_TOKEN, attempt.connected_at)
    record.enter(GENERATE, now)


def not_ready(target: Target | None) -> GatewayError:
    """Why nothing can be served yet, in the target's own words, and when to ask again."""
    if target is None:
        return Unavailable("No engine is configured for this model.", code="engine_unavailable")
    if target.ready:
        return Unavailable("No engine is well enough to be asked.", code="engine_unavailable", retry_after_s=target.retry_after_s)
    return Unavailable(target.reason or "The engine is not ready.", code="engine_unavailable", retry_after_s=target.retry_after_s)


def _exhausted(error: GatewayError, attempts: int) -> GatewayError:
    """The last error; once several targets were tried the client's own retries would only multiply the attempts."""
    if attempts > 1:
        error.should_retry = False
    return error
