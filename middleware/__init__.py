"""Plain ASGI around the app, so that 404 and 405 pass through it too (Litestar's own middleware list is not run on those).

`ORDER` owns the order, outermost first: every answer gets its id, pages from allowed origins may read it, every exception gets a shape
that clients parse, nothing is served to strangers, and what a request
was admitted with is settled at its end.
"""

from __future__ import annotations

from gateway.config import Settings
from gateway.life import Life
from gateway.wire.asgi import App, Receive, Scope, Send
from middleware import auth, cors, errors, rate_limit, request_id

ORDER = (request_id.RequestId, cors.Cors, errors.Errors, auth.Auth, rate_limit.RateLimit)


def wrap(app: App, settings: Settings, life: Life) -> App:
    """The app inside all middleware; what is no HTTP request (the lifespan) passes untouched."""
    wrapped = app
    for layer in reversed(ORDER):
        wrapped = layer(wrapped, settings, life)

    async def entry(scope: Scope, receive: Receive, send: Send) -> None:
        await (wrapped if scope["type"] == "http" else app)(scope, receive, send)

    return entry
