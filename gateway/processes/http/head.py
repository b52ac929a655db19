"""The heads of requests and answers: what a client's words mean, and what ours look like on the wire."""

from __future__ import annotations

import contextlib
import re
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import unquote

import httptools

from gateway.errors import GatewayError, Headers, InvalidRequest, render
from gateway.processes.http.bounds import MAX_HEAD_BYTES, MAX_HEADERS
from gateway.serving.calls import SHAPES
from gateway.telemetry.record import new_request_id
from gateway.wire.asgi import CONNECTION
from gateway.wire.error import Shape

_ASGI: Final = {"version": "3.0", "spec_version": "2.3"}
STATUS_LINES: Final = {status.value: b"HTTP/1.1 %d %s\r\n" % (status.value, status.phrase.encode()) for status in HTTPStatus}
# To whoever begins with HTTP/2's preface, in its own words: an empty SETTINGS frame, and GOAWAY with HTTP_1_1_REQUIRED (RFC 9113 6.8, 7).
_WORDS: Final = b"this server speaks HTTP/1.1 on this port"
NO_HTTP2: Final = b"\0\0\0\4\0\0\0\0\0" + b"\0\0%c\7\0\0\0\0\0" % (8 + len(_WORDS)) + b"\0\0\0\0\0\0\0\x0d" + _WORDS
METHODS: Final = {name.encode(): name for name in ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH")}
# RFC 3986's host and port, the empty one included (RFC 9110 7.2: a target without an authority has it).
_HOST: Final = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(:[0-9]{0,5})?")


def malformed(message: str, status: int = 400, code: str = "invalid_http", headers: Headers | None = None) -> InvalidRequest:
    """What a client is told whose request the parser takes and we do not."""
    return InvalidRequest(message, status=status, code=code, headers=headers)


def too_large() -> InvalidRequest:
    """A head beyond its bounds."""
    words = f"The request's head is larger than {MAX_HEAD_BYTES >> 10} kB or has more than {MAX_HEADERS} headers."
    return malformed(words, 431, "request_head_too_large")


def no_websocket() -> InvalidRequest:
    """What clients that try WebSocket first take for a word to go on without."""
    return malformed("WebSocket is not spoken here: POST the request instead.", 426, "upgrade_required", [(b"upgrade", b"HTTP/1.1")])


def is_host(value: bytes) -> bool:
    """Whether it can be a Host header's value."""
    return _HOST.fullmatch(value) is not None


def target(url: bytes, method: bytes) -> tuple[bytes, bytes, bytes | None]:
    """Path and query of a request's target, and the authority where it names one; raises InvalidRequest."""
    if url.find(b"#") >= 0:  # `in` tries whether the bytes are a number first
        raise malformed("The request's target holds a fragment ('#'), which stays with the client.")
    if url[:1] == b"/":
        path, _, query = url.partition(b"?")
        return path, query, None
    if url == b"*" and method == b"OPTIONS":
        return url, b"", None
    parsed: Any = None  # what is not there is None, whatever the stubs say
    with contextlib.suppress(httptools.HttpParserInvalidURLError):
        parsed = httptools.parse_url(url)
    if parsed is None or parsed.host is None or parsed.schema.lower() not in (b"http", b"https") or parsed.userinfo is not None:
        raise malformed("The request's target is neither a path nor an http:// or https:// URL.")
    host = b"[%s]" % parsed.host if b":" in parsed.host else parsed.host
    return parsed.path or b"/", parsed.query or b"", host if parsed.port is None else b"%s:%d" % (host, parsed.port)


def decoded(path: bytes) -> str:
    """The path as the application sees it."""
    text = path.decode("ascii")
    return unquote(text) if "%" in text else text


def without_offer(method: bytes, url: bytes, version: str, headers: Headers) -> bytes:
    """A request's head once more without the offer to go on in another protocol (`Upgrade`, and `upgrade` in `Connection`)."""
    lines = [b"%s %s HTTP/%s" % (method, url, version.encode())]
    for name, value in headers:
        if name == b"connection":
            tokens = [token for token in value.split(b",") if token.strip().lower() not in (b"upgrade", b"")]
            if tokens:
                lines.append(b"connection: %s" % b",".join(tokens))
        elif name != b"upgrade":
            lines.append(b"%s: %s" % (name, value))
    return b"\r\n".join(lines) + b"\r\n\r\n"


def size(url: bytes, headers: Headers) -> int:
    """How many bytes of a head these are, its first line and its ends included."""
    return len(url) + 16 + sum([len(name) + len(value) + 4 for name, value in headers])


def verify_older(version: str, coded: bool) -> None:
    """Raises InvalidRequest for what is not HTTP/1.1, nor a HTTP/1.0 that can be answered; `coded`: with a transfer coding."""
    if version != "1.0":
        raise malformed(f"HTTP/{version} is not spoken here; HTTP/1.1 is.", 505)
    if coded:
        raise malformed("HTTP/1.0 has no transfer codings.")


def address(found: Any) -> tuple[str, int] | None:
    """A host and a port; None for a unix socket."""
    return (str(found[0]), int(found[1])) if isinstance(found, tuple) else None


def scope(client: tuple[str, int] | None, transport: Any) -> dict[str, Any]:
    """What all scopes of a connection share, and room for the rest: a copy of a large dict costs less than making one grow."""
    return {
        "type": "http",
        "asgi": _ASGI,
        "http_version": "1.1",
        "method": "",
        "scheme": "https" if transport.get_extra_info("ssl_object") is not None else "http",
        "path": "",
        "raw_path": b"",
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "client": client,
        "server": address(transport.get_extra_info("sockname")),
        CONNECTION: None,
    }


def refusal(error: GatewayError, path: str, date: bytes) -> bytes:
    """The last answer of a connection, in the shape of what was asked for; `date`: the header."""
    request_id = new_request_id().encode()
    status, headers, content = render(error, request_id.decode(), SHAPES.get(path, Shape.OPENAI))
    lines = [b"%b: %b\r\n" % header for header in [*headers, (b"x-request-id", request_id), (b"connection", b"close")]]
    return b"".join([STATUS_LINES[status], date, *lines, b"\r\n", content])
