"""aiohttp behind the same verb: TLS with certificates of one's own, proxies, unix sockets."""

from __future__ import annotations

import asyncio
import io
import ssl
from collections.abc import Mapping
from urllib.parse import urlsplit

import aiohttp

from backends.sglang_dsv3.transport.contract import KEEP_ALIVE_S, MAX_HEAD_BYTES, ConnectFailed, ConnectionLost, Options, Response

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

    async def request(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None, connect_s: float = 5.0
    ) -> Response:
        """See `Transport`."""
        # sock_connect is silent about name look-ups and proxies; `connect` covers them, and the pool has no limit to wait for.
        timeout = aiohttp.ClientTimeout(total=None, connect=connect_s, sock_connect=connect_s)
        try:
            response = await self._open().request(
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
            # Not its repr, which holds every header of the request.
            raise ConnectionLost(f"{type(error).__name__}: {error}") from None
        return _Response(response)

    async def aclose(self) -> None:
        """Close the pool."""
        if self._session is not None:
            await self._session.close()


class _Response:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.content_type = response.headers.get("content-type", "")
        self.connected_at = 0.0

    async def read(self) -> bytes:
        """See `Response`."""
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, ConnectionError, asyncio.IncompleteReadError) as error:
            raise ConnectionLost(f"{type(error).__name__}: {error}") from None

    @property
    def ended(self) -> bool:
        """See `Response`."""
        return self._response.content.at_eof()

    def close(self) -> None:
        """See `Response`. aiohttp has pooled the connection by itself when the body was read to its end."""
        if not self.ended:
            self._response.close()
