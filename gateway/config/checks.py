"""Single settings that only their reader understands: what a value must be beyond its type. Each raises ValueError in words."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime
from urllib.parse import parse_qsl, urlsplit
from zoneinfo import ZoneInfo

from gateway.wire import address

# SHA-256 of nothing: whoever hashed an unset variable would let everybody in.
EMPTY_HASH = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
# What of a Redis URL's query is understood; anything else would fail when the first connection is made.
_REDIS_SCHEMES = ("redis", "rediss", "unix")
_REDIS_OPTIONS = frozenset({"db", "username", "password", "client_name"})
_REDIS_TLS_OPTIONS = frozenset({"ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname"})


def key_hash(value: str) -> None:
    """No hash of an empty key."""
    if value == EMPTY_HASH:
        raise ValueError("is the hash of an empty key (was a variable unset?)")


def host(value: str) -> None:
    """An address or a name."""
    if not address.is_host(value):
        raise ValueError("is no address and no host name")


def admin(value: str | bool) -> tuple[str, int] | None:
    """Where the admin listener is; None when it is off."""
    return None if value in ("off", False) else address.host_port(str(value), least=0)


def instant(value: str) -> float:
    """Seconds since 1970 of an ISO 8601 date, or date and time; without a zone it is UTC."""
    try:
        found = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("is no date and time") from None
    seconds = (found if found.tzinfo is not None else found.replace(tzinfo=UTC)).timestamp()
    if seconds < 0:
        raise ValueError("is before the year 1970")
    return seconds


def time_zone(value: str) -> None:
    """A zone that the system knows."""
    try:
        ZoneInfo(value)
    except (KeyError, ValueError, OSError):
        raise ValueError("is no time zone") from None


def network(value: str) -> None:
    """An address or a network."""
    try:
        ipaddress.ip_network(value)
    except ValueError:
        raise ValueError("is no address and no network") from None


def otlp_url(value: str) -> None:
    """A collector."""
    address.check_url(value, ("http", "https"), userinfo=True, path=True)


def issuer_url(value: str) -> None:
    """An identity provider, or where its keys are."""
    address.check_url(value, ("https", "http"), path=True)
    if "#" in value:
        raise ValueError("has a fragment")


def webhook_url(value: str) -> None:
    """Who is told: its path or query may be a secret."""
    address.check_url(value, ("https", "http"), path=True)
    if "#" in value:
        raise ValueError("has a fragment")


def redis_url(value: str) -> int:
    """A Redis, and the number of the database that it names."""
    if not value.startswith(tuple(f"{scheme}://" for scheme in _REDIS_SCHEMES)):
        raise ValueError("must begin with redis://, rediss:// or unix://")
    bare, _, query = value.partition("?")
    address.check_url(bare, _REDIS_SCHEMES, userinfo=True, path=True, hostless=True)
    path = "" if bare.startswith("unix") else urlsplit(bare).path.strip("/")
    try:
        given = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), max_num_fields=20))
    except ValueError:
        raise ValueError("has a query that cannot be read") from None
    known = _REDIS_OPTIONS | (_REDIS_TLS_OPTIONS if value.startswith("rediss") else frozenset())
    if given.keys() - known:
        raise ValueError(f"has an option in its query that is none of {', '.join(sorted(known))}")
    database = given.get("db", path) or "0"
    if "#" in value or not (database.isascii() and database.isdigit() and len(database) < 5):
        raise ValueError("must name its database by a number")
    return int(database)
