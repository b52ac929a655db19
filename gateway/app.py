"""The composition root: settings and surroundings in, an ASGI application out. The only file that knows everybody."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from litestar import Litestar, Request
from litestar.exceptions import HTTPException

import openapi
from gateway import routes
from gateway.access import ledger
from gateway.access.callers import Calls
from gateway.access.keys import KeyList, Keys
from gateway.access.limits.memory import Memory
from gateway.access.limits.rules import Store
from gateway.account import Accounts, Spent, nothing_spent
from gateway.config import Sentinel, Settings
from gateway.exchange import Exchanges
from gateway.lifecycle import Lifecycle
from gateway.pages import front
from gateway.plugin import BackendEnv
from gateway.sentinel.sample import Sample, sample
from gateway.serving import calls
from gateway.serving.hostview import HostView
from gateway.serving.registry import Registry
from gateway.telemetry.metrics import UNJUDGED
from gateway.telemetry.observe import Observer
from gateway.telemetry.record import Record
from gateway.wire.asgi import App, Receive, Scope, Send
from middleware.auth import Auth
from middleware.cors import Cors
from middleware.errors import Errors
from middleware.rate_limit import RateLimit
from middleware.request_id import RequestId


class Gateway:
    """The ASGI application, and what the worker's report says of it."""

    def __init__(
        self,
        app: App,
        registry: Registry,
        observer: Observer,
        keys: Keys,
        usage: ledger.Unreported,
        calls: Callable[[], Calls],
        sentinel: Sentinel,
    ) -> None:
        self._eject, self._keep_prompts = sentinel.eject, sentinel.keep_prompts
        self._app = app
        self._registry = registry
        self.observer = observer
        self.keys = keys
        self.usage = usage
        # Who has called since this was last asked.
        self.calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        await self._app(scope, receive, send)

    def hosts(self) -> list[HostView]:
        """Every host of every backend."""
        return self._registry.hosts()

    def queued(self) -> dict[str, int]:
        """Requests that wait for a place, by backend."""
        return self._registry.waiting()

    def drain(self, targets: frozenset[str]) -> None:
        """Targets that get no new requests."""
        self._registry.drain(targets)

    def doubt(self, doubted: Mapping[str, Mapping[str, str]]) -> None:
        """Targets whose answers are under alert, by backend, and why."""
        self._registry.doubt(doubted, self._eject)

    def judged(self, tell: Callable[[Sample], None]) -> None:
        """Hand on the answers that are to be judged."""
        registry, prompts, metrics = self._registry, self._keep_prompts, self.observer.metrics

        def judge(record: Record) -> None:
            if record.outcome != "ok" or record.call is None or not record.attempts:
                return
            pool = registry.serving(record.served, record.call.endpoint).pool
            found = sample(record, record.call, pool.backend.markup, pool.name, prompts)
            if isinstance(found, Sample):
                tell(found)
            elif found:
                metrics.add(UNJUDGED, (found,))

        self.observer.judge = judge

    def waiting(self) -> str:
        """Why a request could not be served now, or ""."""
        for target in self._registry.not_ready().values():
            return (target.reason if target is not None else "") or "The engine is not ready."
        return ""


