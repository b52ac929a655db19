"""The attempt loop: a place at a host, one attempt, and either an answer that has begun or an honest word why not.

Until an answer has begun (the commit point) nothing has reached the client, and another host may be tried: each once, within the
request's deadline, and within the retry budget where the first host was there at all. After it an answer that breaks may be continued
elsewhere, where the backend finds that sound.
"""

from __future__ import annotations

import asyncio
import logging
import time

from gateway.access.keys import Caller
from gateway.config import Settings
from gateway.errors import GatewayError, GatewayTimeout, Headers, Unavailable
from gateway.plugin import BOUNDS, AttemptFailed, Call, Reply, Target, Terms, Verdict
from gateway.sentinel import reask
from gateway.serving.balance.affinity import UNBOUND, Affinity
from gateway.serving.balance.hosts import BUSY_S, Host, NoHost
from gateway.serving.balance.policies import First
from gateway.serving.balance.queue import Ticket
from gateway.serving.patience import heed
from gateway.serving.pool import Pair, Pool
from gateway.serving.registry import Served
from gateway.serving.watch import Watch
from gateway.telemetry.log import about
from gateway.telemetry.record import QUEUE, RETRY, Attempt, Prefill, Record

log = logging.getLogger("penstock.dispatch")

# A prompt is prefilled at least so fast; what it needs beyond `first_token_s` is granted.
PREFILL_TOKENS_PER_S = 1000.0
# For asking whether there is anybody, without taking a turn in the model's own policy.
_ANY = First()
# When to come again, at the soonest, where every host that could be asked was busy: twice as long as they are left alone.
BUSY_AGAIN_S = 2 * BUSY_S


class Exchange:
    """One request on its way through the attempts: what is asked, what binds it, on which terms, who serves it, who may end it, and the
    headers that it came with."""

    __slots__ = ("bound", "call", "headers", "record", "served", "terms", "tried", "watch")

    def __init__(self, call: Call, bound: Affinity, terms: Terms, served: Served, record: Record, watch: Watch, headers: Headers) -> None:
        self.headers = headers
        self.call = call
        self.bound = bound
        self.terms = terms
        self.served = served
        self.record = record
        self.watch = watch
        # Ids of targets that are out of the question.
        self.tried: set[str] = set()

    def ticket(self, now: float, wait_s: float) -> Ticket:
        """For the queue, if it has to wait: as its key's class and weight say, and for no longer than its client waits."""
        record = self.record
        caller: Caller = record.caller
        team = caller.team
        name, weight = (team.name, team.weight) if team is not None else ("", 1.0)
        ticket = record.ticket = Ticket(caller.priority, caller.name, now + wait_s, now, caller.weight, name, weight)
        if not record.first_event_at:  # else its client has begun to read, and waits for the next event
            heed(ticket, self.headers, record.started_at)
        return ticket

    def others_are_full(self) -> bool:
        """Whether nobody else could take it now, though they would."""
        pool = self.served.pool
        choose = pool.choose_pair if pool.paired and self.call.endpoint in BOUNDS else pool.choose
        return choose(_ANY, UNBOUND, self.tried) is NoHost.FULL


