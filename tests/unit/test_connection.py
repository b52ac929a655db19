"""The server's connections, byte by byte and with no socket: what a request is, what it is not, what is written back, and when it ends."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.processes.http import bounds, head
from gateway.processes.http.connection import Connection
from gateway.processes.http.shared import Shared
from gateway.wire.asgi import App, Receive, Scope, Send
from tests.support.memory_net import Pipe

HOST = b"host: x\r\n"
# PENSTOCK_FUZZ=10000 tries that many.
FUZZ = settings(max_examples=int(os.environ.get("PENSTOCK_FUZZ", "300")), deadline=None)


class Life:
    keep = True


class Line(Pipe):
    """The client's end: what was written, whether it is read, whether it was closed."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._loop = loop
        self.writes: list[bytes] = []
        self.reading = True
        self.half_closed = False
        self.connection: Connection | None = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.half_closed
        self.writes.append(bytes(data))
        super().write(data)

    def close(self) -> None:
        if not self.is_closing():
            super().close()
            assert self.connection is not None
            self._loop.call_soon(self.connection.connection_lost, None)

    abort = close

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.half_closed = True


class Client:
    """A server of `app` and one connection to it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, app: App, most: int = 100) -> None:
        self.loop = loop
        self.shared = Shared(app, Life(), 20.0, most)
        self.shared.loop = loop
        self.connection, self.line = self.connect()

    def connect(self) -> tuple[Connection, Line]:
        connection, line = Connection(self.shared), Line(self.loop)
        line.connection = connection
        connection.connection_made(line)
        return connection, line

    def turn(self, times: int = 6) -> None:
        async def turns() -> None:
            for _ in range(times):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def send(self, data: bytes, step: int = 0) -> bytes:
        """Everything, in pieces of `step` bytes; what came back."""
        for start in range(0, len(data), step or len(data) or 1):
            if self.line.is_closing():
                break
            self.connection.data_received(data[start : start + (step or len(data))])
            self.turn()
        return bytes(self.line.written)

    def leave(self) -> None:
        self.connection.connection_lost(None)
        self.turn()

    def wait(self, seconds: float) -> None:
        """As if so much time had passed."""
        self.connection.look(self.loop.time() + seconds)
        self.turn()

    @property
    def closed(self) -> bool:
        return self.line.is_closing()

    def reads(self) -> bool:
        """Whether what the client sends is taken from the socket."""
        return self.line.reading


class Echo:
    """Keeps what it was asked, and answers with it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, bytes]] = []
        self.scopes: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message["body"]
            if not message["more_body"]:
                break
        self.seen.append((scope["method"], scope["raw_path"].decode(), body))
        self.scopes.append(scope)
        content = json.dumps([scope["method"], scope["path"], len(body)]).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    found = asyncio.new_event_loop()
    yield found
    end(found)


def end(loop: asyncio.AbstractEventLoop) -> None:
    """Nothing is left running when a test is over."""

    async def cancel() -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    loop.run_until_complete(cancel())
    loop.close()


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def client(loop: asyncio.AbstractEventLoop, echo: Echo) -> Client:
    return Client(loop, echo)


def post(body: bytes, more: bytes = b"", path: bytes = b"/v1/x") -> bytes:
    return b"POST %s HTTP/1.1\r\n%b%bcontent-length: %d\r\n\r\n%b" % (path, HOST, more, len(body), body)


def chunked(*chunks: bytes, more: bytes = b"", trailers: bytes = b"") -> bytes:
    framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return b"POST /v1/x HTTP/1.1\r\n%b%btransfer-encoding: chunked\r\n\r\n%b0\r\n%b\r\n" % (HOST, more, framed, trailers)


