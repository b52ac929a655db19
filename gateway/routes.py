"""Every route on one screen. The table drives methods, 405 with `Allow`, and (in `openapi/`) the document."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from litestar import asgi
from litestar.handlers import ASGIRouteHandler

from gateway.access.keys import Keys
from gateway.account import Accounts
from gateway.errors import InvalidRequest, MethodNotAllowed, Unavailable, UnknownUrl
from gateway.exchange import Exchanges
from gateway.lifecycle import Lifecycle
from gateway.plugin import Endpoint
from gateway.serving import catalog, dispatch
from gateway.serving.registry import Registry
from gateway.telemetry.record import Record
from gateway.wire import answers
from gateway.wire.asgi import App, Receive, Scope, Send

_ID = "{id}"


@dataclass(frozen=True, slots=True)
class Route:
    """One path (`{id}` in it is any one step), the method it answers to ("": whichever), and who answers.

    `below`: also for every path that continues it, where `below_answer` may differ. `endpoint` or `answer` say what the OpenAPI document
    shows, `anthropic` the same two for who sends `anthropic-version`; a route with none of them is not in it.
    """

    method: str
    path: str
    handler: App
    below: bool = False
    endpoint: Endpoint | None = None
    answer: Any = None
    below_answer: Any = None
    anthropic: tuple[Any, Any] | None = None


def table(registry: Registry, exchanges: Exchanges, accounts: Accounts, lifecycle: Lifecycle, keys: Keys) -> Sequence[Route]:
    """All of them."""
    return (
        *(Route("POST", endpoint.value, exchanges.of(endpoint), endpoint=endpoint) for endpoint in Endpoint),
        Route(
            "GET",
            "/v1/models",
            _models(registry),
            below=True,
            answer=answers.ModelList,
            below_answer=answers.ModelInfo,
            anthropic=(answers.AnthropicModels, answers.AnthropicModel),
        ),
        Route("GET", "/v1/responses/{id}", _recalled(registry, cancel=False), answer=answers.Response),
        Route("POST", "/v1/responses/{id}/cancel", _recalled(registry, cancel=True), answer=answers.Response),
        Route("GET", "/v1/usage", _usage(accounts), answer=answers.OwnUsage),
        Route("GET", "/livez", _livez, answer=answers.Health),
        Route("GET", "/readyz", _readyz(registry, lifecycle, keys), answer=answers.Health),
    )


def handlers(routes: Sequence[Route]) -> list[ASGIRouteHandler]:
    """The table as Litestar handlers, but for paths with an id in them; HEAD is answered where GET is."""
    return [asgi(route.path, is_mount=route.below, copy_scope=False)(_guarded(route)) for route in routes if _ID not in route.path]


def with_ids(routes: Sequence[Route]) -> list[tuple[re.Pattern[str], App]]:
    """Paths with an id in them, and who answers: an ASGI handler of Litestar's cannot have one."""
    return [(re.compile(re.escape(route.path).replace(re.escape(_ID), "[^/]+")), _guarded(route)) for route in routes if _ID in route.path]


def _guarded(route: Route) -> App:
    allowed = ["GET", "HEAD"] if route.method == "GET" else [route.method]

    async def handle(scope: Scope, receive: Receive, send: Send) -> None:
        record = Record.of(scope)
        path = record.path
        if route.below and not f"{path}/".startswith(f"{route.path}/"):
            raise UnknownUrl(scope["method"], path)
        if route.method and scope["method"] not in allowed:
            raise MethodNotAllowed(scope["method"], path, allowed)
        record.route = route.path
        await route.handler(scope, receive, send)

    return handle


async def _json(send: Send, value: object) -> None:
    await _sent(send, msgspec.json.encode(value))


async def _sent(send: Send, content: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def _models(registry: Registry) -> App:
    async def models(scope: Scope, receive: Receive, send: Send) -> None:
        # The server has decoded the path, so an id sent with %2F arrives with its slash, as it does when sent raw.
        record = Record.of(scope)
        name, allowed = record.path.removeprefix("/v1/models").strip("/"), record.caller.models
        if name:
            await _json(send, catalog.one(registry.model(name, allowed), record.shape))
        else:
            await _json(send, catalog.several(registry.models(allowed), record.shape, scope["query_string"]))

    return models


def _recalled(registry: Registry, cancel: bool) -> App:
    async def recalled(scope: Scope, receive: Receive, send: Send) -> None:
        record = Record.of(scope)
        if catalog.parameter(scope["query_string"], "stream") in ("true", "1"):
            raise InvalidRequest("A response that was made before is not streamed again.", param="stream", code="unsupported_parameter")
        await _sent(send, await registry.recall(record.path.split("/")[3], record.caller, cancel))

    return recalled


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
