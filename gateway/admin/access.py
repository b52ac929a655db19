"""Who may use the admin API: who has the admin key, which there always is. A key alone is not enough for a browser, which sends what it is
made to by any page: requests that a page of another origin makes are refused whatever they carry."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from gateway.admin.contract import Operated
from gateway.config import Settings, admin_address, is_loopback
from gateway.errors import InvalidRequest, Unavailable
from gateway.pages import CONSOLE, CONSOLE_FILES
from gateway.wire import origin
from gateway.wire.asgi import Scope, header

# What asks nothing of the operator: probes, and the console, which shows nothing until it is given a key.
OPEN = frozenset({"/livez", "/readyz", CONSOLE})
READING = frozenset({"GET", "HEAD"})
# Of one address within a minute: failures that cost nothing, the longest wait, and how many addresses are remembered.
FREE_FAILURES, FORGIVEN_AFTER_S, LONGEST_WAIT_S, MAX_REMEMBERED = 3, 60.0, 8.0, 1000


class WrongKey(InvalidRequest):
    """Missing or wrong: the same answer for both."""

    status = 401
    code = "invalid_api_key"

    def __init__(self) -> None:
        super().__init__(
            "Incorrect admin key. Send it as 'Authorization: Bearer KEY'; on the gateway's own machine `penstock` finds it by itself.",
            headers=[(b"www-authenticate", b"Bearer")],
        )


class UnknownHost(InvalidRequest):
    """Asked for under a name that is not ours, and without a key."""

    status = 403
    code = "unknown_host"


class NotJson(InvalidRequest):
    """What changes something says what it is, which no page can without asking first."""

    status = 415
    code = "unsupported_media_type"


class Operator(NamedTuple):
    """Whose key it is, and what it may: `read`, `keys` (and read) or `all`; `metrics` is one that is known at those alone."""

    name: str
    role: str


class Forbidden(InvalidRequest):
    """The key is good, and not for this."""

    status = 403
    code = "insufficient_role"

    def __init__(self, operator: Operator) -> None:
        super().__init__(f"The admin key '{operator.name}' has the role '{operator.role}', which may not do this.")


# Who reads what wants no key.
NOBODY = Operator("", "metrics")


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
        if len(self._failures) > MAX_REMEMBERED:
            self._failures.popitem(last=False)
        if count > FREE_FAILURES:
            await asyncio.sleep(min(0.5 * 2 ** (count - FREE_FAILURES - 1), LONGEST_WAIT_S))


class Access:
    """Lets a request to the admin API pass, or says why not."""

    def __init__(self, process: Operated) -> None:
        self._process = process
        self._throttle = Throttle()

    async def identify(self, scope: Scope) -> Operator:
        """Who asks; raises CrossSite, UnknownHost, WrongKey, or Unavailable where there is no key at all."""
        settings = self._process.settings
        if origin.cross_site(scope):
            raise origin.CrossSite("This request comes from a web page of another origin, which may not use the admin API.")
        if scope["path"] in OPEN or scope["path"].startswith(CONSOLE_FILES):
            return NOBODY
        if scope["path"] == "/metrics" and scope["method"] in READING and open_metrics(settings):
            if not self._own(origin.host_name(scope), settings):
                raise UnknownHost("This is not the name of this gateway's admin API; ask for it by its own address.")
            return NOBODY
        return await self._whose(scope, settings)

    def _own(self, name: str, settings: Settings) -> bool:
        address = admin_address(settings.listen)
        return is_loopback(name) or (address is not None and name == address[0])

    def _known(self, path: str, settings: Settings) -> Iterator[tuple[str, Operator]]:
        """Hashes, and whose they are."""
        admin = settings.admin
        if admin.key_hash is not None:
            yield admin.key_hash, Operator("admin", "all")
        elif made := self._process.made_key_hash():
            yield made, Operator("local", "all")
        for key in admin.keys:
            yield key.hash, Operator(key.name, key.role)
        if admin.metrics_key_hash is not None and path == "/metrics":
            yield admin.metrics_key_hash, Operator("metrics", "metrics")

    async def _whose(self, scope: Scope, settings: Settings) -> Operator:
        known = list(self._known(scope["path"], settings))
        if not known:
            raise Unavailable("There is no admin key, and none could be made: the gateway's log says why.", code="no_admin_key")
        sent = header(scope, b"authorization")
        if sent is None:  # which is no guess
            raise WrongKey
        scheme, _, secret = sent.partition(b" ")
        digest = hashlib.sha256(secret.strip()).digest()
        # All of them are compared, whichever it is.
        found = [who for expected, who in known if hmac.compare_digest(digest, bytes.fromhex(expected.removeprefix("sha256:")))]
        if scheme.lower() != b"bearer" or not found:
            await self._throttle.failed(scope["client"][0] if scope.get("client") else "")
            raise WrongKey
        return found[0]


def check(operator: Operator, scope: Scope) -> None:
    """Whether this may be asked by whoever asks; raises Forbidden or NotJson."""
    path: str = scope["path"]
    of_keys = path.startswith(("/admin/keys", "/admin/stored-keys"))
    if scope["method"] in READING or path in OPEN:
        if operator.role == "read" and path.startswith("/admin/stored-keys"):  # hashes are in it
            raise Forbidden(operator)
        return
    if operator.role != "all" and not (operator.role == "keys" and of_keys):
        raise Forbidden(operator)
    if (header(scope, b"content-type") or b"").partition(b";")[0].strip().lower() != b"application/json":
        raise NotJson("What changes something must have 'content-type: application/json', with or without a body.")


def open_metrics(settings: Settings) -> bool:
    """Whether `/metrics` may be read without a key: on loopback, where no key was chosen for it. Other users of the machine can read it
    then; pages cannot."""
    address = admin_address(settings.listen)
    chosen = settings.admin.key_hash or settings.admin.metrics_key_hash or settings.admin.keys
    return address is not None and is_loopback(address[0]) and not chosen
