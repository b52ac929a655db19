"""A real browser with a page of somebody else's in it, and the server that page came from."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# The names a page may be from: all of them are this machine, which is what whoever rebinds a name's DNS arrives at.
STRANGER = "evil.example"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", f"--host-resolver-rules=MAP {STRANGER} 127.0.0.1",
)  # fmt: skip


class Page:
    """A page, the server it comes from, and what it said when it was done. Where `behind` is given, whatever else is asked of this server
    goes there byte for byte: so does a page arrive whose name pointed elsewhere when it was loaded (DNS rebinding)."""

    def __init__(self, script: str, behind: int | None = None) -> None:
        self.said: Any = None
        self._done = threading.Event()
        html = f"<!doctype html><meta charset=utf-8><title>x</title><body><script>{script}</script>".encode()
        page = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/":
                    self._answer(html)
                elif behind is not None:
                    self._forward(behind)
                else:
                    self.send_error(404)

            def do_POST(self) -> None:
                if self.path == "/done":
                    page.said = json.loads(self._body())
                    self._answer(b"")
                    page._done.set()
                elif behind is not None:
                    self._forward(behind)

            def _body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("content-length", 0)))

            def _answer(self, content: bytes) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/html")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def _forward(self, port: int) -> None:
                lines = [f"{self.command} {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in self.headers.items())]
                sent = "\r\n".join([line for line in lines if not line.lower().startswith("connection:")] + ["connection: close", "", ""])
                with socket.create_connection(("127.0.0.1", port), timeout=30) as peer:
                    peer.sendall(sent.encode("latin-1") + self._body())
                    while part := peer.recv(65536):
                        self.wfile.write(part)
                self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]

    @contextlib.contextmanager
    def served(self) -> Iterator[Page]:
        thread = threading.Thread(target=self._server.serve_forever)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def visit(self, profile: Path, host: str = STRANGER) -> Any:
        """Open it in Chromium under the name `host`; what the page says of itself when its script is done."""
        command = ["chromium", *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-port=0", f"http://{host}:{self.port}/"]
        with (profile.parent / f"{profile.name}.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            assert self._done.wait(120), (profile.parent / f"{profile.name}.log").read_text()[-2000:]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            shutil.rmtree(profile, ignore_errors=True)
        return self.said
