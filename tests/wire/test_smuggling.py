"""Requests that two servers in a row may read differently: a real NGINX in front of a gateway, and both must see the same ones.

What NGINX passed on is what the gateway saw of it; and by itself the gateway makes no second request of bytes in which NGINX sees none.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import raw
from tests.support.processes import Gateway, until

CONFIG = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
worker_processes 1;
{user}
events {{ worker_connections 512; }}
http {{
  log_format seen '$request_method $request_uri $upstream_status';
  access_log {folder}/seen.log seen;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  upstream gateway {{ server 127.0.0.1:{port}; keepalive 4; }}
  server {{
    listen unix:{folder}/socket;
    location / {{
      proxy_pass http://gateway;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_request_buffering off;
      proxy_buffering off;
    }}
  }}
}}
"""
HOST = "host: x\r\n"
CHUNKED = "transfer-encoding: chunked\r\n"
# PATH is the entry's own; whoever sees PATH/hidden has been deceived, but where the entry is two requests openly.
HIDDEN = "GET PATH/hidden HTTP/1.1\r\nhost: x\r\n\r\n"
POST = "POST PATH HTTP/1.1\r\n"


def framed(headers: str, body: str) -> str:
    return f"{POST}{HOST}{headers}\r\n{body}"


def sized(header: str) -> str:
    """A length said in some odd way, and a body with a request in it."""
    return framed(header.replace("LENGTH", "36"), "x" * 36 + HIDDEN)


