"""The admin API as an ASGI application: what there is, and how it is answered. The parent serves it, so that it is there whatever the
workers do, on a listener of its own; nothing here is reachable from the public one.
"""

from __future__ import annotations

import logging
import re
from urllib.parse import parse_qsl

from gateway import __version__
from gateway.admin import usage
from gateway.admin.access import Access
from gateway.admin.contract import Operated
from gateway.admin.handler import Answer, Handler, Request, as_json, from_store
from gateway.admin.keys import Keys
from gateway.errors import GatewayError, InvalidRequest, MethodNotAllowed, Unavailable, UnknownUrl, as_gateway_error, render
from gateway.form import FORM
from gateway.telemetry import metrics
from gateway.telemetry import ring as records
from gateway.telemetry.record import Record
from gateway.wire import body
from gateway.wire.asgi import App, Receive, Scope, Send, header
from gateway.wire.visible import visible, visible_values

log = logging.getLogger("penstock.admin")

_TEXT = b"text/plain; version=0.0.4; charset=utf-8"
_OPENMETRICS = b"application/openmetrics-text; version=1.0.0; charset=utf-8"
MAX_BODY = 64 << 10


def build(process: Operated) -> App:
    """The admin API of this process."""
    table = _table(process)
    access = Access(process)

    async def answer(scope: Scope, receive: Receive, record: Record) -> Answer:
        method, path = scope["method"], record.path
        await access.admit(scope)
        for pattern, handlers in table:
            found = pattern.fullmatch(path)
            if found is None:
                continue
            if method not in handlers:
                raise MethodNotAllowed(method, path, list(handlers))
            content = b"" if method == "GET" else await body.read(receive, MAX_BODY, process.settings.timeouts.body_s, None)
            query = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
            accept = (header(scope, b"accept") or b"").decode("latin-1")
            return await handlers[method](Request(found.groupdict(), query, content, accept))
        raise UnknownUrl(method, path)

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        record = Record(scope)
        headers = [(b"x-request-id", record.request_id.encode("latin-1"))]
        try:
            status, kind, content = await answer(scope, receive, record)
            headers += [(b"content-type", kind), (b"content-length", b"%d" % len(content))]
        except Exception as raised:
            error: GatewayError = as_gateway_error(raised)
            if error is not raised:
                log.exception("%s: unforeseen", record.request_id)
            status, rendered, content = render(error, record.request_id)
            headers += rendered
        if record.path.startswith("/admin"):
            # However many there are of what was done; of what was refused a flood is nobody's history.
            more = {"fields": {"audit": True}, "always": status < 400}
            log.info("%s %s from %s: %d", record.method, visible(record.url), record.client, status, extra=more)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    return serve


def _table(process: Operated) -> list[tuple[re.Pattern[str], dict[str, Handler]]]:
    """Every path of the admin API: a pattern, and who answers to which method."""

    async def show_metrics(request: Request) -> Answer:
        _, counts = await process.look()
        if "application/openmetrics-text" in request.accept:
            return 200, _OPENMETRICS, metrics.render_openmetrics(counts, process.exemplars())
        return 200, _TEXT, metrics.render(counts)

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

    async def explain(request: Request) -> Answer:
        name = request.parts["id"]
        found = await from_store(process.find(name))
        if found is None:
            raise InvalidRequest(
                f"No request '{name[:80]}' is known. Each worker remembers its last {records.KEPT}, and Redis the last of all.",
                status=404,
                code="unknown_request",
            )
        if request.query.get("format") == "text":
            return 200, b"text/plain; charset=utf-8", f"{records.readable(visible_values(found))}\n".encode()
        return as_json(found)

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

    keys = Keys(process)
    rows: list[tuple[str, dict[str, Handler]]] = [
        ("/metrics", {"GET": show_metrics}),
        ("/admin/workers", {"GET": show_workers}),
        ("/admin/hosts", {"GET": show_hosts}),
        ("/admin/hosts/(?P<host>.+)/drain", {"POST": drain(True)}),
        ("/admin/hosts/(?P<host>.+)/undrain", {"POST": drain(False)}),
        ("/admin/config", {"GET": show_config}),
        ("/admin/reload", {"POST": reload}),
        ("/admin/keys", {"GET": keys.show, "POST": keys.create}),
        ("/admin/keys/(?P<name>[^/]+)", {"DELETE": keys.revoke}),
        ("/admin/keys/(?P<name>[^/]+)/rotate", {"POST": keys.rotate}),
        ("/admin/usage", {"GET": usage.handler(process)}),
        ("/admin/requests/(?P<id>[^/]+)", {"GET": explain}),
        ("/livez", {"GET": livez}),
        ("/readyz", {"GET": readyz}),
    ]
    return [(re.compile(pattern), handlers) for pattern, handlers in rows]
