"""Pages for browsers, a few files each, written by hand: the page at `/`, and the operator's console.

They are the same for everybody: whatever they show their scripts ask of the API, with the key of whoever looks. Nothing on them comes from
anywhere else, nothing runs or styles that does not stand in one of these files, no text can become markup, and no page may frame them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from gateway.errors import MethodNotAllowed
from gateway.wire.asgi import App, Receive, Scope, Send

POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    b"frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_FOLDER = Path(__file__).with_name("files")
_KINDS = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}
# What both are made of.
_COMMON = ("common.css", "common.js", "icon.svg")
# Under which paths the files of a page are, beside its own.
FRONT_FILES, CONSOLE, CONSOLE_FILES = "/page/", "/console", "/console/"


def of_front() -> Mapping[str, App]:
    """What the page at `/` loads, by path."""
    return {f"{FRONT_FILES}{name}": file(name) for name in (*_COMMON, "front.css", "front.js")}


def of_console() -> Mapping[str, App]:
    """The console and what it loads, by path."""
    files = {f"{CONSOLE_FILES}{name}": file(name) for name in (*_COMMON, "console.css", "console.js", "timeline.js")}
    return {CONSOLE: file("console.html"), **files}


def file(name: str) -> App:
    """A file as an ASGI application. It is read when somebody asks for it, and kept."""
    kind = _KINDS[Path(name).suffix]
    content = functools.cache((_FOLDER / name).read_bytes)

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            raise MethodNotAllowed(scope["method"], scope["path"], ["GET", "HEAD"])
        headers = [
            (b"content-type", kind),
            (b"content-length", b"%d" % len(content())),
            (b"content-security-policy", POLICY),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-opener-policy", b"same-origin"),
            (b"cross-origin-resource-policy", b"same-origin"),
            (b"cache-control", b"no-cache"),
            *([(b"vary", b"accept")] if name == "front.html" else []),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content()})

    return serve