CORPUS = {
    "one request": framed("content-length: 3\r\n", "abc"),
    "two requests": framed("content-length: 3\r\n", "abc") + HIDDEN,
    "two requests in chunks": framed(CHUNKED, "3\r\nabc\r\n0\r\n\r\n") + HIDDEN,
    "CL.TE": framed(f"content-length: 60\r\n{CHUNKED}", "0\r\n\r\n" + HIDDEN),
    "TE.CL": framed(f"{CHUNKED}content-length: 4\r\n", "3c\r\n" + HIDDEN + "\r\n0\r\n\r\n"),
    "CL.TE, large": framed("Content-Length: 60\r\nTransfer-Encoding: CHUNKED\r\n", "0\r\n\r\n" + HIDDEN),
    "TE of another kind": framed("transfer-encoding: xchunked\r\n", "0\r\n\r\n" + HIDDEN),
    "TE, identity": framed("transfer-encoding: identity\r\ncontent-length: 3\r\n", "abc" + HIDDEN),
    "TE twice": framed(CHUNKED * 2, "0\r\n\r\n" + HIDDEN),
    "TE and another": framed(f"{CHUNKED}transfer-encoding: x\r\n", "0\r\n\r\n" + HIDDEN),
    "TE, a list": framed("transfer-encoding: chunked, identity\r\n", "0\r\n\r\n" + HIDDEN),
    "TE, gzip": framed("transfer-encoding: gzip, chunked\r\n", "0\r\n\r\n" + HIDDEN),
    "TE, space before the colon": framed("transfer-encoding : chunked\r\ncontent-length: 60\r\n", "0\r\n\r\n" + HIDDEN),
    "TE, tab": framed("transfer-encoding:\tchunked\r\n", "0\r\n\r\n" + HIDDEN),
    "TE, vertical tab": framed("transfer-encoding: \x0bchunked\r\ncontent-length: 60\r\n", "0\r\n\r\n" + HIDDEN),
    "TE, quoted": framed('transfer-encoding: "chunked"\r\ncontent-length: 60\r\n', "0\r\n\r\n" + HIDDEN),
    "TE, folded": framed("transfer-encoding:\r\n chunked\r\ncontent-length: 60\r\n", "0\r\n\r\n" + HIDDEN),
    "TE behind a bare LF": framed("x: y\ntransfer-encoding: chunked\r\ncontent-length: 60\r\n", "0\r\n\r\n" + HIDDEN),
    "TE behind a bare CR": framed("x: y\rtransfer-encoding: chunked\r\ncontent-length: 60\r\n", "0\r\n\r\n" + HIDDEN),
    "TE in a folded line": framed("x: y\r\n transfer-encoding: chunked\r\ncontent-length: 60\r\n", "0\r\n\r\n" + HIDDEN),
    "TE in HTTP/1.0": framed(CHUNKED, "0\r\n\r\n" + HIDDEN).replace("HTTP/1.1", "HTTP/1.0", 1),
    "CL twice, the same": sized("content-length: LENGTH\r\n" * 2),
    "CL twice, different": sized("content-length: LENGTH\r\ncontent-length: 3\r\n"),
    "CL, a list": sized("content-length: LENGTH, LENGTH\r\n"),
    "CL, plus": sized("content-length: +LENGTH\r\n"),
    "CL, minus": sized("content-length: -LENGTH\r\n"),
    "CL, hexadecimal": sized("content-length: 0x24\r\n"),
    "CL, zeros": sized("content-length: 00LENGTH\r\n"),
    "CL, spaces": sized("content-length:   LENGTH  \r\n"),
    "CL, a space inside": sized("content-length: 3 6\r\n"),
    "CL, decimals": sized("content-length: LENGTH.0\r\n"),
    "CL, endless": sized(f"content-length: {'9' * 40}\r\n"),
    "CL, empty": sized("content-length:\r\n"),
    "CL, space before the colon": sized("content-length : LENGTH\r\n"),
    "CL, underscore": framed("content_length: 36\r\n", HIDDEN),
    "no length": framed("", HIDDEN),
    "a body of a GET": "GET PATH HTTP/1.1\r\nhost: x\r\ncontent-length: 36\r\n\r\n" + "x" * 36 + HIDDEN,
    "bare LF throughout": framed("content-length: 3\r\n", "abc").replace("\r\n", "\n") + HIDDEN,
    "bare LF at the head's end": f"{POST}{HOST}content-length: 3\r\n\nabc" + HIDDEN,
    "bare CR at the head's end": f"{POST}{HOST}content-length: 3\r\n\rabc" + HIDDEN,
    "NUL in a header": framed("x: a\0b\r\ncontent-length: 3\r\n", "abc" + HIDDEN),
    "no header name": framed(": x\r\ncontent-length: 3\r\n", "abc" + HIDDEN),
    "space in a header name": framed("x y: z\r\ncontent-length: 3\r\n", "abc" + HIDDEN),
    "chunk size, zeros": framed(CHUNKED, "0003\r\nabc\r\n000\r\n\r\n" + HIDDEN),
    "chunk size, 0x": framed(CHUNKED, "0x3\r\nabc\r\n0\r\n\r\n" + HIDDEN),
    "chunk size, minus": framed(CHUNKED, "-3\r\nabc\r\n0\r\n\r\n" + HIDDEN),
    "chunk size, space": framed(CHUNKED, "3 \r\nabc\r\n0\r\n\r\n" + HIDDEN),
    "chunk size, overflow": framed(CHUNKED, "10000000000000003\r\nabc\r\n0\r\n\r\n" + HIDDEN),
    "chunk size, bare LF": framed(CHUNKED, "3\nabc\r\n0\r\n\r\n" + HIDDEN),
    "chunk size, bare CR": framed(CHUNKED, "3\rabc\r\n0\r\n\r\n" + HIDDEN),
    "chunk size, empty": framed(CHUNKED, "\r\n" + HIDDEN),
    "chunk without its end": framed(CHUNKED, "3\r\nabc0\r\n\r\n" + HIDDEN),
    "chunk with too long an end": framed(CHUNKED, "3\r\nabcX\r\n0\r\n\r\n" + HIDDEN),
    "chunk ended by LF": framed(CHUNKED, "3\r\nabc\n0\r\n\r\n" + HIDDEN),
    "chunk extension": framed(CHUNKED, "3;a=b\r\nabc\r\n0;c\r\n\r\n" + HIDDEN),
    "chunk extension, quoted": framed(CHUNKED, '3;a="b;c"\r\nabc\r\n0\r\n\r\n' + HIDDEN),
    "chunk extension, a line end in quotes": framed(CHUNKED, '3;a="\r\nabc\r\n0\r\n\r\n' + HIDDEN),
    "chunk extension, bare LF": framed(CHUNKED, "3;a\nxx\r\n3c\r\n0\r\n\r\n" + HIDDEN),
    "chunk extension, bare CR": framed(CHUNKED, "3;a\rb\r\nabc\r\n0\r\n\r\n" + HIDDEN),
    "trailers": framed(CHUNKED, "3\r\nabc\r\n0\r\nx: y\r\n\r\n" + HIDDEN),
    "trailers that say a length": framed(CHUNKED, "3\r\nabc\r\n0\r\ncontent-length: 60\r\n\r\n" + HIDDEN),
    "trailers that say chunks": framed(CHUNKED, "3\r\nabc\r\n0\r\ntransfer-encoding: chunked\r\n\r\n" + HIDDEN),
    "trailers, broken": framed(CHUNKED, "3\r\nabc\r\n0\r\nx y z\r\n\r\n" + HIDDEN),
    "absolute form": f"GET http://other.examplePATH HTTP/1.1\r\n{HOST}\r\n" + HIDDEN,
    "absolute form with a user": f"GET http://a:b@other.examplePATH HTTP/1.1\r\n{HOST}\r\n" + HIDDEN,
    "no host": "GET PATH HTTP/1.1\r\n\r\n" + HIDDEN,
    "two hosts": f"GET PATH HTTP/1.1\r\n{HOST}host: y\r\n\r\n" + HIDDEN,
    "host with a space": "GET PATH HTTP/1.1\r\nhost: x y\r\n\r\n" + HIDDEN,
    "upgrade to h2c": framed("connection: upgrade\r\nupgrade: h2c\r\ncontent-length: 36\r\n", "x" * 36 + HIDDEN),
    "upgrade to h2c around a request": framed("connection: upgrade\r\nupgrade: h2c\r\ncontent-length: 60\r\n", HIDDEN.ljust(60)),
    "upgrade in chunks": framed(f"connection: upgrade\r\nupgrade: websocket\r\n{CHUNKED}", "3\r\nabc\r\n0\r\n\r\n" + HIDDEN),
    "upgrade without a body": f"GET PATH HTTP/1.1\r\n{HOST}connection: upgrade\r\nupgrade: h2c\r\n\r\n" + HIDDEN,
    "close, and more": framed("connection: close\r\ncontent-length: 3\r\n", "abc" + HIDDEN),
    "expect": framed("expect: 100-continue\r\ncontent-length: 36\r\n", "x" * 36 + HIDDEN),
    "expect something else": framed("expect: x\r\ncontent-length: 36\r\n", "x" * 36 + HIDDEN),
    "HTTP/0.9": "GET PATH\r\n" + HIDDEN,
    "HTTP/1.9": "GET PATH HTTP/1.9\r\nhost: x\r\n\r\n" + HIDDEN,
    "HTTP/2.0": "GET PATH HTTP/2.0\r\nhost: x\r\n\r\n" + HIDDEN,
    "two spaces": "GET  PATH  HTTP/1.1\r\nhost: x\r\n\r\n" + HIDDEN,
    "tabs": "GET\tPATH\tHTTP/1.1\r\nhost: x\r\n\r\n" + HIDDEN,
    "space before it": " GET PATH HTTP/1.1\r\nhost: x\r\n\r\n" + HIDDEN,
    "line ends before it": "\r\n\r\nGET PATH HTTP/1.1\r\nhost: x\r\n\r\n" + HIDDEN,
    "method in small letters": "get PATH HTTP/1.1\r\nhost: x\r\n\r\n" + HIDDEN,
    "CONNECT": "CONNECT x:443 HTTP/1.1\r\nhost: x\r\n\r\n" + HIDDEN,
    "fragment": "GET PATH#/../x HTTP/1.1\r\nhost: x\r\n\r\n" + HIDDEN,
}
# What NGINX refuses and RFC 9112 allows: a tab is as good as a space.
STRICTER = ("TE, tab",)
PATHS = {name: f"/smuggling/{number}" for number, name in enumerate(CORPUS)}


