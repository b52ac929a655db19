"""What the backend asks of a transport, and what can go wrong there."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Protocol

import msgspec

# SGLang closes an idle connection after 5 s (SGLANG_TIMEOUT_KEEP_ALIVE): ours must be gone before.
KEEP_ALIVE_S = 4.0
# A used connection that closes without a byte does so within a round trip where it was closed already when the request was sent.
CLOSED_S = 1.0
# How long what is left of a body may take that is whole for all that matters.
FINISH_S = 1.0
# A response's status line and headers together, and whatever else comes that is no body: SGLang sends 200 bytes.
MAX_HEAD_BYTES = 64 << 10


class ConnectFailed(Exception):
    """No connection could be had within the time: nothing of the request has left."""


class ConnectionLost(Exception):
    """The connection broke, or what came is no HTTP: some of the request may have been worked on."""


class Unanswered(ConnectionLost):
    """A connection that had been used before was closed without a byte, at once: most likely before the request came there, and in any
    case before anything of an answer was made."""


class Options(msgspec.Struct, frozen=True):
    """What holds for every request to a host."""

    # Sent with each.
    headers: Mapping[str, str] = {}
    # What is trusted and shown on https; None for the system's certificates.
    tls: ssl.SSLContext | None = None
    # URL of an HTTP proxy.
    proxy: str | None = None


def tls(ca_file: str | None, cert_file: str | None, key_file: str | None) -> ssl.SSLContext | None:
    """Certificates to trust beside the system's, and the one (with its key) shown to hosts that want one; raises OSError for files that are
    none."""
    if ca_file is None and cert_file is None:
        return None
    context = ssl.create_default_context()
    if ca_file is not None:
        context.load_verify_locations(ca_file)
    if cert_file is not None:
        context.load_cert_chain(cert_file, key_file)
    return context


class Response(Protocol):
    """A response to a request that was sent; its status is known once its head has come."""

    status: int
    # When there was a connection to send the request on (monotonic seconds); 0 where that is not known.
    connected_at: float

    async def head(self) -> None:
        """Wait until the response's head is there; raises ConnectFailed, ConnectionLost or Unanswered. Cancelling it leaves everything as
        it is: it may be waited for again."""

    async def read(self) -> bytes:
        """What has come of the body since the last read, or b"" at its end; raises ConnectionLost. What is not read is not taken from
        the network either, but for a buffer."""

    @property
    def ended(self) -> bool:
        """Whether the whole body has been read."""

    def close(self) -> None:
        """Let go, synchronously, in any phase: a connection whose body has been read is used again, any other is cut. After it the response
        is not touched again: it may be another request's."""

    def finish(self) -> None:
        """The same for a body of which nothing more is of interest, but for its end: it may take FINISH_S."""


class Transport(Protocol):
    """Pooled connections to one host."""

    async def send(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        connect_s: float = 5.0,
        fresh: bool = False,
    ) -> Response:
        """Send one request; its response may be long in coming. Raises ConnectFailed or ConnectionLost. Cancelled it leaves nothing of the
        request behind. `fresh`: on a connection that has not been used before, as far as that can be had."""

    async def aclose(self) -> None:
        """Close every idle connection; those with a response on them close with it."""


async def request(
    way: Transport, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None, connect_s: float = 5.0
) -> Response:
    """One request there and the head of its response; on a fresh connection where a used one turns out to have been closed. Raises
    ConnectFailed or ConnectionLost. Cancelling it cuts the connection."""
    try:
        return await _once(way, method, path, body, headers, connect_s, False)
    except Unanswered as error:
        lost = error
    try:
        return await _once(way, method, path, body, headers, connect_s, True)
    except ConnectFailed:
        raise lost from None


async def _once(
    way: Transport, method: str, path: str, body: bytes, headers: Mapping[str, str] | None, connect_s: float, fresh: bool
) -> Response:
    response = await way.send(method, path, body, headers, connect_s, fresh)
    try:
        await response.head()
    except BaseException:
        response.close()
        raise
    return response
