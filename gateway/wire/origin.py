"""Whether a web page drives a request, as far as its browser says.

A page may send simple requests to any address its browser reaches, loopback included, without leave and without reading the answer.
Browsers say so in headers that no page can change: `Origin` with everything that is not a plain GET or HEAD, and `Sec-Fetch-Site` where the
address is trusted (https, and loopback). A client that is no browser sends neither.

`Host` is the defence against a name that was made to point at this machine after its page was loaded (DNS rebinding): to the browser the
page and we are one origin then, and the name is all that tells us apart. Ports tell nothing: a tunnel may end at any.
"""

from __future__ import annotations

from collections.abc import Callable, Container

from gateway.errors import InvalidRequest
from gateway.wire.asgi import Scope

# What `Sec-Fetch-Site` says of a page of our own, and of somebody who typed the address.
_OURS = frozenset({b"same-origin", b"none"})


class CrossSite(InvalidRequest):
    """A page of another origin may not do this."""

    status = 403
    code = "cross_site"


def cross_site(scope: Scope, allowed: Container[bytes] = frozenset(), own: Callable[[str], bool] | None = None) -> bool:
    """Whether a page of another origin makes this request. `allowed`: origins that may, as browsers write them, or `*`. `own`: whether a
    page's host name is ours; without it the one that the page was loaded from is, which holds only where a key is asked for as well."""
    if b"*" in allowed:
        return False
    foreign = False
    for name, value in scope["headers"]:
        if name == b"origin":
            if value in allowed:
                return False
            foreign = foreign or not _same_origin(scope, value, own)
        elif name == b"sec-fetch-site":
            foreign = foreign or value not in _OURS
    return foreign


def host_name(scope: Scope) -> str:
    """The name or address in the `Host` header, in lower case, without port and brackets; "" where there is none, more than one, or
    something that is neither."""
    hosts: list[bytes] = [value for name, value in scope["headers"] if name == b"host"]
    if len(hosts) != 1:
        return ""
    host = hosts[0].decode("latin-1").lower()
    if host.startswith("["):
        name, bracket, port = host[1:].partition("]")
        well_formed = bracket and ":" in name and (not port or (port[0] == ":" and port[1:].isdecimal()))
    else:
        name, colon, port = host.partition(":")
        well_formed = not colon or port.isdecimal()
    return name if well_formed else ""


def _same_origin(scope: Scope, origin: bytes, own: Callable[[str], bool] | None) -> bool:
    """The scheme is not compared: who ends TLS before us leaves us with http."""
    _, separator, of_page = origin.lower().partition(b"://")
    if not separator or (b"host", of_page) not in [(name, value.lower()) for name, value in scope["headers"]]:
        return False
    return own is None or own(host_name(scope))
