"""Addresses and URLs as they stand in a configuration: checked so that whoever uses them later cannot be surprised."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from urllib.parse import urlsplit

_LABELS = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*\.?")
_MAX_NAME = 253
# The kernel's bound on a socket's path, in bytes.
_MAX_SOCKET_PATH = 107


def is_address(text: str) -> bool:
    """Whether it is an IPv4 or IPv6 address (with a zone, such as fe80::1%eth0)."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_host(text: str) -> bool:
    """Whether it is an address, or a name that can be asked for in DNS."""
    return is_address(text) or (len(text) <= _MAX_NAME and _LABELS.fullmatch(text) is not None)


def host_port(text: str, least: int = 1) -> tuple[str, int]:
    """`HOST:PORT` in its two parts, an IPv6 address without its brackets; raises ValueError."""
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not is_host(bare) or (":" in bare) != (bare != host):
        raise ValueError("is no HOST:PORT")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and least <= int(port) <= 65535):
        raise ValueError(f"has no port from {least} to 65535")
    return bare, int(port)


def check_url(text: str, schemes: Collection[str], *, userinfo: bool = False, path: bool = False) -> None:
    """Raises ValueError, with words that follow the URL, for one that could not be used. `unix` URLs name a socket; of others a user and
    password, or a path and query, are accepted only where that is said."""
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("holds a space, or a character that is not ASCII")
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in schemes:
        raise ValueError("is no URL")
    if scheme == "unix":
        if not rest.startswith("/") or rest == "/" or len(rest) > _MAX_SOCKET_PATH or "?" in rest or "#" in rest:
            raise ValueError(f"names no socket by its absolute path, of {_MAX_SOCKET_PATH} characters at most")
        return
    try:
        parts = urlsplit(text)
        host = parts.hostname or ""
    except ValueError:
        raise ValueError("is no URL") from None
    place = parts.netloc.rpartition("@")[2]
    if not is_host(host) or (":" in host) != place.startswith("["):
        raise ValueError("names no host")
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0 or (port is None and place.endswith(":")):
        raise ValueError("has no port from 1 to 65535")
    if "@" in parts.netloc and not userinfo:
        raise ValueError("must not hold a user or a password")
    if not path and (parts.path.strip("/") or "?" in text or "#" in text):
        raise ValueError("must end after the port")
