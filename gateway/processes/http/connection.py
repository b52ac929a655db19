"""One client's connection: bytes from the socket through the parser (httptools) into exchanges, one answered after the other.

What comes is counted before it is believed: a head in bytes and headers, what a chunked body holds beside its content, requests that are
sent ahead. Where the client says what is no request the connection is *deaf* from there on: what is being answered is answered to its end,
then the client is told what was wrong, and the connection closes.

The class is duck-typed for asyncio (a plain class compiles, one with a foreign base does not) and for httptools.
"""

from __future__ import annotations

import logging
from typing import Any

import httptools

from gateway.errors import GatewayError, Headers, MethodNotAllowed, Unavailable, as_gateway_error
from gateway.processes.http import bounds, head
from gateway.processes.http.exchange import Exchange, Flow
from gateway.processes.http.shared import Shared
from gateway.wire.asgi import CONNECTION, FIRST, Scope

log = logging.getLogger("penstock.http")

# Headers that have to be seen before the application does.
_NOTED = frozenset((b"host", b"content-length", b"transfer-encoding", b"expect"))


class Connection:
    """See above."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._parser: Any = None
        self._transport: Any = None
        self._flow: Flow = Flow(None, None)
        self._client: tuple[str, int] | None = None
        self._scope: dict[str, Any] = {}
        # The request that is being read: its head,
        self._url = b""
        self._headers: Headers = []
        self._first: dict[bytes, bytes] = {}
        self._in_head = True
        # its head's bytes as far as they are known to be, those that may be among them, and all that the parser has before it now,
        self._head_bytes = 0
        self._head_slack = 0
        self._fed = 0
        # what of it has to be seen before the application does,
        self._hosts = 0
        self._declared = self._offer = b""
        self._coded = self._expects = self._last = False
        # and its body; how much content there was on this connection, how much else in this body, and how many requests were whole.
        self._reading: Exchange | None = None
        self._content = 0
        self._framing = 0
        self._whole = 0
        # Who is answered now, and who waits for that, or for the client to read what it was answered before.
        self._current: Exchange | None = None
        self._queue: list[tuple[Exchange, Scope]] = []
        # Nothing that comes now is a request, bytes of which there were so many; what the client is told when its turn has come.
        self._deaf = False
        self._unheard = 0
        self._refusal = b""
        self._lingering = False
        # When to look here again, in the loop's seconds, and since when nothing has been under way; 0 is never.
        self._deadline = self._idle_since = 0.0
        self._surplus = False  # there were too many connections when this one came

    # From the transport

    def connection_made(self, transport: Any) -> None:
        """A client is there, and has a while to say what it wants."""
        loop = self._shared.loop
        self._transport = transport
        self._flow = Flow(transport, loop)
        self._parser = httptools.HttpRequestParser(self)
        self._client = head.address(transport.get_extra_info("peername"))
        self._scope = head.scope(self._client, transport)
        connections = self._shared.connections
        connections.add(self)
        self._surplus = len(connections) > self._shared.most
        if self._surplus and len(connections) > self._shared.most * 5 // 4:
            log.warning("%d connections are open: one from %s is closed", len(connections), self._name())
            transport.abort()
        self._idle_since = loop.time()
        self._deadline = self._idle_since + self._shared.head_s

    def connection_lost(self, error: Exception | None) -> None:
        """A client is gone."""
        self._shared.connections.discard(self)
        self._parser = None
        self._deaf = True
        self._queue.clear()
        self._flow.drained()
        if self._current is not None:
            self._current.lost()

    def eof_received(self) -> bool:
        """The client has closed its side: for us it has left, as for NGINX."""
        return False

    def pause_writing(self) -> None:
        """The client takes the answer more slowly than we have it."""
        self._flow.full = True

    def resume_writing(self) -> None:
        """It has caught up."""
        self._flow.drained()
        if self._current is None and self._queue:
            self._next()

    def data_received(self, data: bytes) -> None:
        """Bytes from the client, through the parser and past the bounds."""
        if self._deaf:
            self._unheard += len(data)
            if self._unheard > bounds.MAX_LINGER_BYTES:
                self._transport.close()
            return
        while True:
            in_head, head_bytes, whole, content = self._in_head, self._head_bytes, self._whole, self._content
            self._fed = len(data)
            try:
                self._parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as offer:
                again = self._without_offer()
                if not again:
                    return
                data = again + data[offer.args[0] :]
            except httptools.HttpParserError as error:
                self._unparsed(error)
                return
        if self._in_head:
            if in_head and whole == self._whole:
                if whole and not head_bytes and self._current is None:  # the next request of a connection that was kept
                    self._deadline = self._shared.loop.time() + self._shared.head_s
                self._head_bytes += self._fed  # what the parser has not passed on yet counts too
            elif self._head_bytes:
                self._head_bytes = head.size(self._url, self._headers)
                self._head_slack = self._fed
            if self._head_bytes > bounds.MAX_HEAD_BYTES:
                self._refuse(head.too_large())
        elif self._reading is not None:
            if self._coded and not in_head and whole == self._whole:
                self._framing = max(0, self._framing + self._fed - (self._content - content))
                if self._framing > bounds.MAX_FRAMING_BYTES:
                    self._refuse(head.malformed("The chunked body has too much beside its content: chunk extensions or trailers.", 413))
                    return
            self._reading.fed()

    def _without_offer(self) -> bytes:
        """The head that ended in an offer to go on in another protocol, for a parser that is not told of it.

        httptools cannot be made to read the body of such a request, and would take it for the next one."""
        method = self._parser.get_method()
        if method == b"CONNECT":
            self._refuse(MethodNotAllowed("CONNECT", self._url.decode("latin-1"), ["GET", "HEAD", "POST"]))
            return b""
        again = head.without_offer(method, self._url, self._parser.get_http_version(), self._headers)
        self._offer = b",".join([value for name, value in self._headers if name == b"upgrade"]).lower()
        self._parser = httptools.HttpRequestParser(self)
        return again

    def _unparsed(self, error: Exception) -> None:
        if self._deaf:  # the client had said that its last request was the last
            self._unheard += 1
            return
        cause = error.__context__
        if isinstance(cause, GatewayError):
            self._refuse(cause)
        elif cause is not None:
            log.error("a request from %s could not be read", self._name(), exc_info=cause)
            self._refuse(as_gateway_error(cause))
        elif self._parser.get_method() == b"PRI" and not self._whole:
            log.info("%s speaks HTTP/2 at once, which this port does not", self._name())
            self._refusal = head.NO_HTTP2
            self._hang_up()
        else:
            self._refuse(head.malformed(f"This is no HTTP/1.1 request: {error}."))

    # From the parser

    def on_message_begin(self) -> None:
        """A request's head begins."""
        self._url, self._declared, self._hosts = b"", b"", 0
        self._headers, self._first = [], {}
        self._head_bytes = max(1, self._head_bytes)
        self._coded = self._expects = False

    def on_url(self, url: bytes) -> None:
        """The request's target, or a piece of it."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; trailers are left out, as RFC 9110 6.5.1 allows."""
        if not self._in_head:
            return
        name = name.lower()
        headers = self._headers
        headers.append((name, value))
        if name not in self._first:
            self._first[name] = value
        if name in _NOTED:
            self._note(name, value)
        if len(headers) > bounds.MAX_HEADERS:
            raise head.too_large()

    def _note(self, name: bytes, value: bytes) -> None:
        if name == b"host":
            self._hosts += 1
            if value not in self._shared.hosts:
                if not head.is_host(value):
                    raise head.malformed("The Host header is no host name or address, with or without a port.")
                if len(self._shared.hosts) < 100:
                    self._shared.hosts.add(value)
        elif name == b"content-length":
            self._declared = value
        elif name == b"transfer-encoding":
            self._coded = True
            if value.strip().lower() != b"chunked":
                raise head.malformed("Of transfer codings only 'chunked' is understood, and only once.", 501)
        else:
            self._expects = value.strip().lower() == b"100-continue"

    def on_headers_complete(self) -> None:
        """The head has ended: the request is on its way into the application, or behind the one that is there."""
        parser = self._parser
        if parser.should_upgrade():
            return  # it comes again without the offer
        may_be = self._head_bytes + self._head_slack + self._fed
        if may_be > bounds.MAX_HEAD_BYTES and head.size(self._url, self._headers) > bounds.MAX_HEAD_BYTES:
            raise head.too_large()
        version = parser.get_http_version()
        if version != "1.1":
            head.verify_older(version, self._coded)
            self._expects = False
        if self._hosts != 1 and (self._hosts or version == "1.1"):
            raise head.malformed("A request has exactly one Host header.")
        method = parser.get_method()
        path, query, authority = head.target(self._url, method)
        headers = self._headers
        if authority is not None:  # RFC 9112 3.2.2: then it is this, whatever Host says
            headers = [(b"host", authority)] + [(name, value) for name, value in headers if name != b"host"]
            self._first[b"host"] = authority
        if self._surplus and len(self._shared.connections) > self._shared.most:
            raise Unavailable("There are too many connections now.", code="too_many_connections", retry_after_s=1)
        offer, self._offer = self._offer, b""
        if offer and b"websocket" in offer and path == b"/v1/responses":
            raise head.no_websocket()
        self._in_head, self._framing = False, 0
        self._last = not parser.should_keep_alive()
        keep = not self._last and version == "1.1"
        exchange = Exchange(
            self._shared, self._flow, method == b"HEAD", int(version == "1.1"), keep, self._declared, self._expects, self._answered
        )
        scope = self._scope.copy()
        scope["http_version"] = version
        scope["method"] = head.METHODS.get(method) or method.decode()
        scope["path"] = head.decoded(path)
        scope["raw_path"] = path
        scope["query_string"] = query
        scope["headers"] = headers
        scope[FIRST] = self._first
        scope[CONNECTION] = exchange
        self._reading = exchange
        if self._current is None and not self._flow.full:
            self._answer(exchange, scope)
        elif len(self._queue) < bounds.MAX_PIPELINED:
            self._queue.append((exchange, scope))
            self._flow.pause_reading()
        else:  # the rest of what was sent ahead is the client's to send again, on another connection
            self._queue[-1][0].keep = False
            self._deaf = True
            self._unheard += 1

    def on_chunk_header(self) -> None:
        """A chunk may have as much framing as it needs."""
        self._framing -= bounds.FRAMING_BYTES_PER_CHUNK

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        self._content += len(data)
        if self._reading is not None:
            self._reading.feed(data)

    def on_message_complete(self) -> None:
        """The request is whole."""
        if self._in_head:
            return  # it comes again without the offer
        self._in_head = True
        self._head_bytes = self._head_slack = 0
        self._whole += 1
        self._deaf = self._deaf or self._last
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.end_of_request()
            if reading.complete:  # nobody wanted its body
                self._next()

    # One after the other

    def _answer(self, exchange: Exchange, scope: Scope) -> None:
        self._current = exchange
        self._deadline = 0.0
        exchange.task = task = self._shared.loop.create_task(exchange.run(scope), name="http")
        self._shared.tasks.add(task)

    def _answered(self, exchange: Exchange) -> None:
        self._current = None
        self._idle_since = self._shared.loop.time()
        if not exchange.keep:
            self._close(exchange.received and not self._unheard)
        elif not exchange.received:
            self._deadline = self._idle_since + bounds.LINGER_S
            self._flow.resume_reading()
        else:
            self._next()

    def _next(self) -> None:
        """Nobody is being answered now."""
        if self._queue:
            if self._flow.full:
                return
            exchange, scope = self._queue.pop(0)
            self._answer(exchange, scope)
        elif self._deaf:
            self._hang_up()
            return
        else:
            self._deadline = self._idle_since + (self._shared.head_s if self._head_bytes else bounds.KEEP_ALIVE_S)
        if not self._queue:
            self._flow.resume_reading()

    # The end

    def _refuse(self, error: GatewayError) -> None:
        """From here on nothing on this connection is a request."""
        path = self._url.partition(b"?")[0].decode("latin-1")
        level = logging.DEBUG if error.status == 426 else logging.INFO
        log.log(level, "refused what %s sent: %d, %s", self._name(), error.status, error.message)
        self._deaf = True
        self._refusal = head.refusal(error, path, self._shared.date)
        reading, self._reading = self._reading, None
        if reading is not None:
            if reading.begun:  # there is no other answer to this request
                self._refusal, reading.keep = b"", False
            else:
                reading.lost()
                if reading is self._current:
                    self._current = None
                else:
                    self._queue.pop()
        if self._current is None and not self._queue:
            self._hang_up()

    def _hang_up(self) -> None:
        """Say what is to be said, and close."""
        self._deaf = True
        if self._refusal and not self._transport.is_closing():
            self._transport.write(self._refusal)
        self._close(not self._refusal and not self._unheard)

    def _close(self, heard_all: bool) -> None:
        """Close; a client that may still be sending is read on for a while, or it would be reset and not see its answer."""
        self._deaf = True
        self._queue.clear()
        if heard_all or self._transport.is_closing():
            self._transport.close()
            return
        self._lingering = True
        self._deadline = self._shared.loop.time() + bounds.LINGER_S
        self._flow.resume_reading()
        if self._transport.can_write_eof():
            self._transport.write_eof()

    # From the server

    def look(self, now: float) -> None:
        """Every half second or so."""
        if not self._deadline or now < self._deadline:
            return
        self._deadline = 0.0
        if self._head_bytes and not self._lingering and self._reading is None:
            self._refuse(head.malformed(f"The request's head did not arrive within {self._shared.head_s:g} s.", 408, "request_timeout"))
        else:  # it was silent for long enough
            self._transport.close()

    def idle_s(self, now: float, heads: bool = True) -> float:
        """For how long nothing has been under way here; -1 where something is, a head that has begun (`heads`) included."""
        if self._current is not None or self._queue or self._lingering or (heads and self._in_head and self._head_bytes):
            return -1.0
        return now - self._idle_since

    def close(self) -> None:
        """Close it whatever is on it; what is written already still goes out."""
        self._transport.close()

    def _name(self) -> str:
        return self._client[0] if self._client is not None else "a client"
