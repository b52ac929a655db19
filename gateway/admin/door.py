"""The operator's door: who may pass, and what is behind it. It is the parent's, so that it is open whatever the workers do.

Plain ASGI on a listener of its own; nothing here is reachable from the public one. Without a key it stands on loopback only, where the
`Host` header keeps web pages out (a name that somebody's DNS points at 127.0.0.1 is not ours).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol
from urllib.parse import parse_qsl

import msgspec

from gateway.access.ledger import Rows
from gateway.admin import usage
from gateway.admin.asked import Answer, Asked, Handler, StoredKeys, as_json, from_store
from gateway.admin.keys import Keys
from gateway.config import Settings, admin_address, is_loopback
from gateway.errors import GatewayError, InvalidKey, InvalidRequest, MethodNotAllowed, Unavailable, UnknownUrl, as_gateway_error, render
from gateway.serving.pool import HostView
from gateway.telemetry import metrics
from gateway.telemetry import ring as records
from gateway.telemetry.metrics import Exemplars, Snapshot
from gateway.telemetry.record import Record
from gateway.wire import body
from gateway.wire.asgi import App, Receive, Scope, Send, header

log = logging.getLogger("penstock.admin")

_TEXT = b"text/plain; version=0.0.4; charset=utf-8"
# What asks nothing of the operator.
_OPENMETRICS = b"application/openmetrics-text; version=1.0.0; charset=utf-8"
_OPEN = frozenset({"/livez", "/readyz"})
_MAX_BODY = 64 << 10
# Of one address within a minute: failures that cost nothing, the longest wait, and how many addresses are remembered.
FREE_FAILURES, FORGIVEN_AFTER_S, LONGEST_WAIT_S, _REMEMBERED = 3, 60.0, 8.0, 1000


class WorkerView(msgspec.Struct, frozen=True):
    """One worker, as `/admin/workers` shows it."""

    pid: int
    generation: int
    state: str
    up_s: float
    open: int
    oldest_s: float
    resident_bytes: int
    waiting: str


class Reloaded(msgspec.Struct, frozen=True):
    """What became of a reload: the generation that serves now, and what was wrong with the new configuration."""

    ok: bool
    generation: int
    problem: str = ""


# States of a host, from the best to the gravest.
GRAVITY = ("ok", "full", "probation", "draining", "drained", "ejected", "down", "not ready")


class Operated(Protocol):
    """What the door opens to."""

    @property
    def settings(self) -> Settings:
        """Those in force."""

    async def look(self) -> tuple[Sequence[WorkerView], Snapshot]:
        """Every worker now, and everybody's counts together."""

    def exemplars(self) -> Exemplars:
        """Traces as examples of what was counted, as of the last look."""

    async def hosts(self) -> Sequence[HostView]:
        """Every host, how it is and why."""

    async def drain(self, target: str, drained: bool) -> bool:
        """Give a host no new requests, or give it some again; False where there is no such host."""

    def effective(self) -> list[dict[str, Any]]:
        """Every effective value with its origin, secrets masked."""

    async def find(self, name: str) -> dict[str, Any] | None:
        """What became of the request of this id; None where it is not known, or not any more."""

    def stored_keys(self) -> StoredKeys | None:
        """Where keys are made; None without Redis."""

    async def usage(self, first: str, last: str) -> Rows:
        """The ledger of these days, both included."""

    async def reload(self, why: str) -> Reloaded:
        """Read the configuration again and roll the workers; a bad one changes nothing."""


class Forbidden(InvalidRequest):
    """A browser's page may not operate a gateway that needs no key."""

    status = 403
    code = "unknown_host"


def build(parent: Operated) -> App:
    """The door as an ASGI application."""
    table = _table(parent)
    slow = Slow()

    async def answer(scope: Scope, receive: Receive, record: Record) -> Answer:
        method, path = scope["method"], record.path
        if path not in _OPEN:
            await _admit(scope, parent.settings, slow)
        for pattern, handlers in table:
            found = pattern.fullmatch(path)
            if found is None:
                continue
            if method not in handlers:
                raise MethodNotAllowed(method, path, list(handlers))
            content = await body.read(receive, _MAX_BODY, parent.settings.timeouts.body_s, None) if method == "POST" else b""
            query = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
            accept = (header(scope, b"accept") or b"").decode("latin-1")
            return await handlers[method](Asked(found.groupdict(), query, content, accept))
        raise UnknownUrl(method, path)

    async def door(scope: Scope, receive: Receive, send: Send) -> None:
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
            log.info("%s %s from %s: %d", record.method, record.target_sent, record.client, status, extra={"fields": {"audit": True}})
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    return door


