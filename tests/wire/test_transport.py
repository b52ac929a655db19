"""Both transports against servers written byte by byte: what they send, what they make of every kind of answer, and what they let go of."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from backends.sglang_dsv3 import transport
from backends.sglang_dsv3.transport import ConnectFailed, ConnectionLost, Options, Transport, contract, http1, library
from backends.sglang_dsv3.transport.http1 import Http1
from backends.sglang_dsv3.transport.library import Library

T = TypeVar("T")
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
BOTH = pytest.mark.parametrize("kind", [Http1, Library])
OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n"


class Host:
    """A server whose every connection is `handler`'s; it counts them."""

    def __init__(self, handler: Handler) -> None:
        self.connections = 0
        self.ended = 0
        self.heads: list[bytes] = []
        self._handler = handler

        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._handler(reader, writer)
            writer.close()
            await writer.wait_closed()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()
            self.ended += 1

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0.01)  # transports close a turn of the loop later


async def request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """One request's head and body; IncompleteReadError when there is none."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = [line.partition(b":") for line in head.lower().split(b"\r\n")]
    length = next((int(value) for name, _, value in lines if name == b"content-length"), 0)
    return head, await reader.readexactly(length)


@contextlib.asynccontextmanager
async def serving(handler: Handler, **options: Any) -> AsyncIterator[tuple[Host, int]]:
    host = Host(handler)
    server = await asyncio.start_server(host, "127.0.0.1", 0, limit=64 << 20, **options)
    try:
        yield host, server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await host.end()


def answering(*pieces: bytes, close: bool = True) -> Handler:
    """Every request is answered with these writes, each on its own."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await request(reader)
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if close:
                return

    return handle