def statuses(written: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", written)]


def code(written: bytes) -> str:
    found: str = json.loads(written.rpartition(b"\r\n\r\n")[2])["error"]["code"]
    return found


# What is written


def test_the_head_of_an_answer_goes_out_with_its_first_bytes(loop: asyncio.AbstractEventLoop) -> None:
    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await asyncio.sleep(0)
        assert not served.line.writes
        for block in (b"one", b"", b"two"):
            await send({"type": "http.response.body", "body": block, "more_body": True})
        assert scope["penstock.connection"].write(b"three")
        await send({"type": "http.response.body", "body": b""})

    served = Client(loop, stream)
    served.shared.tick()
    served.send(post(b"{}"))
    first, *more = served.line.writes
    assert first.startswith(b"HTTP/1.1 200 OK\r\ndate: ")
    assert first.endswith(b" GMT\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n")
    assert more == [b"3\r\ntwo\r\n", b"5\r\nthree\r\n", b"0\r\n\r\n"]


def test_an_answer_that_is_known_whole_says_its_length(loop: asyncio.AbstractEventLoop) -> None:
    async def short(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"whole"})

    client = Client(loop, short)
    assert client.send(post(b"{}")) == b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwhole"
    assert len(client.line.writes) == 1
    assert not client.closed


@pytest.mark.parametrize(("method", "status"), [(b"HEAD", 200), (b"GET", 204), (b"GET", 304)])
def test_an_answer_without_a_body_has_none(loop: asyncio.AbstractEventLoop, method: bytes, status: int) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": [(b"etag", b"x")]})
        await send({"type": "http.response.body", "body": b"nobody sees this"})

    client = Client(loop, app)
    written = client.send(method + b" / HTTP/1.1\r\n" + HOST + b"\r\n")
    assert written.endswith(b"etag: x\r\n\r\n")
    assert written.count(b"\r\n") == 3


@pytest.mark.parametrize(
    "headers",
    [
        [(b"x", b"a\r\nset-cookie: b")],
        [(b"x", b"a\nb")],
        [(b"x", b"a\rb")],
        [(b"x\r\ny", b"a")],
        [(b"transfer-encoding", b"chunked")],
        [(b"content-length", b"3")],
    ],
)
def test_a_head_that_would_not_be_read_as_it_was_meant_is_a_500(
    loop: asyncio.AbstractEventLoop, headers: list[tuple[bytes, bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"four"})

    client = Client(loop, app)
    written = client.send(post(b"{}"))
    assert statuses(written) == [500]
    assert b"connection: close\r\n" in written
    assert b"set-cookie" not in written
    assert client.closed
    assert "unforeseen" in caplog.text


def test_an_answer_that_is_cut_short_does_not_look_whole(loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})

    client = Client(loop, app)
    written = client.send(post(b"{}"))
    assert client.closed
    assert not written.endswith(b"0\r\n\r\n")
    assert "without an answer" in caplog.text


def test_an_answer_that_the_server_ends_is_said_in_words_and_without_a_traceback(
    loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    client = Client(loop, app)
    client.send(post(b"{}"))
    for task in set(client.shared.tasks):
        task.cancel()
    client.turn()
    assert (statuses(bytes(client.line.written)), code(bytes(client.line.written))) == ([503], "shutting_down")
    assert not client.shared.tasks
    assert not caplog.records


# Who is gone


def test_whoever_watches_hears_once_that_the_client_is_gone(loop: asyncio.AbstractEventLoop) -> None:
    heard: list[str] = []
    got: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        connection = scope["penstock.connection"]
        assert (await receive())["more_body"] is False
        connection.watch(lambda: heard.append("not me"))
        connection.watch(None)
        connection.watch(lambda: heard.append("gone"))
        got.append((await receive())["type"])
        connection.watch(lambda: heard.append("at once"))
        assert connection.write(b"nobody reads this")
        await connection.drain()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"nor this"})

    client = Client(loop, app)
    client.send(post(b"{}"))
    client.leave()
    assert heard == ["gone", "at once"]
    assert got == ["http.disconnect"]
    assert not client.line.writes
    assert not client.shared.tasks
    assert not client.shared.connections


