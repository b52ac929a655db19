"""Bearer keys from the configuration. On for every route but those in `OPEN`: forgetting one is safe."""

from __future__ import annotations

import hashlib
import hmac

from gateway import context
from gateway.config import Settings
from gateway.errors import InvalidKey, Shape
from gateway.life import Life
from gateway.wire.asgi import App, Receive, Scope, Send

# What a load balancer or a browser asks without a key; none of it says anything that is not public.
OPEN = frozenset({"/livez", "/readyz", "/openapi.json", "/docs"})
OPEN_BELOW = "/docs/"


class Auth:
    """Lets a request pass when its key's SHA-256 is configured, or when no keys are (loopback only, see config)."""

    def __init__(self, app: App, settings: Settings, life: Life) -> None:
        self._app = app
        self._keys = [(key.name, bytes.fromhex(key.hash.removeprefix("sha256:"))) for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._keys and scope["path"] not in OPEN and not scope["path"].startswith(OPEN_BELOW):
            context.of(scope).key = self._name(scope)
        await self._app(scope, receive, send)

    def _name(self, scope: Scope) -> str:
        """Whose key this is; every configured key is compared, so that the time says nothing. Raises InvalidKey."""
        scheme, _, secret = (context.header(scope, b"authorization") or b"").partition(b" ")
        if not scheme and context.of(scope).shape is Shape.ANTHROPIC:
            scheme, secret = b"bearer", context.header(scope, b"x-api-key") or b""  # what Anthropic's SDKs send
        digest = hashlib.sha256(secret.strip()).digest()
        name = ""
        for candidate, expected in self._keys:
            if hmac.compare_digest(digest, expected):
                name = candidate
        if scheme.lower() != b"bearer" or not name:
            raise InvalidKey
        return name
