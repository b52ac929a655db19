"""Cross-origin requests, by configuration: without `security.cors.origins` no header is sent and browsers keep pages out."""

from __future__ import annotations

from collections.abc import Awaitable

from gateway.config import Cors as CorsSettings
from gateway.errors import Headers
from gateway.wire.asgi import App, Message, Receive, Scope, Send, header

# What a page may read beside the body: ids, and when to come again.
_EXPOSED = b", ".join(
    [b"x-request-id", b"x-trace-id", b"openai-processing-ms", b"retry-after", b"retry-after-ms", b"x-should-retry"]
    + [b"x-ratelimit-%s-%s" % (what, of) for what in (b"limit", b"remaining", b"reset") for of in (b"requests", b"tokens")]
)
_METHODS = b"GET, HEAD, POST"


class Cors:
    """Answers preflights, and marks answers for pages of allowed origins. Keys travel in headers, so cookies are never allowed."""

    def __init__(self, app: App, settings: CorsSettings) -> None:
        self._app = app
        self._origins = {origin.encode() for origin in settings.origins}
        self._max_age = b"%d" % settings.max_age_s

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        origin = header(scope, b"origin") if self._origins else None
        return self._app(scope, receive, send) if origin is None else self._of_a_page(origin, scope, receive, send)

    async def _of_a_page(self, origin: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        headers = self._allowed(origin)
        if scope["method"] == "OPTIONS" and header(scope, b"access-control-request-method"):
            await send({"type": "http.response.start", "status": 204, "headers": headers + self._preflight(scope) if headers else []})
            await send({"type": "http.response.body", "body": b""})
            return

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *headers, (b"vary", b"origin")]
            await send(message)

        await self._app(scope, receive, send_marked)

    def _allowed(self, origin: bytes) -> Headers:
        if b"*" in self._origins:
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", _EXPOSED)]
        if origin in self._origins:
            return [(b"access-control-allow-origin", origin), (b"access-control-expose-headers", _EXPOSED)]
        return []

    def _preflight(self, scope: Scope) -> Headers:
        """Whatever headers a page asks to send may be sent: none but the key is read, and none but the trace's is passed on."""
        headers = [(b"access-control-allow-methods", _METHODS), (b"access-control-max-age", self._max_age), (b"vary", b"origin")]
        asked = header(scope, b"access-control-request-headers")
        return [*headers, (b"access-control-allow-headers", asked)] if asked else headers