def test_an_answer_that_is_complete_has_nobody_who_could_leave(loop: asyncio.AbstractEventLoop) -> None:
    heard: list[str] = []
    late: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/next":
            await second.wait()
            return
        await receive()
        scope["penstock.connection"].watch(lambda: heard.append("gone"))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})
        await second.wait()
        late.append((await receive())["type"])

    second = asyncio.Event()
    client = Client(loop, app)
    client.send(post(b"{}"))
    client.send(post(b"the next one's", path=b"/next"))
    second.set()
    client.leave()
    assert not heard
    assert late == ["http.disconnect"], "and never the next request's body"


def test_a_client_that_does_not_read_is_waited_for(loop: asyncio.AbstractEventLoop) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(4):
            await send({"type": "http.response.body", "body": b"%d" % number, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    client = Client(loop, app)
    client.connection.data_received(post(b"{}"))
    client.connection.pause_writing()
    client.turn()
    assert len(client.line.writes) == 1
    client.connection.resume_writing()
    client.turn()
    assert client.line.writes[-1] == b"0\r\n\r\n"


# What a request is


REQUESTS = {
    "content-length": post(b'{"a": 1}'),
    "empty": post(b""),
    "chunked": chunked(b"one", b"two", b"three"),
    "trailers": chunked(b"one", more=b"trailer: x\r\n", trailers=b"x: y\r\nauthorization: Bearer z\r\n"),
    "get": b"GET /v1/models?a=b HTTP/1.1\r\n" + HOST + b"\r\n",
    "line ends before it": b"\r\n\r\n" + post(b"x"),
    "upgrade": post(b'{"a": 1}', b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"),
    "upgrade, kept": post(b'{"a": 1}', b"connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"),
    "upgrade, chunked": chunked(b"one", b"two", more=b"Upgrade: foo/2\r\nConnection: UPGRADE\r\nupgrade: bar\r\n"),
    "upgrade, empty": post(b"", b"connection: upgrade\r\nupgrade: h2c\r\n"),
    "upgrade, no body": b"GET /v1/models HTTP/1.1\r\n" + HOST + b"connection: upgrade\r\nupgrade: h2c\r\n\r\n",
}


def asked(loop: asyncio.AbstractEventLoop, data: bytes, step: int = 0) -> tuple[list[tuple[str, str, bytes]], bytes]:
    echo = Echo()
    written = Client(loop, echo).send(data, step)
    return echo.seen, written


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_is_the_same_in_whatever_pieces_it_comes(loop: asyncio.AbstractEventLoop, name: str) -> None:
    whole = asked(loop, REQUESTS[name])
    assert len(whole[0]) == 1
    assert statuses(whole[1]) == [200]
    for step in range(1, 40):
        assert asked(loop, REQUESTS[name], step) == whole


@pytest.mark.parametrize("name", [name for name in REQUESTS if name.startswith("upgrade")])
def test_an_offer_to_go_on_in_another_protocol_is_ignored(client: Client, echo: Echo, name: str) -> None:
    client.send(REQUESTS[name])
    headers = dict(echo.scopes[0]["headers"])
    assert b"upgrade" not in headers
    assert b"upgrade" not in headers.get(b"connection", b"").lower()
    client.send(REQUESTS["content-length"])
    assert echo.seen[1] == ("POST", "/v1/x", b'{"a": 1}')


def test_a_body_after_an_offer_is_never_a_request(client: Client, echo: Echo) -> None:
    inner = post(b"inner", path=b"/smuggled")
    client.send(post(inner, b"connection: upgrade\r\nupgrade: h2c\r\n"), 50)
    client.send(chunked(inner, more=b"connection: upgrade\r\nupgrade: h2c\r\n"), 50)
    assert echo.seen == [("POST", "/v1/x", inner)] * 2


@FUZZ
@given(
    names=st.lists(st.sampled_from(sorted(REQUESTS)), min_size=1, max_size=6),
    cuts=st.lists(st.integers(1, 400), min_size=1, max_size=12),
)
def test_requests_in_a_row_are_seen_as_they_were_sent(names: list[str], cuts: list[int]) -> None:
    loop = asyncio.new_event_loop()
    try:
        expected = [request for name in names for request in asked(loop, REQUESTS[name])[0]]
        echo = Echo()
        client = Client(loop, echo)
        data, at = b"".join(REQUESTS[name] for name in names), 0
        while at < len(data):
            step = cuts.pop(0) if cuts else len(data)
            client.connection.data_received(data[at : at + step])
            at += step
        client.turn(40)
        assert echo.seen == expected
        assert not client.closed
        client.leave()
    finally:
        end(loop)


def test_trailers_are_no_headers(client: Client, echo: Echo) -> None:
    client.send(REQUESTS["trailers"])
    assert [name for name, _ in echo.scopes[0]["headers"]] == [b"host", b"trailer", b"transfer-encoding"]


def test_a_large_body_is_held_back_until_it_is_wanted(loop: asyncio.AbstractEventLoop) -> None:
    wanted = asyncio.Event()
    parts: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await wanted.wait()
        more = True
        while more:
            message = await receive()
            parts.append(len(message["body"]))
            more = message["more_body"]

    client = Client(loop, app)
    body = b"x" * 300_000
    data = post(body)
    client.send(data[:70_000])
    assert not client.reads()
    wanted.set()
    client.turn()
    assert client.reads()
    client.send(data[70_000:], 50_000)
    assert sum(parts) == len(body)
    assert min(parts[:-1]) >= bounds.HIGH_WATER, "parts are large, but for the last"


def test_many_small_chunks_take_the_room_of_their_content(loop: asyncio.AbstractEventLoop) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    client = Client(loop, app)
    framed = b"2\r\nxx\r\n" * 40_000
    client.send(chunked()[:-5] + framed, 100_000)
    exchange: Any = client.connection._current
    assert len(exchange._parts) < 20_000
    assert not client.reads()


def test_the_whole_body_can_be_had_without_waiting(loop: asyncio.AbstractEventLoop) -> None:
    got: list[bytes | None] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        connection = scope["penstock.connection"]
        got.append(connection.body())
        if got[-1] is None:
            got.append((await receive())["body"])
        got.append(connection.body())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    client = Client(loop, app)
    client.send(post(b"here"))
    client.send(post(b"comes later"), 60)
    assert got == [b"here", None, None, b"comes later", None]


@pytest.mark.parametrize(
    ("target", "path", "query", "host"),
    [
        (b"/a%20b%2Fc?q=%20", "/a b/c", b"q=%20", b"x"),
        (b"http://other.example:80/v1?q", "/v1", b"q", b"other.example:80"),
        (b"https://[::1]:8000", "/", b"", b"[::1]:8000"),
        (b"HTTP://other.example?q", "/", b"q", b"other.example"),
    ],
)
def test_the_forms_of_a_target(client: Client, echo: Echo, target: bytes, path: str, query: bytes, host: bytes) -> None:
    client.send(b"GET %b HTTP/1.1\r\n%b\r\n" % (target, HOST))
    scope = echo.scopes[0]
    assert (scope["path"], scope["query_string"], dict(scope["headers"])[b"host"]) == (path, query, host)


def test_options_may_be_asked_of_the_server_itself(client: Client, echo: Echo) -> None:
    client.send(b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n")
    assert echo.seen == [("OPTIONS", "*", b"")]


@pytest.mark.parametrize(("sent", "told"), [(False, [b"HTTP/1.1 100 Continue\r\n\r\n"]), (True, [])])
def test_who_waits_to_be_told_to_send_the_body_is_told(client: Client, echo: Echo, sent: bool, told: list[bytes]) -> None:
    data = post(b"body", b"expect: 100-continue\r\n")
    if sent:  # without waiting
        client.send(data)
    else:
        client.send(data[:-4])
        assert client.line.writes == told
        client.send(data[-4:])
    assert client.line.writes[:-1] == told
    assert echo.seen == [("POST", "/v1/x", b"body")]


def test_who_waits_to_be_told_and_is_refused_sends_nothing_and_is_closed(loop: asyncio.AbstractEventLoop) -> None:
    client = Client(loop, refusing)
    written = client.send(post(b"body", b"expect: 100-continue\r\n")[:-4])
    assert statuses(written) == [401]
    assert b"connection: close\r\n" in written


async def refusing(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"no"})


def test_http_1_0_is_answered_without_chunks_and_closed(loop: asyncio.AbstractEventLoop) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one,", "more_body": True})
        await send({"type": "http.response.body", "body": b"two"})

    client = Client(loop, app)
    written = client.send(b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n")
    assert written == b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\none,two"
    assert client.closed


# What is none


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST * 2 + b"\r\n", 400),
        (b"GET / HTTP/1.0\r\n" + HOST * 2 + b"\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: a b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: a@b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: a/b\r\n\r\n", 400),
        (b"GET /a#b HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET ftp://x/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET http://u:p@x/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET * HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"CONNECT x:443 HTTP/1.1\r\n" + HOST + b"\r\n", 405),
        (b"GET / HTTP/2.0\r\n" + HOST + b"\r\n", 505),
        (b"GET /\r\n\r\n", 505),
        (b"POST / HTTP/1.0\r\n" + HOST + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + HOST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\n" + HOST + b"transfer-encoding: identity\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n", 400),
        (b"hello\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ],
)
def test_what_is_no_request_is_told_so_and_nobody_else_hears_of_it(
    loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture, data: bytes, status: int
) -> None:
    with caplog.at_level(logging.INFO, "penstock.http"):
        for step in (0, 1, 7):
            seen, written = asked(loop, data, step)
            assert not seen
            assert statuses(written)[:1] == [status], written
            assert b"connection: close\r\n" in written
            assert code(written)
    assert len(caplog.records) == 3
    assert caplog.records[0].getMessage().startswith(f"refused what 127.0.0.1 sent: {status}, ")


def test_http_2_is_refused_in_its_own_words(client: Client, echo: Echo) -> None:
    written = client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0", 5)
    assert written == head.NO_HTTP2
    settings_frame, goaway = written[:9], written[9:]
    assert settings_frame == b"\0\0\0\4\0\0\0\0\0"
    assert int.from_bytes(goaway[:3], "big") == len(goaway) - 9
    assert goaway[3] == 7
    assert int.from_bytes(goaway[13:17], "big") == 13, "HTTP_1_1_REQUIRED"
    assert not echo.seen


def test_http_2_behind_a_request_is_nonsense_like_any_other(client: Client, echo: Echo) -> None:
    written = client.send(post(b"x") + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    assert statuses(written) == [200, 400]


def test_websocket_is_refused_where_clients_try_it_first(client: Client, echo: Echo, caplog: pytest.LogCaptureFixture) -> None:
    offer = b"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    with caplog.at_level(logging.DEBUG, "penstock.http"):
        written = client.send(b"GET /v1/responses HTTP/1.1\r\n" + HOST + offer + b"\r\n")
    assert (statuses(written), code(written)) == ([426], "upgrade_required")
    assert b"\r\nupgrade: HTTP/1.1\r\n" in written
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert not echo.seen


def test_nonsense_behind_a_request_waits_for_its_answer(loop: asyncio.AbstractEventLoop) -> None:
    go = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await go.wait()
        await send({"type": "http.response.body", "body": b"two"})

    client = Client(loop, app)
    client.send(post(b"{}") + b"nonsense\r\n\r\n")
    assert bytes(client.line.written).endswith(b"3\r\none\r\n")
    go.set()
    client.turn()
    answer, _, refusal = bytes(client.line.written).partition(b"3\r\ntwo\r\n0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert refusal.startswith(b"HTTP/1.1 400 ")


def test_a_body_that_breaks_is_refused_and_its_application_let_go(loop: asyncio.AbstractEventLoop) -> None:
    got: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        got.append((await receive())["type"])

    client = Client(loop, app)
    written = client.send(chunked(b"x")[:-5] + b"nonsense\r\n", 60)
    assert statuses(written) == [400]
    assert got == ["http.disconnect"]
    assert not client.shared.tasks


def test_after_its_last_request_a_client_is_not_heard(client: Client, echo: Echo) -> None:
    written = client.send(post(b"one", b"connection: close\r\n") + post(b"two"))
    assert [body for _, _, body in echo.seen] == [b"one"]
    assert statuses(written) == [200]


# Bounds


def a_head(size: int) -> bytes:
    start, end = b"GET / HTTP/1.1\r\n" + HOST + b"x: ", b"\r\n\r\n"
    return start + b"y" * (size - len(start) - len(end)) + end


@pytest.mark.parametrize("step", [0, 1000, 65536])
def test_a_head_has_a_size_whatever_its_pieces(loop: asyncio.AbstractEventLoop, step: int) -> None:
    seen, _ = asked(loop, a_head(bounds.MAX_HEAD_BYTES), step)
    assert len(seen) == 1
    seen, written = asked(loop, a_head(bounds.MAX_HEAD_BYTES + 100), step)
    assert not seen
    assert (statuses(written), code(written)) == ([431], "request_head_too_large")
    seen, written = asked(loop, post(b"x" * 10) + a_head(bounds.MAX_HEAD_BYTES + 100), step)
    assert len(seen) == 1
    assert statuses(written) == [200, 431]


@pytest.mark.parametrize("begun", [b"", post(b"x"), b"GET / HTTP/1.1\r\n" + HOST], ids=["line ends", "a second head", "one header"])
def test_a_head_that_does_not_end_is_not_waited_for(client: Client, begun: bytes) -> None:
    client.send(begun)
    sent = 0
    if begun:
        client.send(b"GET / HTTP/1.1\r\nx: " if begun.startswith(b"POST") else b"x: ")
    while 431 not in statuses(bytes(client.line.written)):
        client.send(b"y" * 1000 if begun else b"\r\n" * 500)
        sent += 1000
        assert sent <= bounds.MAX_HEAD_BYTES + 1000


def test_headers_have_a_number(loop: asyncio.AbstractEventLoop) -> None:
    for count, status in ((bounds.MAX_HEADERS - 1, 200), (bounds.MAX_HEADERS, 431)):
        _, written = asked(loop, b"GET / HTTP/1.1\r\n" + HOST + b"".join(b"x-%d: y\r\n" % number for number in range(count)) + b"\r\n")
        assert statuses(written) == [status]


@pytest.mark.parametrize(
    ("begun", "endless"),
    [
        (b"0\r\n", b"x: " + b"y" * 997 + b"\r\n"),
        (b"0\r\nx: ", b"y" * 1000),
        (b"0\r\n", b"x" * 1000),
        (b"1;", b"x" * 1000),
        (b"1;a", b";a=" + b"x" * 997),
        (b"", b"1;a=" + b"x" * 990 + b"\r\nz\r\n"),
        (b"", b"0" * 1000),
    ],
    ids=["trailers", "a trailer's value", "a trailer's name", "an extension", "extensions", "extensions of many chunks", "zeros"],
)
@pytest.mark.parametrize("step", [10, 1000, 100_000])
def test_what_surrounds_a_chunked_body_is_bounded(loop: asyncio.AbstractEventLoop, begun: bytes, endless: bytes, step: int) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    client = Client(loop, app)
    client.send(chunked()[:-5])
    client.send(begun)
    sent = 0
    while not client.line.written:
        client.connection.data_received((endless * (step // len(endless) + 1))[:step] if step >= 1000 else endless[:step])
        client.turn(1)
        sent += step
        assert sent <= 300_000
    assert statuses(bytes(client.line.written))[0] in (400, 413)


def test_small_chunks_may_have_as_much_framing_as_they_need(client: Client, echo: Echo) -> None:
    client.send(chunked(*[b"x"] * 20_000), 5_000)
    assert len(echo.seen[0][2]) == 20_000


def test_requests_sent_ahead_have_a_number(client: Client, echo: Echo) -> None:
    written = client.send(post(b"x") * 500)
    client.turn(500)
    assert len(echo.seen) == bounds.MAX_PIPELINED + 1
    assert bytes(client.line.written).count(b"connection: close") == 1
    assert client.line.half_closed
    assert written is not None


def test_requests_sent_ahead_are_answered_in_turn_and_not_read_meanwhile(loop: asyncio.AbstractEventLoop) -> None:
    gates = [asyncio.Event(), asyncio.Event()]
    begun: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        begun.append(scope["path"])
        await gates[len(begun) - 1].wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["raw_path"]})

    client = Client(loop, app)
    client.send(post(b"", path=b"/1") + post(b"", path=b"/2"))
    assert begun == ["/1"]
    assert not client.reads()
    gates[0].set()
    client.turn()
    assert begun == ["/1", "/2"]
    assert client.reads()
    gates[1].set()
    client.turn()
    assert [part[-2:] for part in client.line.writes] == [b"/1", b"/2"]


def test_a_client_that_asks_on_and_reads_nothing_is_waited_for(client: Client, echo: Echo) -> None:
    client.send(post(b"one"))
    client.connection.pause_writing()
    client.send(post(b"two") + post(b"three") + b"nonsense\r\n\r\n")
    assert [body for _, _, body in echo.seen] == [b"one"]
    assert not client.reads()
    assert client.connection.idle_s(client.loop.time() + 100) == -1
    client.connection.resume_writing()
    client.turn()
    assert [body for _, _, body in echo.seen] == [b"one", b"two", b"three"]
    assert statuses(bytes(client.line.written)) == [200, 200, 200, 400]


@pytest.mark.parametrize(("rest", "kept"), [(1000, True), (bounds.MAX_UNWANTED_BYTES + 1, False)])
def test_a_body_that_nobody_wants_is_read_for_the_connections_sake_or_not_at_all(
    loop: asyncio.AbstractEventLoop, rest: int, kept: bool
) -> None:
    client = Client(loop, refusing)
    data = post(b"x" * rest)
    written = client.send(data[:-rest])
    assert statuses(written) == [401]
    assert (b"connection: close" not in written) == kept
    if kept:
        client.send(data[-rest:], 400)
        assert statuses(client.send(post(b"next"))) == [401, 401]
    else:
        assert client.line.half_closed
        assert not client.closed, "a client that is reset while it sends does not see the answer"
        client.send(b"x" * rest, 4000)
        assert len(client.line.writes) == 1
        client.wait(bounds.LINGER_S + 1)
    assert client.closed is not kept


def test_a_client_that_goes_on_after_a_refusal_is_cut_off(loop: asyncio.AbstractEventLoop) -> None:
    client = Client(loop, refusing)
    client.send(chunked()[:-5])
    sent = 0
    while not client.closed:
        client.send(b"x" * (1 << 20))
        sent += 1 << 20
        assert sent <= bounds.MAX_LINGER_BYTES + (2 << 20)


def test_a_body_that_nobody_wants_and_that_does_not_come_is_not_waited_for(loop: asyncio.AbstractEventLoop) -> None:
    client = Client(loop, refusing)
    client.send(post(b"x" * 1000)[:-500])
    client.wait(bounds.LINGER_S - 1)
    assert not client.closed
    client.wait(bounds.LINGER_S + 1)
    assert client.closed


def test_silence_has_its_bounds(loop: asyncio.AbstractEventLoop) -> None:
    def after(data: bytes, seconds: float) -> tuple[bool, list[int]]:
        client = Client(loop, Echo())
        client.send(data)
        client.wait(seconds)
        return client.closed or client.line.half_closed, statuses(bytes(client.line.written))

    assert after(b"", 19) == (False, [])
    assert after(b"", 21) == (True, [])
    assert after(b"GET / HT", 21) == (True, [408])
    assert after(post(b"x"), 21) == (False, [200])
    assert after(post(b"x"), bounds.KEEP_ALIVE_S + 1) == (True, [200])
    assert after(post(b"x") + b"GET", 19) == (False, [200])
    assert after(post(b"x") + b"GET", 21) == (True, [200, 408])
    client = Client(loop, Echo())
    client.send(post(b"x"))
    client.send(b"GET")
    client.wait(21)
    assert statuses(bytes(client.line.written)) == [200, 408]


def test_too_many_connections_are_refused_and_far_too_many_closed(loop: asyncio.AbstractEventLoop) -> None:
    echo = Echo()
    client = Client(loop, echo, most=4)
    more = [client.connect() for _ in range(4)]
    assert statuses(client.send(post(b"x"))) == [200]
    refused, line = more[3]
    refused.data_received(post(b"x"))
    client.turn()
    assert (statuses(bytes(line.written)), code(bytes(line.written))) == ([503], "too_many_connections")
    assert b"retry-after: 1\r\n" in line.written
    assert not line.is_closing()
    _, last = client.connect()
    assert last.is_closing()


def test_what_fits_again_is_served(loop: asyncio.AbstractEventLoop) -> None:
    client = Client(loop, Echo(), most=4)
    for _ in range(3):
        client.connect()
    last, line = client.connect()
    client.leave()
    last.data_received(post(b"x"))
    client.turn()
    assert statuses(bytes(line.written)) == [200]


def test_idle_is_who_has_nothing_under_way(loop: asyncio.AbstractEventLoop) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    now = loop.time() + 6
    assert Client(loop, app).connection.idle_s(now) >= 5
    for sent in (b"GET / HT", post(b"x")):
        busy = Client(loop, app)
        busy.send(sent)
        assert busy.connection.idle_s(now) == -1
        assert (busy.connection.idle_s(now, heads=False) == -1) == sent.startswith(b"POST"), "a head may stay unfinished for ever"
    answered = Client(loop, Echo())
    answered.send(post(b"x"))
    assert answered.connection.idle_s(now) >= 4


PIECES: Sequence[bytes] = (
    b"GET / HTTP/1.1\r\n", b"POST /v1/x HTTP/1.1\r\n", b"POST /v1/x HTTP/1.0\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", HOST, b"\r\n",
    b"\n", b"content-length: 3\r\n", b"content-length: 5\r\n", b"transfer-encoding: chunked\r\n", b"connection: upgrade\r\n",
    b"upgrade: h2c\r\n", b"connection: close\r\n", b"expect: 100-continue\r\n", b"abc", b"3\r\nabc\r\n", b"3;x=y\r\nabc\r\n",
    b"0\r\n\r\n", b"0\r\n", b"x: y\r\n", b"\0", b" ", b"x" * 5000, b"CONNECT x:1 HTTP/1.1\r\n", b"OPTIONS * HTTP/1.1\r\n",
)  # fmt: skip


@FUZZ
@given(
    data=st.one_of(st.binary(max_size=300), st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join)),
    step=st.integers(1, 500),
    app=st.sampled_from([Echo, lambda: refusing]),
)
def test_whatever_comes_is_answered_or_waited_for_and_leaves_nothing(data: bytes, step: int, app: Callable[[], App]) -> None:
    loop = asyncio.new_event_loop()
    try:
        client = Client(loop, app())
        written = client.send(data, step)
        assert all(status in (200, 400, 401, 405, 408, 413, 426, 431, 501, 505) for status in statuses(written) if status != 100), written
        if not client.closed:
            client.leave()
        client.turn(30)
        assert not client.shared.connections
        assert not client.shared.tasks
    finally:
        end(loop)