class Dispatcher:
    """Owns the commit point."""

    def __init__(self, settings: Settings) -> None:
        self._timeouts = settings.timeouts
        self._retry = settings.retry
        # Which answers are asked for once more.
        self._reask = frozenset(settings.sentinel.reask)

    async def begin(self, exchange: Exchange, last: AttemptFailed | None = None) -> Attempt:
        """An answer that has begun (first event or whole body); raises GatewayError. `last`: what the attempt before it has ended with, of
        which nothing has reached the client."""
        now = time.monotonic()
        if last is None:
            exchange.served.pool.budget.deposit(exchange.terms.prompt_tokens, now)
        exchange.watch.begin_by(now + self._timeouts.request_s)
        try:
            attempt = await self._attempts(exchange, exchange.call, False, self._timeouts.queue_s, last)
            if self._reask and (wrong := self._wrong(exchange, attempt)):
                attempt = await self._again(exchange, attempt, wrong)
        except asyncio.CancelledError:
            if not exchange.watch.was_too_late():
                raise
            phase = "its first token" if exchange.call.stream else "its answer"
            raise GatewayTimeout(f"The engine did not send {phase} within {self._timeouts.request_s:g} s.") from None
        exchange.watch.begun()
        return attempt

    def _wrong(self, exchange: Exchange, attempt: Attempt) -> str:
        """What is wrong with an answer of which nothing has left yet."""
        call, reply = exchange.call, attempt.reply
        assert reply is not None
        if exchange.record.status or (call.stream and not attempt.ended_empty):
            return ""
        answer = attempt.held if call.stream else reply.body
        return reask.wrong(self._reask, call, answer, call.stream, exchange.served.pool.backend.markup)

    async def _again(self, exchange: Exchange, first: Attempt, wrong: str) -> Attempt:
        """Another host's answer in place of one that is bad; that one again where no other is well and free, the budget is spent, or nobody
        answers. Never more than once."""
        record, pool, now = exchange.record, exchange.served.pool, time.monotonic()
        record.reasked = wrong
        if first.prefill is not None:  # which is not to blame
            exchange.tried.discard(first.prefill.target)
        if not pool.has_another(exchange.tried, exchange.call.endpoint in BOUNDS):
            record.reask_result = "no_host"
            return first
        if not pool.budget.withdraw(exchange.terms.prompt_tokens, now):
            record.reask_result = "no_budget"
            return first
        begun_at, record.first_event_at = record.first_event_at, 0.0
        try:
            second = await self._attempts(exchange, exchange.call, False, 0.0)
        except GatewayError as error:
            log.info("%s keeps its answer with bad output: %s", record.request_id, error, extra=about(record, first.target, str(error)))
            record.first_event_at, record.reask_result = begun_at, "failed"
            return first
        except BaseException:
            first.end(None, "given up")
            raise
        first.end(Verdict.OK, "bad_output")
        record.wasted, record.usage, record.finishes = record.usage, None, ()
        record.reask_result = "still_bad" if self._wrong(exchange, second) else "mended"
        record.headers.append((b"x-penstock-reasked", wrong.encode()))
        log.info(
            "%s was asked again at %s: %s from %s",
            record.request_id,
            second.target,
            wrong,
            first.target,
            extra=about(record, first.target, wrong),
        )
        return second

    async def _attempts(self, exchange: Exchange, call: Call, continues: bool, wait_s: float, last: AttemptFailed | None = None) -> Attempt:
        """Try hosts until one has begun to answer, waiting for a place for at most so long; a continuation's retries are not charged to
        the budget."""
        served, record, tried = exchange.served, exchange.record, exchange.tried
        pool, prompt_tokens = served.pool, exchange.terms.prompt_tokens
        bound, affine = exchange.bound, served.affine
        pairs = pool.paired and call.endpoint in BOUNDS
        while True:
            record.enter(QUEUE)
            place: Host | Pair | NoHost
            if pairs:
                place = await pool.pair(served.policy, bound, tried, exchange.ticket, wait_s)
            else:
                place = await pool.host(served.policy, bound, tried, exchange.ticket, wait_s)
            if isinstance(place, NoHost):
                raise not_ready(pool.waiting_for()) if last is None else _exhausted(last.error, record, pool) from last
            host, prefill = (place.decode, place.prefill) if isinstance(place, Pair) else (place, None)
            charged = last is not None and not continues and last.cause != "connect" and last.verdict is not Verdict.OK
            if last is not None and charged and not pool.budget.withdraw(prompt_tokens, time.monotonic()):
                pool.end(host, None)
                if prefill is not None:
                    pool.end(prefill, None)
                raise _over_budget(last, pool) from last
            target = host.target
            tried.add(target.id)
            attempt = Attempt(record, host, pool.end, target.id, target.weights, continues, record.enter(RETRY))
            attempt.considered = pool.considered()
            cached = target
            if prefill is not None:
                cached = prefill.target
                tried.add(cached.id)
                attempt.prefill = Prefill(prefill, pool.end, attempt.started_at)
            if affine is not None:
                attempt.placement = affine.place(bound, cached.id)
            record.attempts.append(attempt)
            try:
                await self._one(exchange, call, attempt)
                return attempt
            except AttemptFailed as failure:
                last = failure
                failed, why = _ended(attempt, failure, tried)
                if failure.verdict is Verdict.CLIENT_FAULT:
                    raise failure.error from failure
                # Whether anybody will notice is not known yet; if so, the request's own line is an error.
                number, request = len(record.attempts), record.request_id
                log.info("attempt %d of %s on %s failed: %s", number, request, failed, why, extra=about(record, failed, why))
            except GatewayError:  # the backend cannot take such a call
                attempt.end(None, "refused")
                raise
            except BaseException as error:  # a client that left, or a fault of ours, says nothing about the host
                attempt.end(None, "broken" if isinstance(error, Exception) else "given up")
                raise

    async def _one(self, exchange: Exchange, call: Call, attempt: Attempt) -> None:
        watch, terms = exchange.watch, exchange.terms
        backend, record = exchange.served.pool.backend, exchange.record
        trace, half = record.trace.headers(attempt.span), attempt.prefill
        if half is None:
            reply = attempt.reply = backend.send(attempt.target, call, terms, trace)
        else:
            again = any(before.target == attempt.target for before in record.attempts[:-1])
            traces = record.trace.headers(half.span), trace
            reply = attempt.reply = backend.send_pair(half.target, attempt.target, call, terms, traces, again)
            reply.prefilled = half.done
        if not call.stream:
            await reply.begin()
        else:
            limit_s = self._timeouts.first_token_s + terms.prompt_tokens / PREFILL_TOKENS_PER_S
            watch.attempt_by(attempt.started_at + limit_s, exchange.others_are_full)
            try:
                await reply.begin()
                if self._reask and call.continues is None:
                    attempt.held, attempt.ended_empty = await reask.prelude(reply)
            except asyncio.CancelledError as error:
                raise watch.as_failure(error, f"The engine did not send its first token within {limit_s:.0f} s.") from None
            finally:
                watch.attempt_over()
        attempt.begun()

    async def resume(self, exchange: Exchange, broken: Attempt, reply: Reply, delivered: bytes) -> Attempt | None:
        """Another host's continuation of an answer that broke off after `delivered`; None where there is none to be had."""
        record, pool = exchange.record, exchange.served.pool
        if record.continuations >= self._retry.max_continuations:
            return None
        again = pool.backend.resume(exchange.call, exchange.terms, reply, delivered)
        if again is None:
            return None
        if isinstance(again, Reply):  # only closing words are missing: nothing goes on elsewhere
            closing = Attempt(record, None, pool.end, broken.target, broken.weights, True, time.monotonic())
            closing.reply = again
            return closing
        if not broken.weights:
            return None
        # Nobody who serves something else, or of whom that is not known.
        exchange.tried = {
            host.target.id for host in pool.everyone() if host.target.id == broken.target or host.target.weights != broken.weights
        }
        exchange.watch.begin_by(time.monotonic() + self._timeouts.request_s)
        try:
            attempt = await self._attempts(exchange, again, True, self._timeouts.queue_s)
            record.continuations += 1
            return attempt
        except asyncio.CancelledError:
            if not exchange.watch.was_too_late():
                raise
        except GatewayError as error:
            log.info("%s cannot be continued: %s", record.request_id, error, extra=about(record, broken.target, str(error)))
        finally:
            exchange.watch.begun()
        return None


