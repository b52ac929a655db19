"""What the server keeps of its responses, as SGLang does with `--enable-response-store`: asked for again, cancelled, continued from."""

from __future__ import annotations

from typing import Any

from aiohttp import web

KEPT = web.AppKey("kept", dict[str, dict[str, Any]])
# Whether responses are kept; SGLang's default is not to.
KEEPS = web.AppKey("keeps", list[bool])


def add(app: web.Application) -> None:
    """Its routes."""
    app[KEPT], app[KEEPS] = {}, [False]
    app.router.add_get("/v1/responses/{id}", _retrieve)
    app.router.add_post("/v1/responses/{id}/cancel", _cancel)
    app.router.add_post("/rehearsal/keeps", _set)


def keep(app: web.Application, response: dict[str, Any]) -> None:
    """A response that was made."""
    if app[KEEPS][0]:
        app[KEPT][response["id"]] = response


def refusal(app: web.Application, body: dict[str, Any]) -> web.Response | None:
    """Of a request that goes on from a response which is not here."""
    before = body.get("previous_response_id")
    return None if before is None or before in app[KEPT] else _missing(app, before, "previous_response_id")


async def _set(request: web.Request) -> web.Response:
    request.app[KEEPS][0] = await request.json()
    return web.Response()


async def _retrieve(request: web.Request) -> web.Response:
    id = request.match_info["id"]
    found = request.app[KEPT].get(id)
    return web.json_response(found) if found is not None else _missing(request.app, id, "response_id")


async def _cancel(request: web.Request) -> web.Response:
    found = request.app[KEPT].get(request.match_info["id"])
    if found is not None:
        found["status"] = "cancelled"
    return await _retrieve(request)


def _missing(app: web.Application, id: str, param: str) -> web.Response:
    status, message = 404, f"Response with id '{id}' not found."
    if not app[KEEPS][0]:
        status, message = 400, "Response store is disabled. Stateful Responses require --enable-response-store on a standalone server."
    return web.json_response(
        {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": status}}, status=status
    )
