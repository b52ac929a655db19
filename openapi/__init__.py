"""The OpenAPI 3.1 document of everything served, made from the one route table and the wire types, and the page that shows it.

`python -m openapi` writes `openapi/openapi.json`; with `--check` it says whether that file is what the code serves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from swagger_ui_bundle import swagger_ui_path

from gateway import __version__
from gateway.errors import UnknownUrl
from gateway.plugin import Endpoint
from gateway.routes import Route
from gateway.serving import calls, catalog
from gateway.telemetry.record import Record
from gateway.wire import error
from gateway.wire.asgi import App, Receive, Scope, Send
from gateway.wire.error import Shape
from openapi import examples

_TITLE = "Penstock"
_REFUSALS = {
    "400": "The request is wrong; `param` says where.",
    "401": "No key, or one that is not known.",
    "404": "Unknown model, or one that is not served here.",
    "408": "The request did not arrive in time.",
    "413": "The request is too large.",
}
_FAILURES = {
    "500": "The gateway failed.",
    "502": "The engine failed.",
    "503": "No engine can take the request now; `retry-after` says when to ask again.",
    "504": "The engine kept silent for too long.",
}
# In the order of the page.
_TAGS = {
    "generate": "Answers of a model, in one piece or as a stream.",
    "count": "Tokens of a request, before it is sent.",
    "embed and rank": "What models for retrieval do, and how likely a model finds something.",
    "models": "What is served, and responses that are kept.",
    "account": "What a key may and has used.",
    "health": "Whether the gateway lives, and can serve.",
}
_TAG = {
    Endpoint.INPUT_TOKENS: "count", Endpoint.COUNT_TOKENS: "count", Endpoint.TOKENIZE: "count",
    Endpoint.EMBEDDINGS: "embed and rank", Endpoint.RERANK: "embed and rank", Endpoint.SCORE: "embed and rank",
}  # fmt: skip
# A model that is served there and that everybody may know of, if any is.
Served = Callable[[Endpoint], str | None]
# What one event of a stream is; OpenAPI 3.1 has no words of its own for streams.
_EVENT = {
    "description": "With `stream: true`: server-sent events, each with data and for some endpoints a name.",
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
}
_ID: dict[str, Any] = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
_VERSION: dict[str, Any] = {
    "name": "anthropic-version",
    "in": "header",
    "description": "Who sends it is answered in Anthropic's shape.",
    "schema": {"type": "string"},
}
_PAGING: list[dict[str, Any]] = [
    {
        "name": "limit",
        "in": "query",
        "description": "Of one page, in Anthropic's shape.",
        "schema": {"type": "integer", "minimum": 1, "maximum": catalog.LARGEST_PAGE, "default": catalog.PAGE},
    },
    {"name": "after_id", "in": "query", "description": "The page after this model.", "schema": {"type": "string"}},
    {"name": "before_id", "in": "query", "description": "The page before this model.", "schema": {"type": "string"}},
]
# What may be refused of what is asked for without a body; all else wants a key and nothing more.
_REFUSED: dict[str, tuple[str, ...]] = {
    "/livez": (),
    "/readyz": ("503",),
    "/v1/models": ("400", "401"),
    "/v1/models/{id}": ("401", "404"),
    "/v1/responses/{id}": ("400", "401", "404", "503"),
    "/v1/responses/{id}/cancel": ("400", "401", "404", "503"),
}
_UI = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}
_PAGE = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Penstock</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
<div id="ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
_START = b"""SwaggerUIBundle({ url: "/openapi.json", dom_id: "#ui", deepLinking: true, validatorUrl: null, defaultModelsExpandDepth: 0 });
"""
# Nothing on the page comes from anywhere else, and nothing it loads may.
_POLICY = b"default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"


def document(table: Sequence[Route], served: Served) -> dict[str, Any]:
    """OpenAPI 3.1: every documented route, with the structs that check its requests, and examples with models that are served."""
    specs = {route: calls.SPECS[route.endpoint] for route in table if route.endpoint is not None}
    kinds: list[Any] = [error.Error, error.AnthropicError]
    for spec in specs.values():
        kinds += [spec.request, spec.answer]
    kinds += [kind for route in table for kind in (route.answer, route.below_answer, *(route.anthropic or ())) if kind is not None]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schema = dict(zip(map(str, kinds), schemas, strict=True))
    paths: dict[str, Any] = {}
    for route in table:
        if route.endpoint is not None:
            spec = specs[route]
            paths[route.path] = {"post": _post(route.endpoint, spec, served(route.endpoint), schema)}
        elif route.answer is not None:
            paths[route.path] = {route.method.lower(): _asked(route.path, route.answer, route.anthropic and route.anthropic[0], schema)}
        if route.below_answer is not None:
            path = f"{route.path}/{{id}}"
            paths[path] = {"get": _asked(path, route.below_answer, route.anthropic and route.anthropic[1], schema)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": _TITLE,
            "version": __version__,
            "description": "An OpenAI-compatible gateway for self-hosted DeepSeek-V3. Parameters that are not listed pass to the engine.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [{"name": name, "description": words} for name, words in _TAGS.items()],
        "paths": paths,
        "security": [{"key": []}, {}],
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _post(endpoint: Endpoint, spec: calls.Spec, model: str | None, schema: dict[str, Any]) -> dict[str, Any]:
    asked: dict[str, Any] = {"schema": schema[str(spec.request)]}
    content: dict[str, Any] = {"application/json": {"schema": schema[str(spec.answer)]}}
    if spec.streams:
        content["text/event-stream"] = {"schema": _EVENT}
    if model is not None:
        asked["examples"] = examples.requests(endpoint, model)
        if spec.streams:
            content["text/event-stream"]["example"] = examples.stream(endpoint, model)
    refusal = schema[str(error.AnthropicError if spec.shape is Shape.ANTHROPIC else error.Error)]
    return {
        "operationId": endpoint.name.lower(),
        "summary": _summary(spec.request),
        "tags": [_TAG.get(endpoint, "generate")],
        "requestBody": {"required": True, "content": {"application/json": asked}},
        "responses": {
            "200": {"description": "The answer.", "content": content},
            **{status: _answer(text, refusal) for status, text in {**_REFUSALS, **_FAILURES}.items()},
        },
    }


def _summary(kind: Any) -> str:
    """The first sentence of what a type says of itself."""
    return (kind.__doc__ or "").partition(".")[0].replace("\n    ", " ")


def _asked(path: str, kind: Any, anthropic: Any, schema: dict[str, Any]) -> dict[str, Any]:
    """What is asked for without a body; where who sends `anthropic-version` gets another answer, in either shape."""
    asked: dict[str, Any] = {
        "operationId": path.strip("/").replace("/", "_").replace("{", "").replace("}", ""),
        "summary": _summary(kind),
        "tags": ["account" if path == "/v1/usage" else "models" if path.startswith("/v1") else "health"],
    }
    parameters = [_ID] if "{id}" in path else []
    answer, refusal = schema[str(kind)], schema[str(error.Error)]
    if path.startswith("/v1"):
        parameters.append(_VERSION)
        refusal = {"oneOf": [refusal, schema[str(error.AnthropicError)]]}
    if anthropic is not None:
        answer = {"oneOf": [answer, schema[str(anthropic)]]}
        parameters += [] if "{id}" in path else _PAGING
    if parameters:
        asked["parameters"] = parameters
    refusals = _REFUSED.get(path, ("401",))
    return {
        **asked,
        "responses": {
            "200": _answer("The answer.", answer),
            **{status: _answer({**_REFUSALS, **_FAILURES}[status], refusal) for status in refusals},
        },
    }


def _answer(description: str, schema: Any) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def text(table: Sequence[Route], served: Served) -> bytes:
    """The document as it is served; as it is committed, it has the models of the configuration that applies when there is none."""
    return msgspec.json.format(msgspec.json.encode(document(table, served)), indent=2) + b"\n"


def routes(table: Sequence[Route], served: Served) -> tuple[Route, ...]:
    """`/openapi.json`, and `/docs` with what it loads: all from here, so that it works without a network. Nothing of it is made or read
    before somebody asks: few ever do, and 1.5 MB would lie in every worker."""
    files = {name: _file(kind, (swagger_ui_path / name).read_bytes) for name, kind in _UI.items()}
    files |= {"": _file("text/html; charset=utf-8", lambda: _PAGE), "start.js": _file("text/javascript", lambda: _START)}
    return (
        Route("GET", "/openapi.json", _file("application/json", functools.cache(lambda: text(table, served)))),
        Route("GET", "/docs", _below_docs(files), below=True),
    )


def _file(kind: str, make: Callable[[], bytes]) -> App:
    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        content = make()
        headers = [
            (b"content-type", kind.encode()),
            (b"content-length", b"%d" % len(content)),
            (b"content-security-policy", _POLICY),
            (b"x-content-type-options", b"nosniff"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    return serve


def _below_docs(files: Mapping[str, App]) -> App:
    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        path = Record.of(scope).path
        found = files.get(path.removeprefix("/docs").strip("/"))
        if found is None:
            raise UnknownUrl(scope["method"], path)
        await found(scope, receive, send)

    return serve