def _table(parent: Operated) -> list[tuple[re.Pattern[str], dict[str, Handler]]]:
    """Every path of the door: a pattern, and who answers to which method."""

    async def show_metrics(asked: Asked) -> Answer:
        _, counts = await parent.look()
        if "application/openmetrics-text" in asked.accept:
            return 200, _OPENMETRICS, metrics.render_openmetrics(counts, parent.exemplars())
        return 200, _TEXT, metrics.render(counts)

    async def show_workers(asked: Asked) -> Answer:
        workers, _ = await parent.look()
        return as_json({"workers": workers})

    async def show_config(asked: Asked) -> Answer:
        return as_json({"values": parent.effective()})

    async def show_hosts(asked: Asked) -> Answer:
        return as_json({"hosts": await parent.hosts()})

    def drain(drained: bool) -> Handler:
        async def change(asked: Asked) -> Answer:
            target = asked.parts["host"]
            if not await parent.drain(target, drained):
                known = ", ".join(row.id for row in await parent.hosts())
                raise InvalidRequest(f"There is no host '{target}'. Known: {known or 'none'}.", status=404, code="unknown_host")
            return await show_hosts(asked)

        return change

    async def reload(asked: Asked) -> Answer:
        done = await parent.reload("the operator asked")
        return as_json(done, 200 if done.ok else 400)

    async def explain(asked: Asked) -> Answer:
        name = asked.parts["id"]
        found = await from_store(parent.find(name))
        if found is None:
            raise InvalidRequest(
                f"No request '{name[:80]}' is known. Each worker remembers its last {records.KEPT}, and Redis the last of all.",
                status=404,
                code="unknown_request",
            )
        if asked.query.get("format") == "text":
            return 200, b"text/plain; charset=utf-8", f"{records.readable(found)}\n".encode()
        return as_json(found)

    async def livez(asked: Asked) -> Answer:
        return as_json({"status": "alive"})

    async def readyz(asked: Asked) -> Answer:
        workers, _ = await parent.look()
        serving = [worker for worker in workers if worker.state == "serving"]
        if not serving:
            raise Unavailable("No worker serves now.", code="shutting_down")
        if waiting := [worker.waiting for worker in serving if worker.waiting]:
            raise Unavailable(waiting[0], code="engine_unavailable", retry_after_s=5)
        return as_json({"status": "ready"})

    desk = Keys(parent)
    rows: list[tuple[str, dict[str, Handler]]] = [
        ("/metrics", {"GET": show_metrics}),
        ("/admin/workers", {"GET": show_workers}),
        ("/admin/hosts", {"GET": show_hosts}),
        ("/admin/hosts/(?P<host>.+)/drain", {"POST": drain(True)}),
        ("/admin/hosts/(?P<host>.+)/undrain", {"POST": drain(False)}),
        ("/admin/config", {"GET": show_config}),
        ("/admin/reload", {"POST": reload}),
        ("/admin/keys", {"GET": desk.show, "POST": desk.create}),
        ("/admin/keys/(?P<name>[^/]+)", {"DELETE": desk.revoke}),
        ("/admin/keys/(?P<name>[^/]+)/rotate", {"POST": desk.rotate}),
        ("/admin/stored-keys", {"GET": desk.export, "POST": desk.take}),
        ("/admin/stored-keys/restore", {"POST": desk.restore}),
        ("/admin/usage", {"GET": usage.handler(parent)}),
        ("/admin/requests/(?P<id>[^/]+)", {"GET": explain}),
        ("/livez", {"GET": livez}),
        ("/readyz", {"GET": readyz}),
    ]
    return [(re.compile(pattern), handlers) for pattern, handlers in rows]


class Slow:
    """Whoever guesses at the operator's key waits longer each time; others do not."""

    def __init__(self) -> None:
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()

    async def failed(self, client: str) -> None:
        """Another failure from there: wait, half a second from the third on, twice as long each time."""
        now = time.monotonic()
        count, until = self._failures.pop(client, (0, 0.0))
        count = count + 1 if now < until else 1
        self._failures[client] = (count, now + FORGIVEN_AFTER_S)
        if len(self._failures) > _REMEMBERED:
            self._failures.popitem(last=False)
        if count > FREE_FAILURES:
            await asyncio.sleep(min(0.5 * 2 ** (count - FREE_FAILURES - 1), LONGEST_WAIT_S))


async def _admit(scope: Scope, settings: Settings, slow: Slow) -> None:
    """Raises InvalidKey or Forbidden."""
    keys = [settings.admin.key_hash]
    if scope["path"] == "/metrics":
        keys.append(settings.admin.metrics_key_hash)
    known = [bytes.fromhex(key.removeprefix("sha256:")) for key in keys if key is not None]
    if settings.admin.key_hash is None and scope["path"] != "/metrics":
        known = []
    if not known:
        _refuse_pages(scope, settings)
        return
    scheme, _, secret = (header(scope, b"authorization") or b"").partition(b" ")
    digest = hashlib.sha256(secret.strip()).digest()
    if scheme.lower() != b"bearer" or not sum(hmac.compare_digest(digest, key) for key in known):
        await slow.failed(scope["client"][0] if scope.get("client") else "")
        raise InvalidKey


def _refuse_pages(scope: Scope, settings: Settings) -> None:
    host = (header(scope, b"host") or b"").decode("latin-1").rpartition(":")
    name = (host[0] if host[2].isdigit() else "".join(host)).strip("[]")
    address = admin_address(settings.listen)
    if not is_loopback(name) and (address is None or name != address[0]):
        raise Forbidden(f"The host '{name}' is not this gateway's; ask for it by its own address.")
