"""What the admin API shows, as it changes: `GET /admin/events`, server-sent events for the console.

Each event is named after a resource and its data is what a GET of that resource answers, errors included; it is sent when it differs from
what was sent last. `state`, `last`, `key` and the others say which requests, as for `/admin/requests`, but of this gateway alone by
default; `every_s` how often to look.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping

from gateway.admin.handler import Handler, Request
from gateway.admin.requests import sought_by
from gateway.errors import GatewayError, Headers, InvalidRequest, Unavailable, as_gateway_error, render
from gateway.wire.asgi import CONNECTION, Connection, Scope, Send

# Each open stream has every worker asked a few times a second.
MAX_STREAMS = 16
_EVERY_S, _OFTEN_S, _SELDOM_S = 1.0, 0.2, 60.0


class Events:
    """The streams of one gateway. `shown`: the handler of each resource, by its event's name."""

    def __init__(self, shown: Mapping[str, Handler], failed: Callable[[Exception], None]) -> None:
        self._shown = shown
        self._failed = failed
        self._open = 0

    async def serve(
        self, scope: Scope, send: Send, query: Mapping[str, str], headers: Headers, allowed: Callable[[], Awaitable[None]]
    ) -> None:
        """One stream, until its client leaves, the gateway ends, or `allowed` raises, since keys change while streams are open. Raises
        InvalidRequest, or Unavailable where too many are open."""
        requests = dict(query)
        every_s = _seconds(requests.pop("every_s", f"{_EVERY_S}"))
        requests.setdefault("of", "gateway")  # the store is not asked as often as that
        sought_by(requests)
        if self._open >= MAX_STREAMS:
            raise Unavailable(f"{MAX_STREAMS} streams of events are open already.", code="too_many_streams", retry_after_s=5)
        connection: Connection = scope[CONNECTION]
        gone = asyncio.Event()
        self._open += 1
        try:
            connection.watch(gone.set)
            sent = [*headers, (b"content-type", b"text/event-stream"), (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
            await send({"type": "http.response.start", "status": 200, "headers": sent})
            with contextlib.suppress(GatewayError):
                await self._follow(send, requests, every_s, gone, allowed)
            connection.watch(None)
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._open -= 1

    async def _follow(
        self, send: Send, requests: Mapping[str, str], every_s: float, gone: asyncio.Event, allowed: Callable[[], Awaitable[None]]
    ) -> None:
        known: dict[str, bytes] = {}
        while not gone.is_set():
            await allowed()
            changed = []
            for name, handler in self._shown.items():
                content = await self._look(name, handler, requests)
                if known.get(name) != content:
                    known[name] = content
                    changed.append(b"event: %b\ndata: %b\n\n" % (name.encode(), content))
            # A comment where nothing has changed: a client that is gone without a word is noticed by what it is sent.
            await send({"type": "http.response.body", "body": b"".join(changed) or b":\n\n", "more_body": True})
            try:
                async with asyncio.timeout(every_s):
                    await gone.wait()
            except TimeoutError:
                continue

    async def _look(self, name: str, handler: Handler, requests: Mapping[str, str]) -> bytes:
        query = requests if name == "requests" else {"by": "key"} if name == "usage" else {}
        try:
            return (await handler(Request({}, query, b"")))[2]
        except Exception as raised:
            error = as_gateway_error(raised)
            if error is not raised:
                self._failed(raised)
            return render(error)[2]


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not _OFTEN_S <= found <= _SELDOM_S:
        raise InvalidRequest(
            f"'every_s' must be {_OFTEN_S:g} to {_SELDOM_S:g} seconds, got '{text[:80]}'.", param="every_s", code="invalid_value"
        )
    return found