def build(
    settings: Settings,
    env: BackendEnv,
    lifecycle: Lifecycle,
    used: ledger.Rows | None = None,
    stored_keys: KeyList | None = None,
    spent: Spent = nothing_spent,
    teams: Mapping[str, str] = {},
) -> Gateway:
    """The whole gateway for one worker; does no I/O until its lifespan begins. Two of them in one process do not meet.

    `used`: what the ledger counted this month, where no shared store knows it; `stored_keys`: as they are known so far, where one does;
    `spent`: whom to ask for the ledger of a key; `teams`: of those who came with tokens before.
    """
    observer = Observer(settings.log.requests)
    metrics = observer.metrics
    sampling, tracer = 0, None
    if settings.tracing.on():
        from gateway.telemetry import tracer as tracing  # 0.3 s that only a gateway with a collector has to spend

        sampling = tracing.bound(tracing.ratio(settings.tracing))
        observer.tracer = tracer = tracing.Tracer(settings.tracing, metrics)

    keys = Keys(settings)
    if stored_keys is not None:
        keys.begin(stored_keys)
    tokens = None
    if settings.oidc:
        from gateway.access.tokens import Tokens  # 0.2 s that only a gateway with an identity provider has to spend

        tokens = Tokens(settings, env.home, metrics)
    usage = ledger.Unreported()
    env.failed = metrics.failed
    registry = Registry(settings, env)
    store: Store
    if settings.redis.url is None:
        store = memory = Memory(count=usage.add)
        every = {**teams, **{key.name: key.team for key in settings.keys if key.team is not None}}
        memory.used(ledger.quotas(used or {}, ledger.Days(settings.limits.timezone), every))
    else:
        from gateway.store.shared import Shared  # 0.1 s that only a gateway with Redis has to spend

        store = shared = Shared(settings, keys, metrics)
        observer.ring.share = shared.remember
    rate_limit = RateLimit(settings, store, metrics)
    exchanges = Exchanges(registry, settings, rate_limit)

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        try:
            await registry.open()
            await rate_limit.open()
            if tokens is not None:
                tokens.open()
            yield
        finally:
            await rate_limit.aclose()  # which waits for what the backends still have to tell
            observer.flush()
            await registry.aclose()
            if tokens is not None:
                await tokens.aclose()
            if tracer is not None:
                tracer.close()

    accounts = Accounts(rate_limit, list(settings.models), spent)
    table = routes.table(registry, exchanges, accounts, lifecycle, keys)
    inner = Litestar(
        route_handlers=routes.handlers((*table, *openapi.routes(table, registry.example), *front.routes())),
        lifespan=[lifespan],
        openapi_config=None,
        logging_config=None,
        exception_handlers={HTTPException: _refused, Exception: _reraise},
    )
    auth = Auth(_routed(inner, table), keys, settings.security.cors.origins, tokens.find if tokens is not None else None)
    app = RequestId(
        Cors(Errors(auth), settings.security.cors),
        observer,
        lifecycle,
        sampling,
    )

    outside: Any = inner

    def entry(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        found: Awaitable[None] = (app if scope["type"] == "http" else outside)(scope, receive, send)
        return found

    def calls_since() -> Calls:
        at, exhausted = rate_limit.called, rate_limit.exhausted
        rate_limit.called, rate_limit.exhausted = {}, set()
        return Calls(at, sorted(exhausted), tokens.fresh() if tokens is not None else [])

    return Gateway(entry, registry, observer, keys, usage, calls_since, settings.sentinel)


def _routed(litestar: Litestar, table: Sequence[routes.Route]) -> App:
    """Litestar, with its routing of the table's own paths asked once: its way to a handler costs more than all of our middleware
    (docs/performance.md), and a fixed path leads to the same handler each time."""
    known: dict[str, Any] = {}
    for route in table:
        if not route.below and "{id}" not in route.path:
            known[route.path] = litestar.asgi_router.handle_routing(path=route.path, method=route.method)[0]

    with_ids = routes.with_ids(table)
    others: Any = litestar

    def routed(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        path = scope["path"]
        handler = known.get(path)
        if handler is None:
            handler = next((found for pattern, found in with_ids if pattern.fullmatch(path)), others)
        answered: Awaitable[None] = handler(scope, receive, send)
        return answered

    return routed


def _refused(request: Request[Any, Any, Any], error: HTTPException) -> NoReturn:
    """Litestar's own refusals, of which a route that does not exist is the only one our handlers leave to it."""
    raise calls.unknown_url(request.method, request.url.path, request.url.scheme, request.headers.get("host", "")) from error


def _reraise(request: Request[Any, Any, Any], error: Exception) -> NoReturn:
    """Everything else passes through to the errors middleware, which renders for all."""
    raise error
