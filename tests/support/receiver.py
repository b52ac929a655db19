"""Whoever is told by a webhook: a real HTTP server that keeps what it was sent, and fails, hangs or redirects when it is asked to."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parents[2] / "docs" / "limits.md"


class Sent(NamedTuple):
    path: str
    signature: str
    body: bytes
    status: int

    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


def verified(secret: bytes, sent: Sent) -> bool:
    """As docs/limits.md tells receivers to do it: this is the program that stands there."""
    program = next(block for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if "def is_ours" in block)
    names: dict[str, Any] = {}
    exec(program, names)
    found: bool = names["is_ours"](secret, sent.signature, sent.body)
    return found


class Receiver:
    """`behaviours`: for the next requests, a status or `hang`; then 204. `all`: for every request, where it is set."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.behaviours: list[int | str] = []
        self.all: int | str | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?for=us"

    def taken(self) -> list[Sent]:
        return [one for one in self.sent if one.status == 204]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("content-length", 0)))
        how = self.all if self.all is not None else self.behaviours.pop(0) if self.behaviours else 204
        status = 599 if how == "hang" else int(how)
        self.sent.append(Sent(handler.path, handler.headers.get("x-penstock-signature", ""), body, status))
        if how == "hang":
            time.sleep(3)
            return
        handler.send_response(status)
        if status in (302, 307, 308):
            handler.send_header("location", f"http://127.0.0.1:{self.port}/elsewhere")
        handler.send_header("content-length", "0")
        handler.end_headers()


@contextlib.contextmanager
def receiver() -> Iterator[Receiver]:
    running = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with contextlib.suppress(ConnectionError):
                running.answer(self)

        def do_GET(self) -> None:  # as who follows a redirect might ask
            self.do_POST()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield running
    finally:
        server.shutdown()
        server.server_close()
