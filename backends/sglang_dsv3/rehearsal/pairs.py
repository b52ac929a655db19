"""Disaggregated serving as SGLang 0.5.23 does it (tried with two real engines on 2026-11-28): a prefill server holds what it has computed
in a room until a decode server fetches it, at the host, port and room that stand in either body. The bootstrap server is this one.

`POST /rehearsal` with `role`: what the server is from then on. A command `[[prefill-refuse 503]]` is one for that half alone.
"""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
from aiohttp import web

ROOMS = web.AppKey("rooms", set[int])
FETCHED = web.AppKey("fetched", set[int])
ROLES = ("prefill", "decode")
_LOOK_S = 0.02


def add(app: web.Application) -> None:
    """Its route, which only another one of these asks."""
    app[ROOMS], app[FETCHED] = set(), set()
    app.router.add_post("/rehearsal/rooms/{room}", _fetch)


async def _fetch(request: web.Request) -> web.Response:
    room = int(request.match_info["room"])
    if room not in request.app[ROOMS]:
        return web.Response(status=404)
    request.app[ROOMS].remove(room)
    request.app[FETCHED].add(room)
    return web.Response()


def commands_of(role: str, commands: dict[str, str]) -> dict[str, str]:
    """Those that are meant for this half, or for whoever reads them."""
    found = {name: value for name, value in commands.items() if not name.startswith(tuple(f"{other}-" for other in ROLES))}
    return found | {name.removeprefix(f"{role}-"): value for name, value in commands.items() if role and name.startswith(f"{role}-")}


async def take_part(app: web.Application, role: str, body: dict[str, Any], aborted: list[str]) -> str:
    """Do what this half does before it answers; why it cannot, or nothing."""
    rooms, hosts, ports = (_each(body.get(f"bootstrap_{name}")) for name in ("room", "host", "port"))
    rid = body["ids"][0]
    if not rooms:
        return f"400 Invalid request: Disaggregated request received without bootstrap room id. req.rid='{rid}'"
    if role == "prefill":
        if not app[ROOMS].isdisjoint(rooms) or not app[FETCHED].isdisjoint(rooms):
            return f"500 room {rooms} is in use"
        app[ROOMS].update(rooms)
        try:
            while not app[FETCHED].issuperset(rooms):
                if rid in aborted:
                    return "500 Aborted by AbortReq."
                await asyncio.sleep(_LOOK_S)
        finally:
            app[ROOMS].difference_update(rooms)
        return ""
    if (body.get("n") or 1) > 1:
        await asyncio.sleep(3600)  # all choices are sent into one room, and only one of them ever finds what it waits for
    async with aiohttp.ClientSession() as session:
        for room, host, port in zip(rooms, hosts, ports, strict=True):
            while True:
                if rid in aborted:
                    return f"500 Decode handshake failed for request {rid} with exception KVTransferError: Aborted by AbortReq."
                try:
                    async with session.post(f"http://{host}:{port}/rehearsal/rooms/{room}") as answer:
                        if answer.status == 200:
                            break
                except aiohttp.ClientError:
                    return f"500 Decode transfer failed for request {rid}: Lost connection with prefill instance ({host}:{port})"
                await asyncio.sleep(_LOOK_S)
    return ""


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
