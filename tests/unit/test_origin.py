"""Which requests a browser sends for a page of somebody else's, by the headers it puts on them."""

from __future__ import annotations

import pytest

from gateway.config import is_loopback
from gateway.wire.asgi import Scope
from gateway.wire.origin import cross_site, host_name

HOST = ("host", "127.0.0.1:8000")


def scope(*headers: tuple[str, str]) -> Scope:
    return {"type": "http", "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers]}


@pytest.mark.parametrize(
    ("headers", "foreign"),
    [
        # No browser.
        ([HOST], False),
        ([], False),
        # What Chromium sends for a page of our own, and for an address that somebody typed.
        ([HOST, ("origin", "http://127.0.0.1:8000"), ("sec-fetch-site", "same-origin")], False),
        ([HOST, ("sec-fetch-site", "none")], False),
        ([HOST, ("sec-fetch-site", "same-origin")], False),
        ([("host", "LocalHost:8000"), ("origin", "http://localhost:8000")], False),
        ([("host", "admin.example"), ("origin", "https://admin.example")], False),  # TLS ended before us
        # A page of somebody else's: another site, another port of the same host, a sandbox, a file.
        ([HOST, ("origin", "https://evil.example"), ("sec-fetch-site", "cross-site")], True),
        ([HOST, ("origin", "http://127.0.0.1:3000"), ("sec-fetch-site", "same-site")], True),
        ([HOST, ("origin", "null"), ("sec-fetch-site", "cross-site")], True),
        ([HOST, ("origin", "null")], True),
        ([HOST, ("origin", "")], True),
        ([HOST, ("origin", "127.0.0.1:8000")], True),
        ([HOST, ("origin", "http://127.0.0.1:8000.evil.example")], True),
        ([HOST, ("origin", "http://localhost:8000")], True),
        # One of the two is enough, and so is one of several.
        ([HOST, ("origin", "https://evil.example"), ("sec-fetch-site", "same-origin")], True),
        ([HOST, ("origin", "http://127.0.0.1:8000"), ("sec-fetch-site", "cross-site")], True),
        ([HOST, ("sec-fetch-site", "cross-site")], True),
        ([HOST, ("sec-fetch-site", "what comes next year")], True),
        ([HOST, ("origin", "http://127.0.0.1:8000"), ("origin", "https://evil.example")], True),
        ([("origin", "https://evil.example")], True),
    ],
)
def test_another_origin_is_seen(headers: list[tuple[str, str]], foreign: bool) -> None:
    assert cross_site(scope(*headers)) is foreign
    assert cross_site(scope(*reversed(headers))) is foreign


def test_allowed_origins_may() -> None:
    app = scope(HOST, ("origin", "https://app.example"), ("sec-fetch-site", "cross-site"))
    assert not cross_site(app, {b"https://app.example"})
    assert cross_site(app, {b"https://app.example.evil", b"http://app.example"})
    assert not cross_site(app, {b"*"})
    assert not cross_site(scope(HOST, ("sec-fetch-site", "cross-site")), {b"*"})
    assert cross_site(scope(HOST, ("sec-fetch-site", "cross-site")), {b"https://app.example"}), "who does not say who it is may not"


def test_a_page_whose_name_was_made_to_point_here_is_not_ours() -> None:
    rebound = scope(("host", "evil.example:8000"), ("origin", "http://evil.example:8000"), ("sec-fetch-site", "same-origin"))
    assert cross_site(rebound, own=is_loopback)
    assert not cross_site(rebound), "where a key is asked for as well, our own name may be any"
    assert not cross_site(rebound, {b"http://evil.example:8000"}, is_loopback)
    for host in ("localhost:8000", "127.0.0.1:1", "[::1]:8000"):
        assert not cross_site(scope(("host", host), ("origin", f"http://{host}")), own=is_loopback)
    assert not cross_site(scope(("host", "api.example")), own=is_loopback), "a proxy's client sends no Origin"


@pytest.mark.parametrize(
    ("host", "name", "ours"),
    [
        ("127.0.0.1:9464", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.1", True),
        ("127.9.9.9:9464", "127.9.9.9", True),
        ("localhost", "localhost", True),
        ("LOCALHOST:9464", "localhost", True),
        ("localhost:1", "localhost", True),  # the end of a tunnel; a port says nothing of who is asked
        ("localhost:", "", False),
        ("localhost:http", "", False),
        ("[::1]:9464", "::1", True),
        ("[::1]", "::1", True),
        ("[::1]:", "", False),
        ("[::1]x", "", False),
        ("[::1", "", False),
        ("::1", "", False),
        ("[127.0.0.1]:9464", "", False),  # brackets are for IPv6 alone
        ("[localhost]", "", False),
        ("localhost.", "localhost.", False),
        ("127.0.0.1.", "127.0.0.1.", False),
        ("127.1", "127.1", False),
        ("0x7f000001", "0x7f000001", False),
        ("2130706433", "2130706433", False),
        ("0.0.0.0:9464", "0.0.0.0", False),
        ("evil.example:9464", "evil.example", False),
        ("localhost.evil.example", "localhost.evil.example", False),
        ("127.0.0.1@evil.example", "127.0.0.1@evil.example", False),
        ("evil.example#127.0.0.1:1", "evil.example#127.0.0.1", False),
        ("", "", False),
    ],
)
def test_hosts(host: str, name: str, ours: bool) -> None:
    assert host_name(scope(("host", host))) == name
    assert is_loopback(name) is ours


def test_no_host_and_two_are_nobodys() -> None:
    assert host_name(scope()) == ""
    assert host_name(scope(HOST, HOST)) == ""
