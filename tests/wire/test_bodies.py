"""Bodies over real sockets: many large ones at once cannot end a worker, nor keep others out; compressed ones are understood."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import brotli
import psutil
import pytest
from backports import zstd

from gateway.wire.memory import BODY_MEMORY_BYTES
from tests.support import raw
from tests.support.processes import Gateway, Rehearsal, gateway, until

CHAT = "/v1/chat/completions"
LARGE = json.dumps(raw.chat("hi", filling="x" * (31 << 20))).encode()


def send(running: Gateway, content: bytes, key: str, declared: bool = True) -> int:
    """The status of one request; whoever is refused may find the connection closed while it still sends."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}", "connection": "close", "host": "x"}
    headers |= {"content-length": str(len(content))} if declared else {"transfer-encoding": "chunked"}
    head = f"POST {CHAT} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    with raw.connect(running.port) as peer:
        try:
            peer.sendall(head.encode())
            if declared:
                peer.sendall(content)
            else:
                peer.sendall(b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content))
        except (BrokenPipeError, ConnectionResetError):
            pass
        got = raw.rest(peer)
    return int(got[9:12]) if got.startswith(b"HTTP/1.1 ") else 0


@pytest.mark.slow
def test_fifty_large_bodies_at_once_cannot_end_a_worker_and_one_key_leaves_room_for_another(
    folder: Path, scripted_sglang: Rehearsal
) -> None:
    keys = [{"name": name, "hash": f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"} for name in ("greedy", "other")]
    config: dict[str, Any] = {**scripted_sglang.backend(), "keys": keys}
    with gateway(folder, config) as running:
        running.wait_ready()
        [worker] = running.workers()
        assert send(running, LARGE, "other") == 200
        before, peak, done = worker.memory_info().rss, 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.02):
                peak = max(peak, psutil.Process(worker.pid).memory_info().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            with ThreadPoolExecutor(51) as threads:
                greedy = [threads.submit(send, running, LARGE, "greedy", number % 2 == 0) for number in range(50)]
                other = [send(running, json.dumps(raw.chat("hi")).encode(), "other") for _ in range(5)]
                until("a large body of another key passes", lambda: send(running, LARGE, "other") == 200, 60)
                statuses = {future.result() for future in greedy}
        finally:
            done.set()
            watcher.join()
        assert other == [200] * 5
        assert statuses <= {0, 200, 429, 503}
        assert 200 in statuses
        assert [found.pid for found in running.workers()] == [worker.pid]
        assert peak - before <= 3 * BODY_MEMORY_BYTES
        until("everything is given back", lambda: send(running, LARGE, "greedy") == 200, 30)


@pytest.mark.parametrize("name", ["gzip", "deflate", "zstd", "br"])
def test_a_compressed_body_reaches_the_engine_as_what_it_means(wired: Gateway, scripted_sglang: Rehearsal, name: str) -> None:
    asked = raw.chat("hello", x_filling="y" * 5000)
    made = {"gzip": gzip.compress, "deflate": zlib.compress, "zstd": zstd.compress, "br": brotli.compress}[name]
    answer = raw.call(wired.port, "POST", CHAT, made(json.dumps(asked).encode()), {"content-encoding": name})
    assert answer.status == 200
    received = json.loads(scripted_sglang.seen()["last_body"])
    assert {key: received[key] for key in asked} == asked
    assert "content-encoding" not in {header.lower() for header in scripted_sglang.seen()["last_headers"]}


def test_another_encoding_is_a_415_that_names_those_we_take(wired: Gateway) -> None:
    answer = raw.call(wired.port, "POST", CHAT, b"whatever", {"content-encoding": "compress"})
    assert (answer.status, answer.error()["code"]) == (415, "unsupported_content_encoding")
    assert answer.headers["accept-encoding"] == "gzip, deflate, zstd, br"
