"""Who may use the admin API. Without a key it answers on loopback only, where the `Host` header keeps web pages out (a name that somebody's
DNS points at 127.0.0.1 is not ours)."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections import OrderedDict

from gateway.config import Settings, admin_address, is_loopback
from gateway.errors import InvalidKey, InvalidRequest
from gateway.wire.asgi import Scope, header

# What asks nothing of the operator.
OPEN = frozenset({"/livez", "/readyz"})
# Of one address within a minute: failures that cost nothing, the longest wait, and how many addresses are remembered.
FREE_FAILURES, FORGIVEN_AFTER_S, LONGEST_WAIT_S, _REMEMBERED = 3, 60.0, 8.0, 1000


class Forbidden(InvalidRequest):
    """A browser's page may not operate a gateway that needs no key."""

    status = 403
    code = "unknown_host"


class Throttle:
    """Whoever guesses at the admin key waits longer each time; others do not."""

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


async def admit(scope: Scope, settings: Settings, throttle: Throttle) -> None:
    """Raises InvalidKey or Forbidden."""
    if scope["path"] in OPEN:
        return
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
        await throttle.failed(scope["client"][0] if scope.get("client") else "")
        raise InvalidKey


def _refuse_pages(scope: Scope, settings: Settings) -> None:
    host = (header(scope, b"host") or b"").decode("latin-1").rpartition(":")
    name = (host[0] if host[2].isdigit() else "".join(host)).strip("[]")
    address = admin_address(settings.listen)
    if not is_loopback(name) and (address is None or name != address[0]):
        raise Forbidden(f"The host '{name}' is not this gateway's; ask for it by its own address.")
