"""aiohttp behind the same verb: TLS with certificates of one's own, proxies, unix sockets."""

from __future__ import annotations

import asyncio
import contextlib
import io
import time
from collections.abc import Mapping
from types import SimpleNamespace
from urllib.parse import urlsplit

import aiohttp

from backends.sglang_dsv3.transport.contract import (
    CLOSED_S,
    FINISH_S,
    KEEP_ALIVE_S,
    MAX_HEAD_BYTES,
    ConnectFailed,
    ConnectionLost,
    Options,
    Unanswered,
)

# What is larger is sent piece by piece, with the event loop free in between.
PIECE = 256 << 10


class Library:
    """Pooled connections to one host."""

    def __init__(self, url: str, options: Options) -> None:
        parts = urlsplit(url)
        self._socket = parts.path if parts.scheme == "unix" else None
        self._base = "http://localhost" if self._socket is not None else url
        self._options = options
        self._session: aiohttp.ClientSession | None = None
        # Those who read the end of a body that is of no interest.
        self._finishing: set[asyncio.Task[None]] = set()

    def _open(self) -> aiohttp.ClientSession:
        """Made with the first request: a session belongs to the event loop it is used in."""
        if self._session is None:
            connector: aiohttp.BaseConnector
            if self._socket is not None:
                connector = aiohttp.UnixConnector(self._socket, limit=0, keepalive_timeout=KEEP_ALIVE_S)
            else:
                connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S, ssl=self._options.tls or True)
            trace = aiohttp.TraceConfig()
            trace.on_connection_reuseconn.append(_reused)
            self._session = aiohttp.ClientSession(
                trace_configs=[trace],
                connector=connector,
                timeout=aiohttp.ClientTimeout(total=None),
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                auto_decompress=False,
                headers=self._options.headers,
                max_line_size=MAX_HEAD_BYTES,
                max_field_size=MAX_HEAD_BYTES,
            )
        return self._session

    async def send(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        connect_s: float = 5.0,
        fresh: bool = False,
    ) -> _Response:
        """See `Transport`. The library sends and waits in one go: it does so in a task of its own. It has no say in which connection of its
        pool is taken."""
        task = asyncio.get_running_loop().create_task(self._request(method, path, body, headers, connect_s))
        return _Response(task, self._finishing)

    async def _request(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str] | None, connect_s: float
    ) -> aiohttp.ClientResponse:
        # sock_connect is silent about name look-ups and proxies; `connect` covers them, and the pool has no limit to wait for.
        used: list[float] = []  # when a connection was, if it is one that was used before
        timeout = aiohttp.ClientTimeout(total=None, connect=connect_s, sock_connect=connect_s)
        try:
            return await self._open().request(
                method,
                self._base + path,
                data=io.BytesIO(body) if len(body) > PIECE else body or None,
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
                proxy=self._options.proxy,
                trace_request_ctx=used,
            )
        except aiohttp.ConnectionTimeoutError:
            raise ConnectFailed(f"no connection within {connect_s:g} s") from None
        except (aiohttp.ClientConnectorError, aiohttp.ClientProxyConnectionError) as error:
            raise ConnectFailed(str(error)) from None
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            early = used and _without_a_byte(error) and time.monotonic() - used[0] < CLOSED_S
            # Not its repr, which holds every header of the request.
            raise (Unanswered if early else ConnectionLost)(f"{type(error).__name__}: {error}") from None

    async def aclose(self) -> None:
        """Close the pool."""
        for task in self._finishing:
            task.cancel()
        await asyncio.gather(*self._finishing, return_exceptions=True)
        if self._session is not None:
            await self._session.close()


async def _reused(session: aiohttp.ClientSession, context: SimpleNamespace, params: aiohttp.TraceConnectionReuseconnParams) -> None:
    context.trace_request_ctx.append(time.monotonic())


def _without_a_byte(error: Exception) -> bool:
    """Whether nothing of an answer had come; a head that had begun is named in the error."""
    return isinstance(error, aiohttp.ServerDisconnectedError) and isinstance(error.message, str)


class _Response:
    def __init__(self, request: asyncio.Task[aiohttp.ClientResponse], finishing: set[asyncio.Task[None]]) -> None:
        self._request = request
        self._finishing = finishing
        self._response: aiohttp.ClientResponse | None = None
        self.status = 0
        self.connected_at = 0.0

    async def head(self) -> None:
        """See `Response`."""
        if self._response is None:
            response = self._response = await asyncio.shield(self._request)
            self.status = response.status

    async def read(self) -> bytes:
        """See `Response`."""
        assert self._response is not None
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, ConnectionError, asyncio.IncompleteReadError) as error:
            raise ConnectionLost(f"{type(error).__name__}: {error}") from None

    @property
    def ended(self) -> bool:
        """See `Response`."""
        return self._response is not None and self._response.content.at_eof()

    def close(self) -> None:
        """See `Response`. aiohttp has pooled the connection by itself when the body was read to its end."""
        if self._response is None:
            self._request.cancel()
            self._request.add_done_callback(_dropped)
        elif not self.ended:
            self._response.close()

    def finish(self) -> None:
        """See `Response`."""
        response = self._response
        if response is None or self.ended:
            self.close()
            return
        task = asyncio.get_running_loop().create_task(_finish(response))
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)
        task.add_done_callback(lambda task: response.close())  # also one that never began; to an answer that has ended it does nothing


async def _finish(response: aiohttp.ClientResponse) -> None:
    with contextlib.suppress(aiohttp.ClientError, ConnectionError, TimeoutError, asyncio.IncompleteReadError):
        async with asyncio.timeout(FINISH_S):
            while await response.content.readany():
                pass


def _dropped(request: asyncio.Task[aiohttp.ClientResponse]) -> None:
    """Of a request that nobody waits for: its connection is closed, and its failure nobody's."""
    if not request.cancelled() and request.exception() is None:
        request.result().close()
