"""An identity provider for tests: a real HTTP server with keys of its own, that signs, publishes, withdraws, and can be down or wrong."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

AUDIENCE = "penstock"
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


def new_key(algorithm: str) -> PrivateKey:
    if algorithm[:2] in ("RS", "PS"):
        return rsa.generate_private_key(65537, 2048)
    return ec.generate_private_key(ec.SECP256R1()) if algorithm.startswith("ES") else ed25519.Ed25519PrivateKey.generate()


def public(key: PrivateKey, id: str, **more: Any) -> dict[str, Any]:
    """As it stands in a key set."""
    if isinstance(key, rsa.RSAPrivateKey):
        jwk = RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    elif isinstance(key, ec.EllipticCurvePrivateKey):
        jwk = ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
    else:
        jwk = OKPAlgorithm.to_jwk(key.public_key(), as_dict=True)
    jwk.pop("key_ops", None)
    return {**jwk, "kid": id, "use": "sig", **more}


class Issuer:
    """`published` is what it says; `status`, `location` and `hangs_s` are how."""

    def __init__(self, port: int = 0) -> None:
        self.private: dict[str, PrivateKey] = {}
        self.published: list[dict[str, Any]] = []
        self.asked: Counter[str] = Counter()
        self.status, self.location, self.hangs_s = 200, "", 0.0
        self.port = port
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, id: str, algorithm: str = "RS256", publish: bool = True) -> None:
        self.private[id] = new_key(algorithm)
        if publish:
            self.published.append(public(self.private[id], id))

    def withdraw(self, id: str) -> None:
        self.published = [jwk for jwk in self.published if jwk["kid"] != id]

    def token(
        self, id: str, algorithm: str = "RS256", sub: str | None = "alice", headers: dict[str, Any] | None = None, **claims: Any
    ) -> str:
        """Good for ten minutes, unless the claims say otherwise; a claim of None is left out."""
        now = int(time.time())
        said = {"iss": self.url, "aud": AUDIENCE, "sub": sub, "iat": now, "nbf": now, "exp": now + 600, **claims}
        return jwt.encode(
            {name: value for name, value in said.items() if value is not None}, self.private[id], algorithm, {"kid": id, **(headers or {})}
        )

    def configured(self, **more: Any) -> dict[str, Any]:
        return {"name": "staff", "issuer": self.url, "audience": [AUDIENCE], **more}

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked[handler.path] += 1
        time.sleep(self.hangs_s)
        document: dict[str, Any] = {"keys": self.published}
        if handler.path == "/.well-known/openid-configuration":
            document = {"issuer": self.url, "jwks_uri": f"{self.url}/keys"}
        content = json.dumps(document).encode()
        moved = self.location and handler.path != "/keys"  # where they are after all
        handler.send_response(302 if moved else self.status)
        if moved:
            handler.send_header("location", self.location)
        handler.send_header("content-length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def start(self) -> None:
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):
                    issuer._answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


@contextlib.contextmanager
def issuer() -> Iterator[Issuer]:
    """A running one, with a key of each kind: `rsa`, `ec`, `ed`."""
    running = Issuer()
    for id, algorithm in (("rsa", "RS256"), ("ec", "ES256"), ("ed", "EdDSA")):
        running.add(id, algorithm)
    running.start()
    try:
        yield running
    finally:
        running.stop()
