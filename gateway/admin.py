"""The operator's door: metrics, what the processes do, reload. It is the parent's, so that it is open whatever the workers do.

Plain ASGI on a listener of its own; nothing here is reachable from the public one. Without a key it stands on loopback only, where the
`Host` header keeps web pages out (a name that somebody's DNS points at 127.0.0.1 is not ours).
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import msgspec

from gateway import context, metrics
from gateway.config import Settings, admin_address, is_loopback
from gateway.context import RequestContext
from gateway.errors import GatewayError, InvalidKey, InvalidRequest, MethodNotAllowed, Unavailable, UnknownUrl, as_gateway_error, render
from gateway.metrics import Snapshot
from gateway.pool import HostView
from gateway.wire.asgi import App, Receive, Scope, Send

log = logging.getLogger("penstock.admin")

_JSON = b"application/json"
_TEXT = b"text/plain; version=0.0.4; charset=utf-8"
# What asks nothing of the operator.
_OPEN = frozenset({"/livez", "/readyz"})
Answer = tuple[int, bytes, bytes]


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

    async def hosts(self) -> Sequence[HostView]:
        """Every host, how it is and why."""

    async def drain(self, target: str, drained: bool) -> bool:
        """Give a host no new requests, or give it some again; False where there is no such host."""

    def effective(self) -> list[dict[str, Any]]:
        """Every effective value with its origin, secrets masked."""

    async def reload(self, why: str) -> Reloaded:
        """Read the configuration again and roll the workers; a bad one changes nothing."""


class Forbidden(InvalidRequest):
    """A browser's page may not operate a gateway that needs no key."""

    status = 403
    code = "unknown_host"


def build(parent: Operated) -> App:
    """The door as an ASGI application."""

    async def show_metrics() -> Answer:
        _, counts = await parent.look()
        return 200, _TEXT, metrics.render(counts)

    async def show_workers() -> Answer:
        workers, _ = await parent.look()
        return 200, _JSON, msgspec.json.encode({"workers": workers})

    async def show_config() -> Answer:
        return 200, _JSON, msgspec.json.encode({"values": parent.effective()})

    async def show_hosts() -> Answer:
        return 200, _JSON, msgspec.json.encode({"hosts": await parent.hosts()})

    async def drain(path: str) -> Answer:
        target, _, verb = path.removeprefix("/admin/hosts/").rpartition("/")
        if not await parent.drain(target, verb == "drain"):
            known = ", ".join(row.id for row in await parent.hosts())
            raise InvalidRequest(f"There is no host '{target}'. Known: {known or 'none'}.", status=404, code="unknown_host")
        return await show_hosts()

    async def reload() -> Answer:
        done = await parent.reload("the operator asked")
        return 200 if done.ok else 400, _JSON, msgspec.json.encode(done)

    async def livez() -> Answer:
        return 200, _JSON, b'{"status":"alive"}'

    async def readyz() -> Answer:
        workers, _ = await parent.look()
        serving = [worker for worker in workers if worker.state == "serving"]
        if not serving:
            raise Unavailable("No worker serves now.", code="shutting_down")
        if waiting := [worker.waiting for worker in serving if worker.waiting]:
            raise Unavailable(waiting[0], code="engine_unavailable", retry_after_s=5)
        return 200, _JSON, b'{"status":"ready"}'

    table: dict[str, tuple[str, Callable[[], Awaitable[Answer]]]] = {
        "/metrics": ("GET", show_metrics),
        "/admin/workers": ("GET", show_workers),
        "/admin/hosts": ("GET", show_hosts),
        "/admin/config": ("GET", show_config),
        "/admin/reload": ("POST", reload),
        "/livez": ("GET", livez),
        "/readyz": ("GET", readyz),
    }

    async def answer(scope: Scope, record: RequestContext) -> Answer:
        method, path = scope["method"], record.path
        if path not in _OPEN:
            _admit(scope, parent.settings)
        if path.startswith("/admin/hosts/") and path.endswith(("/drain", "/undrain")):
            if method != "POST":
                raise MethodNotAllowed(method, path, ["POST"])
            return await drain(path)
        if path not in table:
            raise UnknownUrl(method, path)
        allowed, handler = table[path]
        if method != allowed:
            raise MethodNotAllowed(method, path, [allowed])
        return await handler()

    async def door(scope: Scope, receive: Receive, send: Send) -> None:
        record = context.RequestContext(scope)
        headers = [(b"x-request-id", record.request_id.encode("latin-1"))]
        try:
            status, kind, content = await answer(scope, record)
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


def _admit(scope: Scope, settings: Settings) -> None:
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
    scheme, _, secret = (context.header(scope, b"authorization") or b"").partition(b" ")
    digest = hashlib.sha256(secret.strip()).digest()
    if scheme.lower() != b"bearer" or not sum(hmac.compare_digest(digest, key) for key in known):
        raise InvalidKey


def _refuse_pages(scope: Scope, settings: Settings) -> None:
    host = (context.header(scope, b"host") or b"").decode("latin-1").rpartition(":")
    name = (host[0] if host[2].isdigit() else "".join(host)).strip("[]")
    address = admin_address(settings.listen)
    if not is_loopback(name) and (address is None or name != address[0]):
        raise Forbidden(f"The host '{name}' is not this gateway's; ask for it by its own address.")
