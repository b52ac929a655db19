"""What stands behind every gateway in the bench: an HTTP server that answers at once with the same bytes, or paces a stream.

    python -m bench.upstream PORTS TOKENS GAP_S       serves on so many ports, which it prints in a line

A stream is `BURST` tokens written at once, or, when its prompt begins with "paced", TOKENS of them, one every GAP_S seconds. Nothing of an
engine is in it, so that what is measured is the gateway. `GET /counted` says what it has answered so far: what a load came to is counted
here, at the end that no gateway can embellish.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import Any, cast

import uvloop


def _json(value: Any) -> bytes:
    content = json.dumps(value).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(content) + content


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n" % len(data) + data + b"\r\n"


def _event(choices: list[Any], **more: Any) -> bytes:
    event = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "deepseek-v3", "choices": choices, **more}
    return _chunk(b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n")


ANSWER = _json(
    {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "deepseek-v3",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello " * 40}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 40, "total_tokens": 50},
    }
)  # fmt: skip
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
TOKEN = _event([{"index": 0, "delta": {"content": " hello"}, "finish_reason": None}])
FINISH = _event([{"index": 0, "delta": {}, "finish_reason": "stop"}])
DONE = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
MODELS = _json({"object": "list", "data": [{"id": "deepseek-v3", "object": "model", "created": 1, "owned_by": "sglang"}]})
# What SGLang's routers ask a worker before they use it.
INFO = _json({"model_path": "deepseek-v3", "served_model_name": "deepseek-v3", "architectures": ["DeepseekV3ForCausalLM"], "loads": []})
BURST = 32
_STREAM = re.compile(rb'"stream"\s*:\s*true')
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


def _usage(tokens: int) -> bytes:
    return _event([], usage={"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": 10 + tokens})


def _streams(body: bytes) -> bool:
    # The word is found first, by memchr: a regular expression over a long prompt would cost more than all the rest.
    place = body.find(b'"stream"')
    return place >= 0 and _STREAM.match(body, place) is not None


class Counts:
    """What all connections have answered: chat completions, and events of streams ([DONE] apart)."""

    def __init__(self) -> None:
        self.requests = self.events = 0


class Upstream(asyncio.Protocol):
    """One connection."""

    def __init__(self, counts: Counts, tokens: int, gap_s: float) -> None:
        self._counts, self._tokens, self._gap_s = counts, tokens, gap_s
        self._buffer, self._last = b"", False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end]
            found = _LENGTH.search(head)
            size = int(found[1]) if found else 0
            lower = head.lower()
            if b"chunked" in lower:  # a client that streams its body
                stop = self._buffer.find(b"0\r\n\r\n", end + 4)
                if stop < 0:
                    return
                size = stop + 5 - end - 4
            if len(self._buffer) < end + 4 + size:
                return
            body, self._buffer = self._buffer[end + 4 : end + 4 + size], self._buffer[end + 4 + size :]
            self._last = b"connection: close" in lower
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0]
        if method not in (b"GET", b"POST"):  # a router tries whether HTTP/2 is spoken here
            self._transport.close()
            return
        if method == b"GET":
            if path == b"/counted":
                self._end(_json(vars(self._counts)))
            else:
                self._end(MODELS if b"/models" in path else INFO)
            return
        self._counts.requests += path == b"/v1/chat/completions"
        if not _streams(body):
            self._end(ANSWER)
        elif b'"paced' in body:
            self._task = asyncio.ensure_future(self._pace(body))
        else:
            self._counts.events += BURST + 1
            self._end(HEAD + TOKEN * BURST + self._ending(body, BURST))

    def _end(self, answer: bytes) -> None:
        self._transport.write(answer)
        if self._last:
            self._transport.close()

    @staticmethod
    def _ending(body: bytes, tokens: int) -> bytes:
        return FINISH + (_usage(tokens) if b"include_usage" in body else b"") + DONE

    async def _pace(self, body: bytes) -> None:
        self._transport.write(HEAD)
        for _ in range(self._tokens):
            if self._transport.is_closing():
                return
            self._counts.events += 1
            self._transport.write(TOKEN)
            await asyncio.sleep(self._gap_s)
        self._counts.events += 1
        self._end(self._ending(body, self._tokens))


async def main(ports: int, tokens: int, gap_s: float) -> None:
    """Serve until killed."""
    loop, counts = asyncio.get_running_loop(), Counts()
    servers = [await loop.create_server(lambda: Upstream(counts, tokens, gap_s), "127.0.0.1", 0, backlog=8192) for _ in range(ports)]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
