"""aiohttp behind the same verb: TLS with certificates of one's own, proxies, unix sockets."""

from __future__ import annotations

import asyncio
import io
import ssl
from collections.abc import Mapping
from urllib.parse import urlsplit

import aiohttp

from backends.sglang_dsv3.transport.contract import FINISH_S, KEEP_ALIVE_S, MAX_HEAD_BYTES, ConnectFailed, ConnectionLost, Options

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

    def _open(self) -> aiohttp.ClientSession:
        """Made with the first request: a session belongs to the event loop it is used in."""
        if self._session is None:
            connector: aiohttp.BaseConnector
            if self._socket is not None:
                connector = aiohttp.UnixConnector(self._socket, limit=0, keepalive_timeout=KEEP_ALIVE_S)
            else:
                context: ssl.SSLContext | bool = True
                if self._options.ca_file is not None:
                    context = ssl.create_default_context()
                    context.load_verify_locations(self._options.ca_file)
                connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S, ssl=context)
            self._session = aiohttp.ClientSession(
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
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None, connect_s: float = 5.0
    ) -> _Response:
        """See `Transport`. The library sends and waits in one go: it does so in a task of its own."""
        return _Response(asyncio.get_running_loop().create_task(self._request(method, path, body, headers, connect_s)))

    async def request(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None, connect_s: float = 5.0
    ) -> _Response:
        """See `Transport`."""
        response = await self.send(method, path, body, headers, connect_s)
        try:
            await response.head()
        except BaseException:
            response.close()
            raise
        return response

    async def _request(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str] | None, connect_s: float
    ) -> aiohttp.ClientResponse:
        # sock_connect is silent about name look-ups and proxies; `connect` covers them, and the pool has no limit to wait for.
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
            )
        except aiohttp.ConnectionTimeoutError:
            raise ConnectFailed(f"no connection within {connect_s:g} s") from None
        except (aiohttp.ClientConnectorError, aiohttp.ClientProxyConnectionError) as error:
            raise ConnectFailed(str(error)) from None
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise ConnectionLost(repr(error)) from None

    async def aclose(self) -> None:
        """Close the pool."""
        if self._session is not None:
            await self._session.close()


class _Response:
    def __init__(self, request: asyncio.Task[aiohttp.ClientResponse]) -> None:
        self._request = request
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
            raise ConnectionLost(repr(error)) from None

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
        _finishing.add(task)
        task.add_done_callback(_finishing.discard)


_finishing: set[asyncio.Task[None]] = set()


async def _finish(response: aiohttp.ClientResponse) -> None:
    try:
        async with asyncio.timeout(FINISH_S):
            while await response.content.readany():
                pass
    except (aiohttp.ClientError, ConnectionError, TimeoutError, asyncio.IncompleteReadError):
        response.close()


def _dropped(request: asyncio.Task[aiohttp.ClientResponse]) -> None:
    """Of a request that nobody waits for: its connection is closed, and its failure nobody's."""
    if not request.cancelled() and request.exception() is None:
        request.result().close()
