"""How bytes get to a host and back: one verb, two clients behind it, chosen by URL.

`http1` is our own, for plain HTTP on a network of one's own: it is where a gateway's cost per event is decided (docs/performance.md).
`library` is aiohttp, for what ours does not do: TLS, proxies, unix sockets. Both pass tests/wire/test_transport.py.
"""

from __future__ import annotations

from backends.sglang_dsv3.transport.contract import ConnectFailed, ConnectionLost, Options, Response, Transport, Unanswered, request, tls

__all__ = ["ConnectFailed", "ConnectionLost", "Options", "Response", "Transport", "Unanswered", "request", "tls", "to_host"]


def to_host(url: str, options: Options) -> Transport:
    """A transport to the host at `url` (http, https or unix, no path); does no I/O."""
    if url.startswith("http://") and options.proxy is None:
        from backends.sglang_dsv3.transport.http1 import Http1

        return Http1(url, options)
    from backends.sglang_dsv3.transport.library import Library

    return Library(url, options)
