"""The page at `/`, for browsers; a client that does not ask for HTML is told where the API is, as it would be without the page."""

from __future__ import annotations

from gateway import pages
from gateway.errors import UnknownUrl
from gateway.routes import Route
from gateway.serving import calls
from gateway.telemetry.record import Record
from gateway.wire.asgi import Receive, Scope, Send, header


def routes() -> tuple[Route, ...]:
    """The page, and what it loads."""
    page, files = pages.file("front.html"), pages.of_front()

    async def root(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in ("GET", "HEAD") or b"text/html" not in (header(scope, b"accept") or b""):
            host = (header(scope, b"host") or b"").decode("latin-1")
            raise calls.unknown_url(scope["method"], "/", scope.get("scheme", "http"), host)
        await page(scope, receive, send)

    async def below(scope: Scope, receive: Receive, send: Send) -> None:
        path = Record.of(scope).path
        found = files.get(path)
        if found is None:
            raise UnknownUrl(scope["method"], path)
        await found(scope, receive, send)

    return Route("", "/", root), Route("GET", pages.FRONT_FILES.rstrip("/"), below, below=True)
