"""The attempt loop: pick a target, make one attempt, and either hand over an answer that has begun or say honestly why not."""

from __future__ import annotations

import asyncio
import logging

from gateway import calls
from gateway.config import Timeouts
from gateway.context import RequestContext
from gateway.errors import GatewayError, GatewayTimeout, Unavailable
from gateway.plugin import AttemptFailed, Call, Reply, Target, Verdict
from gateway.registry import Registry

log = logging.getLogger("penstock.dispatch")


class Dispatcher:
    """Owns the commit point: until `send` returns nothing of an answer has reached the client, so any target may still be tried."""

    def __init__(self, registry: Registry, timeouts: Timeouts) -> None:
        self._registry = registry
        self._timeouts = timeouts

    async def send(self, call: Call, context: RequestContext) -> Reply:
        """A reply that has begun (first event or whole body). Every target is tried at most once; raises GatewayError."""
        served = self._registry.serving(call.model, call.endpoint)
        pool = served.pool
        context.served = call.model
        calls.limit(call, served.default_max_tokens)
        call.connect_s = self._timeouts.connect_s
        limit_s = self._timeouts.request_s if not call.stream else min(self._timeouts.first_token_s, self._timeouts.request_s)
        tried: set[str] = set()
        last: AttemptFailed | None = None
        try:
            async with asyncio.timeout(limit_s):
                while (target := pool.pick(tried)) is not None:
                    tried.add(target.id)
                    context.target = target.id
                    context.attempts += 1
                    call.headers = context.trace.headers()
                    try:
                        reply = await pool.backend.send(target.id, call)
                    except AttemptFailed as failure:
                        last = failure
                        context.tried.append((target.id, failure.cause))
                        if pool.backend.classify(failure) is Verdict.CLIENT_FAULT:
                            raise failure.error from failure
                        log.warning("attempt %d of %s on %s: %s", context.attempts, context.request_id, target.id, failure)
                    else:
                        context.tried.append((target.id, "ok"))
                        return reply
        except TimeoutError:
            phase = "its first token" if call.stream else "its answer"
            raise GatewayTimeout(f"The engine did not send {phase} within {limit_s:g} s.") from None
        if last is None:
            raise not_ready(pool.waiting_for())
        raise _exhausted(last.error, len(tried)) from last


def not_ready(target: Target | None) -> GatewayError:
    """Why nothing can be served yet, in the target's own words, and when to ask again."""
    if target is None:
        return Unavailable("No engine is configured for this model.", code="engine_unavailable")
    return Unavailable(target.reason or "The engine is not ready.", code="engine_unavailable", retry_after_s=target.retry_after_s)


def _exhausted(error: GatewayError, attempts: int) -> GatewayError:
    """The last error; once several targets were tried the client's own retries would only multiply the attempts."""
    if attempts > 1:
        error.should_retry = False
    return error