def _ended(attempt: Attempt, failure: AttemptFailed, tried: set[str]) -> tuple[str, str]:
    """End an attempt with what its failure says of the host that has failed: its id, and why. The other one of a pair may be asked again.
    Of a pair that is only silent nobody says who is to blame: it is the one that has not prefilled, or else the other."""
    half = attempt.prefill
    if half is not None and half.host is not None and (failure.role == "prefill" or failure.cause == "timeout"):
        why = reason(failure, half.target)
        half.end(failure.verdict, failure.cause, why)
        attempt.end(None, "given up")
        tried.discard(attempt.target)
        return half.target, why
    why = reason(failure, attempt.target)
    attempt.end(failure.verdict, failure.cause, why)
    if half is not None:
        tried.discard(half.target)
    return attempt.target, why


def not_ready(target: Target | None) -> GatewayError:
    """Why nothing can be served yet, in the target's own words, and when to ask again."""
    if target is None:
        return Unavailable("No engine is configured for this model.", code="engine_unavailable")
    if target.ready:
        return Unavailable("No engine is well enough to be asked.", code="engine_unavailable", retry_after_s=target.retry_after_s)
    return Unavailable(target.reason or "The engine is not ready.", code="engine_unavailable", retry_after_s=target.retry_after_s)


def reason(failure: AttemptFailed, target: str) -> str:
    """Why an attempt failed, for people who are told of which host beside it."""
    return str(failure).replace(f"{target}: ", "")


def _exhausted(error: GatewayError, record: Record, pool: Pool) -> GatewayError:
    """What a client is told when nobody is left to be asked. Where a host was only busy it is worth coming again, whatever the others had;
    else, once several were tried, the client's own retries would only multiply the attempts."""
    if _was_busy(record):
        return _overloaded(error, pool)
    if len(record.attempts) > 1:
        error.should_retry = False
    return error


def _over_budget(last: AttemptFailed, pool: Pool) -> GatewayError:
    """The same when there is somebody left, and no budget to ask. What an attempt has cost would be spent again by a client that comes
    again, so it must not; a host that was busy has done nothing for it, so it may."""
    error = last.error
    error.detail = f"{error.detail or error.message}; the retry budget is spent"
    if last.cause == "busy":
        return _overloaded(error, pool)
    error.should_retry = False
    return error


def _was_busy(record: Record) -> bool:
    return any(attempt.result == "busy" for attempt in record.attempts)


def _overloaded(error: GatewayError, pool: Pool) -> GatewayError:
    again_s = max(pool.queue.retry_after_s(), BUSY_AGAIN_S)
    return Unavailable("The engine is at capacity.", code="engine_overloaded", retry_after_s=again_s, detail=error.detail or error.message)
