"""HTTP by hand, for what an SDK would hide: exact bytes, half a request, a client that leaves or does not read."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import Any


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def error(self) -> dict[str, Any]:
        """The error object, checked to have exactly OpenAI's four members."""
        content = self.json()
        assert set(content) == {"error"}, content
        found: dict[str, Any] = content["error"]
        assert set(found) == {"message", "type", "param", "code"}, found
        return found


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def request(method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
    sent = {"host": "127.0.0.1", "connection": "close", **(headers or {})}
    if body or method == "POST":
        sent = {"content-type": "application/json", "content-length": str(len(body)), **sent}
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in sent.items()) + "\r\n"
    return head.encode("latin-1") + body


def call(port: int, method: str, path: str, body: bytes | dict[str, Any] = b"", headers: dict[str, str] | None = None) -> Answer:
    """One request on a connection of its own, read to its end."""
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    with connect(port) as peer:
        peer.sendall(request(method, path, content, headers))
        return read(peer)


def read(peer: socket.socket) -> Answer:
    parts = []
    while part := peer.recv(65536):
        parts.append(part)
    raw = b"".join(parts)
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if headers.get("transfer-encoding") == "chunked":
        body = unchunk(body)
    return Answer(int(lines[0].split()[1]), headers, body)


def rest(peer: socket.socket) -> bytes:
    """What comes until the other side closes, or resets; it must, within the socket's own limit."""
    got = b""
    try:
        while part := peer.recv(65536):
            got += part
    except ConnectionResetError:
        pass
    return got


def unchunk(body: bytes) -> bytes:
    out: list[bytes] = []
    at = 0
    while at < len(body):
        end = body.index(b"\r\n", at)
        length = int(body[at:end], 16)
        if length == 0:
            break
        out.append(body[end + 2 : end + 2 + length])
        at = end + 2 + length + 2
    return b"".join(out)


def chat(prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": "deepseek-v3", "messages": [{"role": "user", "content": prompt}], **more}
