"""The heads of requests and answers: what a client's words mean, and what ours look like on the wire."""

from __future__ import annotations

import contextlib
import re
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import unquote

import httptools

from gateway.errors import Headers, InvalidRequest
from gateway.processes.http.bounds import MAX_HEAD_BYTES, MAX_HEADERS

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