def run(work: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(20):
            return await work

    return asyncio.run(bounded())


async def until(what: str, probe: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not probe():
            await asyncio.sleep(0.01)


async def ask(way: Transport, body: bytes = b"{}", begun: asyncio.Event | None = None) -> tuple[int, bytes]:
    """One request; `begun` is set when some of the answer's body has been read."""
    response = await transport.request(way, "POST", "/x", body, {"x-one": "1"})
    content = b""
    try:
        while part := await response.read():
            content += part
            if begun is not None:
                begun.set()
    finally:
        response.close()
    return response.status, content


@contextlib.asynccontextmanager
async def to(kind: type[Transport], port: int, options: Options | None = None) -> AsyncIterator[Transport]:
    way = kind(f"http://127.0.0.1:{port}", options or Options({"authorization": "Bearer k"}))  # type: ignore[call-arg]
    try:
        yield way
    finally:
        await way.aclose()


def alone(kind: type[Transport], handler: Handler, body: bytes = b"{}") -> tuple[int, bytes]:
    """One request to a host of its own."""

    async def work() -> tuple[int, bytes]:
        async with serving(handler) as (_, port), to(kind, port) as way:
            return await ask(way, body)

    return run(work())


@BOTH
def test_what_goes_out_is_the_request_and_nothing_else(kind: type[Transport]) -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await request(reader))
        writer.write(OK + b"content-length: 0\r\n\r\n")

    assert alone(kind, handler=handle, body=b'{"a":1}') == (200, b"")
    head, body = seen[0]
    first, *lines = head.lower().split(b"\r\n")
    assert first == b"post /x http/1.1"
    names = sorted(line.split(b":")[0] for line in lines if line)
    assert names == [b"authorization", b"content-length", b"host", b"x-one"]
    assert body == b'{"a":1}'


@BOTH
@pytest.mark.parametrize(
    "pieces",
    [
        (OK + b"content-length: 5\r\n\r\nhello",),
        (OK + b"content-length: 5\r\n\r\n", b"he", b"llo"),
        (OK + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",),
        (OK + b"transfer-encoding: chunked\r\n\r\n", b"2;x=y\r\nhe\r\n", b"3\r\nllo\r\n0\r\nx-trailer: 1\r\n\r\n"),
        (OK + b"\r\n", b"hel", b"lo"),
        (OK + b"connection: close\r\n\r\nhello",),
        (b"HTTP/1.1 100 Continue\r\n\r\n", OK + b"content-length: 5\r\n\r\nhello"),
        tuple(bytes([byte]) for byte in OK + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    ],
    ids=["length", "pieces", "chunked", "trailer", "until the end", "close", "continue", "byte by byte"],
)
def test_a_body_is_read_however_it_comes(kind: type[Transport], pieces: tuple[bytes, ...]) -> None:
    assert alone(kind, answering(*pieces)) == (200, b"hello")


@BOTH
@pytest.mark.parametrize(
    "pieces",
    [
        (),
        (b"HTTP/1.1 200 O",),
        (b"220 smtp ready\r\n",),
        (OK + b"content-length: 5\r\n\r\nhel",),
        (OK + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",),
        (OK + b"transfer-encoding: chunked\r\n\r\nzz\r\n",),
        (OK + b"x: " + b"y" * (256 << 10),),
    ],
    ids=["nothing", "half a head", "no HTTP", "short", "no last chunk", "bad chunk", "endless line"],
)
def test_what_is_broken_or_endless_is_lost(kind: type[Transport], pieces: tuple[bytes, ...]) -> None:
    with pytest.raises(ConnectionLost):
        alone(kind, answering(*pieces))


@pytest.mark.parametrize(
    "start",
    [OK, OK + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n", b"HTTP/1.1 100 Continue\r\n"],
    ids=["head", "trailer", "100"],
)
def test_headers_are_bounded_together(start: bytes) -> None:
    """By ours; aiohttp bounds each of them, and their number."""
    lines = [b"x-%d: %s\r\n" % (number, b"y" * 100) for number in range(4000)]
    with pytest.raises(ConnectionLost, match="64 kB of head"):
        alone(Http1, answering(start, *(b"".join(lines[at : at + 100]) for at in range(0, len(lines), 100))))


@BOTH
def test_connections_are_used_again_while_they_are_young(kind: type[Transport], monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with serving(answering(OK + b"content-length: 5\r\n\r\nhello", close=False)) as (host, port), to(kind, port) as way:
            for _ in range(3):
                assert await ask(way) == (200, b"hello")
            assert host.connections == 1
            await asyncio.gather(*(ask(way) for _ in range(4)))
            assert host.connections <= 4
            before = host.connections
            if kind is Http1:  # aiohttp's clock cannot be moved; its keep-alive is an option of ours
                monkeypatch.setattr(http1, "KEEP_ALIVE_S", 0.0)
                await ask(way)
                assert host.connections == before + 1
                await until("the old ones are closed", lambda: host.ended == before)
        await until("all are closed", lambda: host.ended == host.connections)

    assert contract.KEEP_ALIVE_S < 5.0, "SGLang's own"
    run(work())


@BOTH
def test_a_connection_that_the_host_closed_while_it_was_idle_is_replaced(kind: type[Transport]) -> None:
    async def work() -> None:
        async with serving(answering(OK + b"content-length: 5\r\n\r\nhello")) as (host, port), to(kind, port) as way:
            for count in range(1, 4):
                assert await ask(way) == (200, b"hello")
                await until("the host has closed it", lambda count=count: host.ended == count)  # type: ignore[misc]
                await asyncio.sleep(0.02)  # and so have we been told

    run(work())


def once_then(*later: bytes | None, answer: bytes = OK + b"content-length: 5\r\n\r\nhello") -> tuple[Handler, list[int]]:
    """The first request of all is answered on a connection that stays; each later one gets the next of these bytes (None: `answer`), and
    then its connection is closed. Which connection each request came on is noted."""
    requests: list[int] = []
    left = [None, *later]
    connections = iter(range(100))

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = next(connections)
        while True:
            await request(reader)
            requests.append(number)
            bytes_of_it = left.pop(0)
            writer.write(answer if bytes_of_it is None else bytes_of_it)
            if bytes_of_it is not None:
                return

    return handle, requests


@BOTH
def test_a_used_connection_that_closes_without_a_byte_is_replaced_once(kind: type[Transport]) -> None:
    async def work() -> None:
        handle, requests = once_then(b"", None)
        async with serving(handle) as (_, port), to(kind, port) as way:
            assert await ask(way) == (200, b"hello")
            assert await ask(way) == (200, b"hello")
        assert requests == [0, 0, 1]

    run(work())


@BOTH
@pytest.mark.parametrize(
    ("later", "expected"),
    [((b"", b""), [0, 0, 1]), ((b"HTTP/1.1 2",), [0, 0]), ((OK + b"content-length: 5\r\n\r\nhel",), [0, 0])],
    ids=["the second one too", "half a head", "half a body"],
)
def test_what_may_have_been_answered_is_not_asked_again(kind: type[Transport], later: tuple[bytes, ...], expected: list[int]) -> None:
    async def work() -> None:
        handle, requests = once_then(*later)
        async with serving(handle) as (_, port), to(kind, port) as way:
            assert await ask(way) == (200, b"hello")
            with pytest.raises(ConnectionLost):
                await ask(way)
        assert requests == expected

    run(work())


@BOTH
def test_a_connection_that_closes_late_is_not_replaced(kind: type[Transport], monkeypatch: pytest.MonkeyPatch) -> None:
    """What took its time may have been generating."""
    for module in (http1, library):
        monkeypatch.setattr(module, "CLOSED_S", 0.0)

    async def work() -> None:
        handle, requests = once_then(b"")
        async with serving(handle) as (_, port), to(kind, port) as way:
            assert await ask(way) == (200, b"hello")
            with pytest.raises(ConnectionLost):
                await ask(way)
        assert requests == [0, 0]

    run(work())


@BOTH
def test_where_no_other_connection_is_to_be_had_the_loss_is_what_is_told(kind: type[Transport]) -> None:
    async def work() -> None:
        server: asyncio.Server

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await request(reader)
            writer.write(OK + b"content-length: 5\r\n\r\nhello")
            await request(reader)
            server.close()
            writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with to(kind, server.sockets[0].getsockname()[1]) as way:
            assert await ask(way) == (200, b"hello")
            with pytest.raises(ConnectionLost):
                await ask(way)

    run(work())


@BOTH
@pytest.mark.parametrize("extra", [b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged", b"x"])
def test_bytes_that_no_request_asked_for_end_the_connection(kind: type[Transport], extra: bytes) -> None:
    """An answer that is there before its question belongs to nobody: it must not be given to the next client."""

    async def work() -> None:
        async with serving(answering(OK + b"content-length: 5\r\n\r\nhello" + extra, close=False)) as (_, port), to(kind, port) as way:
            for _ in range(3):
                with contextlib.suppress(ConnectionLost):
                    assert await ask(way) == (200, b"hello")

    run(work())


@BOTH
@pytest.mark.parametrize("ends", [True, False])
def test_a_connection_whose_body_is_as_good_as_read_is_used_again_or_closed(kind: type[Transport], ends: bool) -> None:
    """What follows the last event are a few bytes, for which nobody has to wait."""

    async def work() -> None:
        finished = asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                await request(reader)
                writer.write(OK + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
                await finished.wait()
                if ends:
                    writer.write(b"3\r\nxyz\r\n0\r\n\r\n")
                    finished.clear()

        async with serving(handle) as (host, port), to(kind, port) as way:
            response = await transport.request(way, "POST", "/x", b"{}")
            assert await response.read() == b"hello"
            response.finish()
            finished.set()
            if ends:
                await until("the end has come", lambda: not finished.is_set())
                await asyncio.sleep(0.05)  # and so have we been told
                finished.set()
                assert (await ask(way))[0] == 200
                assert host.connections == 1
            else:
                await until("it is cut", lambda: host.ended == 1)

    run(work())


@BOTH
def test_closing_the_pool_closes_what_was_about_to_be_idle(kind: type[Transport], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (http1, library):
        monkeypatch.setattr(module, "FINISH_S", 60.0)

    async def work() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await request(reader)
            writer.write(OK + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
            await reader.read()

        async with serving(handle) as (host, port):
            async with to(kind, port) as way:
                response = await transport.request(way, "POST", "/x", b"{}")
                assert await response.read() == b"hello"
                response.finish()
            await until("it is closed", lambda: host.ended == 1)

    run(work())


@BOTH
def test_a_reply_that_is_given_up_cuts_its_connection(kind: type[Transport]) -> None:
    async def work() -> None:
        head = OK + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n"

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await request(reader)
            writer.write(head)
            await reader.read()  # until the client is gone

        async with serving(handle) as (host, port), to(kind, port) as way:
            response = await transport.request(way, "POST", "/x", b"{}")
            assert await response.read() == b"hello"
            assert not response.ended
            response.close()
            response.close()
            await until("it is cut", lambda: host.ended == 1)

    run(work())


@BOTH
@pytest.mark.parametrize("phase", ["head", "body", "request"])
def test_cancelling_in_any_phase_cuts_the_connection(kind: type[Transport], phase: str) -> None:
    async def work() -> None:
        reached, cancelled = asyncio.Event(), asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if phase == "request":  # what does not fit into the buffers waits
                reader._transport.pause_reading()  # type: ignore[attr-defined]
                reached.set()
                await cancelled.wait()
                reader._transport.resume_reading()  # type: ignore[attr-defined]
            await request(reader)
            if phase == "head":
                reached.set()
            elif phase == "body":
                writer.write(OK + b"content-length: 5\r\n\r\nhel")
            await reader.read()

        async with serving(handle) as (host, port), to(kind, port) as way:
            begun = reached if phase == "body" else None
            task = asyncio.create_task(ask(way, b"x" * (40 << 20) if phase == "request" else b"{}", begun))
            await reached.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            cancelled.set()
            await until("the connection is cut", lambda: host.ended == 1)

    run(work())


@BOTH
def test_nobody_there(kind: type[Transport]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    async def work() -> None:
        async with to(kind, port) as way:
            with pytest.raises(ConnectFailed):
                await ask(way)

    run(work())


@BOTH
def test_connecting_has_a_limit(kind: type[Transport]) -> None:
    """A listener whose queue is full answers no SYN: the kernel would try for two minutes."""

    async def work() -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
            port = full.getsockname()[1]
            for _ in range(4):
                peer = stack.enter_context(socket.socket())
                peer.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    peer.connect(("127.0.0.1", port))
            async with to(kind, port) as way:
                with pytest.raises(ConnectFailed, match=r"within 0\.3 s"):
                    await transport.request(way, "POST", "/x", b"{}", connect_s=0.3)

    run(work())


@BOTH
def test_a_slow_reader_slows_the_host_down(kind: type[Transport]) -> None:
    async def work() -> None:
        sent = 0

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            await request(reader)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            writer.transport.set_write_buffer_limits(1 << 16)
            writer.write(OK + b"content-length: %d\r\n\r\n" % (64 << 20))
            for _ in range(1024):
                writer.write(b"x" * (64 << 10))
                await writer.drain()
                sent += 64 << 10

        async with serving(handle) as (_, port), to(kind, port) as way:
            response = await transport.request(way, "POST", "/x", b"{}")
            looks: list[int] = []

            def standing_still() -> bool:
                looks.append(sent)
                return len(looks) > 20 and looks[-1] == looks[-20]

            await until("the host is held back", standing_still)
            assert sent < 32 << 20
            size = 0
            while part := await response.read():
                size += len(part)
            response.close()
            assert size == 64 << 20

    run(work())


@BOTH
def test_a_large_request_goes_out_whole_as_the_host_takes_it(kind: type[Transport]) -> None:
    body = bytes(range(256)) * (16 << 12)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.1)
        _, got = await request(reader)
        writer.write(OK + b"content-length: 2\r\n\r\n" + (b"ok" if got == body else b"no"))

    assert alone(kind, handle, body) == (200, b"ok")


@BOTH
def test_a_host_that_refuses_before_it_has_heard_all_is_heard(kind: type[Transport]) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
        await writer.drain()
        await asyncio.sleep(0.5)

    assert alone(kind, handle, b"x" * (32 << 20)) == (413, b"no")


def test_the_url_chooses() -> None:
    plain = Options()
    assert isinstance(transport.to_host("http://h:1", plain), Http1)
    for url, options in (("https://h", plain), ("unix:///run/h.sock", plain), ("http://h:1", Options(proxy="http://p:1"))):
        assert isinstance(transport.to_host(url, options), Library)


def certificate(folder: Path) -> tuple[Path, Path]:
    key, crt = folder / "key.pem", folder / "crt.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=h",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", crt],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, crt


def test_https_with_a_certificate_of_ones_own(tmp_path: Path) -> None:
    key, crt = certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(crt, key)

    async def work() -> None:
        async with serving(answering(OK + b"content-length: 5\r\n\r\nhello"), ssl=context) as (_, port):
            for options, trusted in ((Options(tls=transport.tls(str(crt), None, None)), True), (Options(), False)):
                way = transport.to_host(f"https://127.0.0.1:{port}", options)
                if trusted:
                    assert await ask(way) == (200, b"hello")
                else:
                    with pytest.raises(ConnectFailed):
                        await ask(way)
                await way.aclose()

    run(work())


@pytest.mark.parametrize("shown", [True, False], ids=["shown", "not shown"])
def test_a_host_that_wants_a_certificate_gets_ours(tmp_path: Path, shown: bool) -> None:
    key, crt = certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(crt, key)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(crt)

    async def work() -> None:
        async with serving(answering(OK + b"content-length: 5\r\n\r\nhello"), ssl=context) as (_, port):
            ours = (str(crt), str(key)) if shown else (None, None)
            way = transport.to_host(f"https://127.0.0.1:{port}", Options(tls=transport.tls(str(crt), *ours)))
            if shown:
                assert await ask(way) == (200, b"hello")
            else:  # TLS 1.3 tells only after the request was sent
                with pytest.raises((ConnectFailed, ConnectionLost)):
                    await ask(way)
            await way.aclose()

    run(work())


def test_certificates_that_are_none_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("hello")
    for files in ((str(nonsense), None, None), (str(tmp_path / "absent"), None, None), (None, str(nonsense), str(nonsense))):
        with pytest.raises(OSError):
            transport.tls(*files)


def test_a_unix_socket_and_a_proxy(tmp_path: Path) -> None:
    async def work() -> None:
        host = Host(answering(OK + b"content-length: 5\r\n\r\nhello"))
        server = await asyncio.start_unix_server(host, tmp_path / "h.sock")
        way = transport.to_host(f"unix://{tmp_path}/h.sock", Options())
        assert await ask(way) == (200, b"hello")
        await way.aclose()
        server.close()
        await host.end()
        asked: list[bytes] = []

        async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked.append((await request(reader))[0])
            writer.write(OK + b"content-length: 5\r\n\r\nhello")

        async with serving(proxy) as (_, port):
            way = transport.to_host("http://192.0.2.1:30000", Options(proxy=f"http://127.0.0.1:{port}"))
            assert await ask(way) == (200, b"hello")
            await way.aclose()
        assert asked[0].startswith(b"POST http://192.0.2.1:30000/x HTTP/1.1\r\n")

    run(work())
