"""A client that asks as fast as it is answered: `python -m tests.support.flood PORT KEY SECONDS BODY`; what came of it as JSON, by status,
and when it began and ended on the machine's monotonic clock."""

from __future__ import annotations

import collections
import json
import socket
import sys
import time

from tests.support import raw

_PAUSE_S = 0.004  # after a refusal


def flood(port: int, key: str, seconds: float, content: bytes) -> dict[str, float]:
    headers = {"connection": "keep-alive", "authorization": f"Bearer {key}"}
    request = raw.request("POST", "/v1/chat/completions", content, headers)
    came: collections.Counter[str] = collections.Counter()
    began = time.monotonic()
    deadline = began + seconds
    peer: socket.socket | None = None
    while time.monotonic() < deadline:
        try:
            if peer is None:
                peer = raw.connect(port)
            peer.sendall(request)
            status = _answer(peer)
        except OSError:
            status, peer = "broken", None
            time.sleep(0.05)
        came[status] += 1
        if status == "429":
            time.sleep(_PAUSE_S)
    return {**came, "began": began, "ended": time.monotonic()}


def _answer(peer: socket.socket) -> str:
    got = b""
    while b"\r\n\r\n" not in got:
        got += _more(peer)
    head, _, body = got.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1].decode()
    length = next((int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), None)
    while len(body) < length if length is not None else not body.endswith(b"0\r\n\r\n"):
        body += _more(peer)
    return status


def _more(peer: socket.socket) -> bytes:
    part = peer.recv(65536)
    if not part:
        raise ConnectionError
    return part


if __name__ == "__main__":
    print(json.dumps(flood(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4].encode())))
