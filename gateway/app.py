"""The composition root: settings and surroundings in, an ASGI application out. The only file that knows everybody."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from litestar import Litestar, Request
from litestar.exceptions import HTTPException

import middleware
import openapi
from gateway import routes
from gateway.access import ledger
from gateway.access.admission import Admission
from gateway.access.limits.memory import Memory
from gateway.access.limits.rules import Store
from gateway.config import Settings
from gateway.life import Life
from gateway.plugin import BackendEnv
from gateway.serving import calls
from gateway.serving.pool import HostView
from gateway.serving.registry import Registry
from gateway.wire.asgi import App, Receive, Scope, Send


class Gateway:
    """The ASGI application, and what the worker's report says of it."""

    def __init__(self, app: App, registry: Registry) -> None:
        self._app = app
        self._registry = registry

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

    def waiting(self) -> str:
        """Why a request could not be served now, or ""."""
        for target in self._registry.not_ready().values():
            return (target.reason if target is not None else "") or "The engine is not ready."
        return ""


def build(settings: Settings, env: BackendEnv, life: Life) -> Gateway:
    """The whole gateway for one worker; does no I/O until its lifespan begins. Two of them in one process do not meet."""
    registry = Registry(settings, env)
    admission = life.admission = Admission(settings, _store(settings, life), life.metrics)

    if settings.tracing.on():
        from gateway.telemetry import tracer  # 0.3 s that only a gateway with a collector has to spend

        life.sampling = tracer.bound(tracer.ratio(settings.tracing))
        life.tracer = tracer.Tracer(settings.tracing, life.metrics)

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        try:
            await registry.open()
            await admission.open()
            yield
        finally:
            await admission.aclose()  # which waits for what the backends still have to tell
            await registry.aclose()
            if life.tracer is not None:
                life.tracer.close()

    table = routes.table(registry, settings, life, admission)
    app = Litestar(
        route_handlers=routes.handlers((*table, *openapi.routes(table))),
        lifespan=[lifespan],
        openapi_config=None,
        logging_config=None,
        exception_handlers={HTTPException: _refused, Exception: _reraise},
    )
    return Gateway(middleware.wrap(app, settings, life), registry)  # type: ignore[arg-type]


def _store(settings: Settings, life: Life) -> Store:
    if settings.redis.url is None:
        memory = Memory(count=lambda row: ledger.add(life.usage, row))
        memory.used(ledger.quotas(life.usage_before, ledger.Days(settings.limits.timezone)))
        return memory
    from gateway.store.shared import Shared  # 0.1 s that only a gateway with Redis has to spend

    shared = Shared(settings, life.keys, life.metrics)
    life.ring.share = shared.remember
    return shared


def _refused(request: Request[Any, Any, Any], error: HTTPException) -> NoReturn:
    """Litestar's own refusals, of which a route that does not exist is the only one our handlers leave to it."""
    raise calls.unknown_url(request.method, request.url.path, request.url.scheme, request.headers.get("host", "")) from error


def _reraise(request: Request[Any, Any, Any], error: Exception) -> NoReturn:
    """Everything else passes through to the errors middleware, which renders for all."""
    raise error
