"""Bearer keys, and tokens of identity providers. On for every route but those in `OPEN`: forgetting one is safe."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from gateway.access.keys import Caller, Keys
from gateway.config import is_loopback
from gateway.errors import InvalidKey
from gateway.telemetry.record import Record
from gateway.wire import origin
from gateway.wire.asgi import App, Receive, Scope, Send, header

# What a load balancer or a browser asks without a key; none of it says anything that is not public.
OPEN = frozenset({"/", "/livez", "/readyz", "/openapi.json", "/docs"})
OPEN_BELOW = ("/docs/", "/page/")
# How every JWT begins: `{"` in base64.
_TOKEN = b"eyJ"


class Auth:
    """Lets a request pass when its key is known, or when none is required (loopback only, see config) and it comes from no foreign page;
    `origins` are those whose pages may. `token` knows whose a token is, where there are any."""

    def __init__(self, app: App, keys: Keys, origins: Sequence[str], token: Callable[[bytes], Awaitable[Caller]] | None = None) -> None:
        self._app = app
        self._keys = keys
        self._token = token
        self._origins = frozenset(allowed.encode() for allowed in origins)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        record = Record.of(scope)
        if self._keys.required and scope["path"] not in OPEN and not scope["path"].startswith(OPEN_BELOW):
            secret = _secret(scope)
            caller = self._keys.find(secret)
            if caller is None:
                return self._late(secret, scope, receive, send)
            record.caller, record.key = caller, caller.name
        else:
            record.caller = self._keys.nobody
            if scope["method"] == "POST" and origin.cross_site(scope, self._origins, is_loopback):
                raise origin.CrossSite(
                    "This request comes from a web page of an origin that may not use this gateway (security.cors.origins says which may)."
                )
        return self._app(scope, receive, send)

    async def _late(self, secret: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """With a key that is not known here: it may be a token; and one that was made a moment ago, at whatever gateway, is good at once.
        Raises InvalidKey, to a client the same for one that is unknown, revoked or expired."""
        caller: Caller | None = None
        if self._token is not None and secret.startswith(_TOKEN):
            caller = await self._token(secret)
        elif self._keys.refresh is not None:
            await self._keys.refresh()
            caller = self._keys.find(secret)
        if caller is None:
            raise InvalidKey(self._keys.why_not(secret))
        record = Record.of(scope)
        record.caller, record.key = caller, caller.name
        await self._app(scope, receive, send)


def _secret(scope: Scope) -> bytes:
    """What is sent as a key; raises InvalidKey where nothing is."""
    scheme, _, secret = (header(scope, b"authorization") or b"").partition(b" ")
    if not scheme:
        secret = header(scope, b"x-api-key") or b""  # what Anthropic's SDKs send, on whatever path
        if not secret:
            raise InvalidKey("no key was sent", sent=False)
    elif scheme.lower() != b"bearer":
        raise InvalidKey("what was sent is no bearer key")
    return secret.strip()
