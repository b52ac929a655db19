"""Every route on one screen. The table drives methods, 405 with `Allow`, and (in `openapi/`) the document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from litestar import asgi
from litestar.handlers import ASGIRouteHandler

from gateway.access.keys import Keys
from gateway.account import Accounts
from gateway.errors import MethodNotAllowed, Unavailable, UnknownUrl
from gateway.exchange import Exchanges
from gateway.lifecycle import Lifecycle
from gateway.plugin import Endpoint
from gateway.serving import dispatch
from gateway.serving.registry import Registry
from gateway.telemetry.record import Record
from gateway.wire import answers
from gateway.wire.asgi import App, Receive, Scope, Send


@dataclass(frozen=True, slots=True)
class Route:
    """One path, the method it answers to, and who answers.

    `below`: also for every path that continues it, where `below_answer` may differ. `endpoint` or `answer` say what the OpenAPI document
    shows; a route with neither is not in it.
    """

    method: str
    path: str
    handler: App
    below: bool = False
    endpoint: Endpoint | None = None
    answer: Any = None
    below_answer: Any = None


def table(registry: Registry, exchanges: Exchanges, accounts: Accounts, lifecycle: Lifecycle, keys: Keys) -> Sequence[Route]:
    """All of them."""
    return (
        *(Route("POST", endpoint.value, exchanges.of(endpoint), endpoint=endpoint) for endpoint in Endpoint),
        Route("GET", "/v1/models", _models(registry), below=True, answer=answers.ModelList, below_answer=answers.ModelInfo),
        Route("GET", "/v1/usage", _usage(accounts), answer=answers.OwnUsage),
        Route("GET", "/livez", _livez, answer=answers.Health),
        Route("GET", "/readyz", _readyz(registry, lifecycle, keys), answer=answers.Health),
    )


def handlers(routes: Sequence[Route]) -> list[ASGIRouteHandler]:
    """The table as Litestar handlers; HEAD is answered where GET is."""
    return [asgi(route.path, is_mount=route.below, copy_scope=False)(_guarded(route)) for route in routes]


def _guarded(route: Route) -> App:
    allowed = ["GET", "HEAD"] if route.method == "GET" else [route.method]

    async def handle(scope: Scope, receive: Receive, send: Send) -> None:
        record = Record.of(scope)
        path = record.path
        if route.below and not f"{path}/".startswith(f"{route.path}/"):
            raise UnknownUrl(scope["method"], path)
        if scope["method"] not in allowed:
            raise MethodNotAllowed(scope["method"], path, allowed)
        record.route = route.path
        await route.handler(scope, receive, send)

    return handle


async def _json(send: Send, value: object) -> None:
    content = msgspec.json.encode(value)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def _models(registry: Registry) -> App:
    async def models(scope: Scope, receive: Receive, send: Send) -> None:
        # The server has decoded the path, so an id sent with %2F arrives with its slash, as it does when sent raw.
        record = Record.of(scope)
        name, allowed = record.path.removeprefix("/v1/models").strip("/"), record.caller.models
        await _json(send, registry.model(name, allowed) if name else {"object": "list", "data": registry.models(allowed)})

    return models


def _usage(accounts: Accounts) -> App:
    async def usage(scope: Scope, receive: Receive, send: Send) -> None:
        await _json(send, await accounts.of(Record.of(scope).caller))

    return usage


async def _livez(scope: Scope, receive: Receive, send: Send) -> None:
    await _json(send, {"status": "alive"})


def _readyz(registry: Registry, lifecycle: Lifecycle, keys: Keys) -> App:
    async def readyz(scope: Scope, receive: Receive, send: Send) -> None:
        if not lifecycle.ready:
            raise Unavailable("The gateway is shutting down.", code="shutting_down", headers=[(b"connection", b"close")])
        for target in registry.not_ready().values():
            raise dispatch.not_ready(target)
        await _json(send, {"status": "ready", **({"detail": problem} if (problem := keys.problem()) else {})})

    return readyz