class Nginx:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def connect(self) -> socket.socket:
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(10)
        peer.connect(str(self._folder / "socket"))
        return peer

    def seen(self, path: str) -> list[str]:
        """Requests below a path that went on to the gateway and were answered there, by the one answer that such paths have."""
        lines = [line.rsplit(" ", 1) for line in (self._folder / "seen.log").read_text(errors="replace").splitlines()]
        return [request for request, upstream in lines if upstream == "404" and _below(request, path)]


def _below(request: str, path: str) -> bool:
    target = request.split(" ")[1].split("?")[0].split("#")[0]
    return target == path or target.startswith(f"{path}/")


@pytest.fixture(scope="module")
def nginx(wired: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    folder = tmp_path_factory.mktemp("nginx")
    user = "user root;" if os.getuid() == 0 else ""
    (folder / "nginx.conf").write_text(CONFIG.format(folder=folder, port=wired.port, user=user))
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    process = subprocess.Popen(["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")], env=environment)
    try:
        until("NGINX listens", lambda: (folder / "socket").exists())
        yield Nginx(folder)
    finally:
        process.terminate()
        process.wait(10)


def _say(peer: socket.socket, sent: bytes) -> bytes:
    """What comes back until the other side closes, or has nothing more to say."""
    got = b""
    with peer, contextlib.suppress(TimeoutError, ConnectionError):
        peer.sendall(sent)
        peer.settimeout(1.5)
        while part := peer.recv(65536):
            got += part
    return got


