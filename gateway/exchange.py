"""A request's life on one page, for every endpoint that a model answers. Data goes down it and never back up.

read the body -> parse it into a Call -> who serves it -> admission, which gives the Terms and settles in the end
    -> watch the client -> an attempt that has begun -> relay it, whole or event by event
"""

from __future__ import annotations

from collections.abc import Awaitable

from gateway.config import Settings
from gateway.errors import GatewayError
from gateway.plugin import AttemptFailed, Call, Endpoint
from gateway.sentinel.sample import MAX_HELD, Sampler
from gateway.serving import affinity, calls, gathered, relay
from gateway.serving.affinity import Affinities
from gateway.serving.dispatch import Dispatcher, Exchange
from gateway.serving.registry import Registry
from gateway.serving.watch import Watch, Watches
from gateway.telemetry.record import LIMITS, Record
from gateway.wire import body
from gateway.wire.asgi import CONNECTION, App, Connection, Receive, Scope, Send, header
from gateway.wire.memory import COUNTED_BYTES, BodyMemory
from gateway.wire.structure import LARGE_BYTES
from middleware.rate_limit import RateLimit


class Exchanges:
    """Makes the ASGI handler of each endpoint: the endpoint is data, the path through the gateway is this one."""

    def __init__(self, registry: Registry, settings: Settings, rate_limit: RateLimit) -> None:
        self._registry = registry
        self._rate_limit = rate_limit
        self._dispatcher = Dispatcher(settings)
        self._affinities = Affinities(settings.affinity.headers)
        self._watches = Watches()
        self._timeouts = settings.timeouts
        self._body_bytes = settings.security.body_limit_mb << 20
        self._memory = BodyMemory(settings.security.body_memory_mb << 20)
        self._strict = settings.security.strict_parameters
        self._hedges = settings.retry.hedge_json
        self._sampler = Sampler(settings.sentinel, settings.listen.workers)

    def of(self, endpoint: Endpoint) -> App:
        """The handler of one endpoint."""

        def handle(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
            return self.handle(endpoint, scope, receive, send)

        return handle

    async def handle(self, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, from the client's bytes to the client's bytes."""
        record = Record.of(scope)
        connection: Connection | None = scope.get(CONNECTION)
        kind, declared = header(scope, b"content-type") or b"", header(scope, b"content-length")
        encoding = header(scope, b"content-encoding") or b""
        small = connection is not None and declared is not None and not encoding and int(declared) <= COUNTED_BYTES
        raw = connection.body() if small and connection is not None else None
        if raw is not None:
            await self._answer(calls.parse(endpoint, raw, kind, self._strict), scope, record, connection, receive, send)
            return
        with self._memory.lease(record.key) as lease:
            raw = await body.read(receive, self._body_bytes, self._timeouts.body_s, declared, lease, encoding)
            parse = calls.parse_large(endpoint, raw, kind, self._strict) if len(raw) > LARGE_BYTES else None
            call = calls.parse(endpoint, raw, kind, self._strict) if parse is None else await parse
            del raw, parse
            await self._answer(call, scope, record, connection, receive, send)

    async def _answer(self, call: Call, scope: Scope, record: Record, connection: Connection | None, receive: Receive, send: Send) -> None:
        record.asks(call)
        if warning := calls.near_miss(call):
            record.headers.append((b"x-penstock-warning", warning.encode()))
        served = self._registry.serving(call.model, call.endpoint, record.caller.models)
        record.served = record.model
        caller = record.caller
        bound = self._affinities.of(call, scope["headers"], caller.name, caller.salt, served.entry.balance, record.ignored)
        record.bound_by(bound)
        if call.endpoint in calls.KEPT:  # its id says where it was made, and for whom
            call = calls.owned(affinity.marked(call, bound), record.key)
            record.asks(call)
        gathering = served.pool.backend.gather(call) if self._hedges and not call.stream else None
        if gathering is not None:
            call = gathering.call
        record.enter(LIMITS)
        try:
            async with self._rate_limit.admitted(call, served, record) as terms:
                with Watch(self._watches, connection, receive) as watch:
                    exchange = Exchange(call, bound, terms, served, record, watch, scope["headers"])
                    # Whether the answer is to be judged. In place, since it must cost nothing.
                    sampler = self._sampler
                    sampler.due += sampler.share
                    if sampler.due >= 1.0:
                        sampler.due -= 1.0
                        if record.mark >= sampler.until:
                            sampler.until, sampler.left = record.mark + 1.0, sampler.per_second
                        if sampler.left > 0 and (terms.keep or not call.stream or sampler.held < MAX_HELD):
                            sampler.left -= 1
                            record.sampled = True
                    held = record.sampled and call.stream and not terms.keep and gathering is None
                    if gathering is not None:
                        await gathered.whole(exchange, gathering, self._dispatcher, self._timeouts.between_tokens_s, send)
                    elif call.stream:
                        sampler.held += held
                        try:
                            await relay.Stream(exchange, self._dispatcher, self._timeouts, connection, send).run()
                        finally:
                            sampler.held -= held
                    else:
                        await relay.whole(exchange, await self._dispatcher.begin(exchange), send)
        except (AttemptFailed, GatewayError):
            if not record.status:
                raise  # nothing has been sent: the errors middleware answers, else the client was told and the record knows
