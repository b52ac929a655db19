"""The admin API as an ASGI application: what there is, and how it is answered. The parent serves it, so that it is there whatever the
workers do, on a listener of its own; nothing here is reachable from the public one.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import msgspec

from gateway import __version__, pages
from gateway.access.keys import shown
from gateway.admin import audit, usage
from gateway.admin.access import NOBODY, Access, Operator, check
from gateway.admin.audit import MAX_SHOWN, Audit, Entry
from gateway.admin.contract import Operated
from gateway.admin.events import Events
from gateway.admin.handler import Answer, Handler, Request, as_json
from gateway.admin.keys import Keys
from gateway.admin.requests import Requests
from gateway.errors import GatewayError, Headers, InvalidRequest, MethodNotAllowed, Unavailable, UnknownUrl, as_gateway_error, render
from gateway.form import FORM
from gateway.telemetry import exposition
from gateway.telemetry.record import Record
from gateway.wire import body
from gateway.wire.asgi import Message, Receive, Scope, Send, header
from gateway.wire.visible import visible

log = logging.getLogger("penstock.admin")

_TEXT = b"text/plain; version=0.0.4; charset=utf-8"
_OPENMETRICS = b"application/openmetrics-text; version=1.0.0; charset=utf-8"
MAX_BODY = 64 << 10
_EVENTS = "/admin/events"
# What it follows, by the name of its events.
_SHOWN = {
    "ready": "/readyz",
    "workers": "/admin/workers",
    "hosts": "/admin/hosts",
    "keys": "/admin/keys",
    "usage": "/admin/usage",
    "requests": "/admin/requests",
}


# What a change is about, as it stands.
Subject = Callable[[Request], Awaitable[Any]]


class Route(NamedTuple):
    """A path as a pattern, who answers to which method, and what its changes are about."""

    pattern: re.Pattern[str]
    handlers: Mapping[str, Handler]
    subject: Subject | None = None


class Api:
    """The admin API of a process, as an ASGI application."""

    def __init__(self, process: Operated, kept: Audit) -> None:
        self._process = process
        self._access = Access(process)
        self._audit = kept
        self._routes = _table(process, kept)
        self._pages = pages.of_console()
        shown = {name: self._handler(path) for name, path in _SHOWN.items()}
        self._events = Events(shown, lambda error: log.error("an event could not be made: unforeseen", exc_info=error))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        record = Record(scope)
        headers = [(b"x-request-id", record.request_id.encode("latin-1"))]
        who = NOBODY
        try:
            who = await self._access.identify(scope)
            check(who, scope)
            if record.path in self._pages:
                await self._pages[record.path](scope, receive, send)
                return
            if record.path == _EVENTS:
                if record.method != "GET":
                    raise MethodNotAllowed(record.method, record.path, ["GET"])
                await self._follow(scope, send, record, who, headers)
                return
            status, kind, content = await self._answer(scope, receive, record, who)
            headers += [(b"content-type", kind), (b"content-length", b"%d" % len(content))]
        except Exception as raised:
            error: GatewayError = as_gateway_error(raised)
            if error is not raised:
                log.exception("%s: unforeseen", record.request_id)
            status, rendered, content = render(error, record.request_id)
            headers += rendered
        self._say(record, who, status)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _say(self, record: Record, who: Operator, status: int) -> None:
        if record.path.startswith("/admin"):
            # Whatever an operator changes is written, however many there are; who looks every second, or has no key, fills no log.
            more = {"fields": {"audit": True, "operator": who.name}, "always": bool(who.name) and record.method != "GET"}
            sent = visible(record.url)
            log.info("%s %s by %s from %s: %d", record.method, sent, who.name or "nobody", record.client, status, extra=more)

    def _handler(self, path: str) -> Handler:
        return next(route.handlers["GET"] for route in self._routes if route.pattern.fullmatch(path))

    async def _follow(self, scope: Scope, send: Send, record: Record, who: Operator, headers: Headers) -> None:
        async def allowed() -> None:
            check(await self._access.identify(scope), scope)

        def begun(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                self._say(record, who, message["status"])
            return send(message)

        await self._events.serve(scope, begun, _query(scope), headers, allowed)

    async def _answer(self, scope: Scope, receive: Receive, record: Record, who: Operator) -> Answer:
        method, path = scope["method"], record.path
        for route in self._routes:
            found = route.pattern.fullmatch(path)
            if found is None:
                continue
            handler = route.handlers.get(method)
            if handler is None:
                raise MethodNotAllowed(method, path, list(route.handlers))
            reading = method == "GET"
            content = b"" if reading else await body.read(receive, MAX_BODY, self._process.settings.timeouts.body_s, None)
            accept = (header(scope, b"accept") or b"").decode("latin-1")
            request = Request(found.groupdict(), _query(scope), content, accept, who.name, who.role)
            return await handler(request) if reading else await self._change(handler, request, route.subject, record, who)
        raise UnknownUrl(method, path)

    async def _change(self, handler: Handler, request: Request, subject: Subject | None, record: Record, who: Operator) -> Answer:
        before = await _as_it_stands(subject, request)
        status = 500
        try:
            answer = await handler(request)
            status = answer[0]
            return answer
        except Exception as raised:
            status = as_gateway_error(raised).status
            raise
        finally:
            before, after = _difference(before, await _as_it_stands(subject, request))
            what = f"{record.method} {visible(record.url)}"
            self._audit.write(Entry(audit.now(), who.name, record.client, record.request_id, what, status, before, after))


def _query(scope: Scope) -> dict[str, str]:
    return dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))


async def _as_it_stands(subject: Subject | None, request: Request) -> Any:
    """What a change is about; None where it cannot be read, which the change itself will say."""
    if subject is None:
        return None
    try:
        return msgspec.to_builtins(await subject(request))
    except Exception:
        return None


def _difference(before: Any, after: Any) -> tuple[Any, Any]:
    """Of two mappings what differs; of anything else both."""
    if not isinstance(before, dict) or not isinstance(after, dict):
        return before, after
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return {name: before[name] for name in names if name in before}, {name: after[name] for name in names if name in after}


def _table(process: Operated, kept: Audit) -> list[Route]:
    """Every path of the admin API."""

    async def show_metrics(request: Request) -> Answer:
        _, counts = await process.look()
        if "application/openmetrics-text" in request.accept:
            return 200, _OPENMETRICS, exposition.render_openmetrics(counts, process.exemplars())
        return 200, _TEXT, exposition.render(counts)

    async def show_workers(request: Request) -> Answer:
        workers, _ = await process.look()
        return as_json({"workers": workers})

    async def show_config(request: Request) -> Answer:
        return as_json({"version": __version__, "form": FORM, "values": process.effective()})

    async def show_hosts(request: Request) -> Answer:
        return as_json({"hosts": await process.hosts()})

    def drain(drained: bool) -> Handler:
        async def change(request: Request) -> Answer:
            target = request.parts["host"]
            if not await process.drain(target, drained):
                known = ", ".join(row.id for row in await process.hosts())
                raise InvalidRequest(f"There is no host '{target}'. Known: {known or 'none'}.", status=404, code="unknown_host")
            return await show_hosts(request)

        return change

    async def reload(request: Request) -> Answer:
        done = await process.reload("the operator asked")
        return as_json(done, 200 if done.ok else 400)

    async def show_sentinel(request: Request) -> Answer:
        found = process.judged()
        if request.role != "all":  # what clients were answered is for whoever may do everything
            found["examples"] = []
        return as_json(found)

    async def show_operator(request: Request) -> Answer:
        return as_json({"name": request.operator, "role": request.role})

    async def livez(request: Request) -> Answer:
        return as_json({"status": "alive"})

    async def readyz(request: Request) -> Answer:
        workers, _ = await process.look()
        serving = [worker for worker in workers if worker.state == "serving"]
        if not serving:
            raise Unavailable("No worker serves now.", code="shutting_down")
        if waiting := [worker.waiting for worker in serving if worker.waiting]:
            raise Unavailable(waiting[0], code="engine_unavailable", retry_after_s=5)
        return as_json({"status": "ready"})

    async def show_audit(request: Request) -> Answer:
        count = request.query.get("last", "100")
        if not count.isdecimal() or not 1 <= int(count) <= MAX_SHOWN:
            raise InvalidRequest(f"'last' must be 1 to {MAX_SHOWN}.", param="last", code="invalid_value")
        return as_json({"audit": await asyncio.to_thread(kept.last, int(count))})

    async def host(request: Request) -> Any:
        row = next((row for row in await process.hosts() if row.id == request.parts["host"]), None)
        return {"state": row.state} if row is not None else None

    async def key(request: Request) -> Any:
        name = request.parts.get("name") or msgspec.json.decode(request.content)["name"]
        stored = process.stored_keys()
        found = (await stored.keys())[0].get(name) if stored is not None else None
        return shown(found, "stored") if found is not None else None

    async def configuration(request: Request) -> Any:
        return {row["key"]: row["value"] for row in process.effective()}

    keys, requests = Keys(process), Requests(process)
    rows: list[tuple[str, dict[str, Handler], Subject | None]] = [
        ("/metrics", {"GET": show_metrics}, None),
        ("/admin/workers", {"GET": show_workers}, None),
        ("/admin/hosts", {"GET": show_hosts}, None),
        ("/admin/hosts/(?P<host>.+)/drain", {"POST": drain(True)}, host),
        ("/admin/hosts/(?P<host>.+)/undrain", {"POST": drain(False)}, host),
        ("/admin/config", {"GET": show_config}, None),
        ("/admin/reload", {"POST": reload}, configuration),
        ("/admin/keys", {"GET": keys.show, "POST": keys.create}, key),
        ("/admin/stored-keys", {"GET": keys.export, "POST": keys.take}, None),
        ("/admin/stored-keys/restore", {"POST": keys.restore}, None),
        ("/admin/keys/(?P<name>[^/]+)", {"PATCH": keys.edit, "DELETE": keys.revoke}, key),
        ("/admin/keys/(?P<name>[^/]+)/rotate", {"POST": keys.rotate}, key),
        ("/admin/usage", {"GET": usage.handler(process)}, None),
        ("/admin/requests", {"GET": requests.show}, None),
        ("/admin/requests/(?P<id>[^/]+)", {"GET": requests.explain}, None),
        ("/admin/sentinel", {"GET": show_sentinel}, None),
        ("/admin/operator", {"GET": show_operator}, None),
        ("/admin/audit", {"GET": show_audit}, None),
        ("/livez", {"GET": livez}, None),
        ("/readyz", {"GET": readyz}, None),
    ]
    return [Route(re.compile(pattern), handlers, subject) for pattern, handlers, subject in rows]