def _seen(wired: Gateway, path: str) -> list[str]:
    requests = [" ".join(line["message"].split(" ")[:2]) for line in wired.requests()]
    return [request for request in requests if _below(request, path)]


@pytest.fixture(scope="module")
def witnessed(nginx: Nginx, wired: Gateway) -> dict[str, tuple[list[str], list[str], list[str], bytes]]:
    """For each entry: what NGINX passed on, what the gateway saw of that, what it sees by itself, and its answer then."""

    run = f"-{uuid.uuid4().hex}"  # the gateway stays when this is made a second time

    def both(name: str) -> bytes:
        text = CORPUS[name]
        _say(nginx.connect(), text.replace("PATH", f"{PATHS[name]}{run}/behind").encode("latin-1"))
        return _say(raw.connect(wired.port), text.replace("PATH", f"{PATHS[name]}{run}/alone").encode("latin-1"))

    with ThreadPoolExecutor(16) as pool:
        answers = dict(zip(CORPUS, pool.map(both, CORPUS), strict=True))
    return {
        name: (
            nginx.seen(f"{path}{run}/behind"),
            _seen(wired, f"{path}{run}/behind"),
            [request.replace("/alone", "/behind") for request in _seen(wired, f"{path}{run}/alone")],
            answers[name],
        )
        for name, path in PATHS.items()
    }


@pytest.mark.parametrize("name", CORPUS)
def test_both_see_the_same_requests(witnessed: dict[str, tuple[list[str], list[str], list[str], bytes]], name: str) -> None:
    passed_on, behind, alone, answer = witnessed[name]
    assert behind == passed_on
    # NGINX looks at a whole packet before it passes on anything: the request whose own body is broken is the one it may not have seen.
    assert alone[1:] == passed_on[1 : len(alone)] or name in STRICTER
    assert [request for request in alone[:1] if request.endswith("/hidden")] == []
    assert len(re.findall(rb"HTTP/1.1 (?!100)", answer)) >= len(alone)


def test_plain_requests_are_seen_and_those_with_two_readings_are_not(
    witnessed: dict[str, tuple[list[str], list[str], list[str], bytes]],
) -> None:
    for name in ("one request", "two requests", "two requests in chunks", "upgrade to h2c", "expect", "trailers", "absolute form"):
        passed_on, _, alone, _ = witnessed[name]
        assert alone == passed_on
        assert len(alone) == (1 if name == "one request" else 2)
    for name in ("CL.TE", "TE.CL", "TE twice", "CL twice, different", "bare LF throughout", "chunk size, overflow", "two hosts"):
        _, _, alone, answer = witnessed[name]
        assert not [request for request in alone if request.endswith("/hidden")]
        assert b"HTTP/1.1 400 " in answer
