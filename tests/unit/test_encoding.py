"""Compressed bodies: every coding, streams of several, pieces of any size; and what is cut, wrong, foreign or a bomb."""

from __future__ import annotations

import asyncio
import gzip
import random
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import brotli
import pytest
from backports import zstd

from gateway.errors import BodyTooLarge, InvalidRequest, LimitReached, UnsupportedEncoding
from gateway.wire import body, encoding
from gateway.wire.memory import BodyMemory
from gateway.wire.structure import PIECE_BYTES

NUMBERS = random.Random(1)
TEXT = b'{"model":"m","messages":[' + b",".join(b'{"role":"user","content":"%d"}' % NUMBERS.randrange(10**9) for _ in range(20_000)) + b"]}"


def bare(content: bytes) -> bytes:
    made = zlib.compressobj(wbits=-15)
    return made.compress(content) + made.flush()


SKIPPED = b"\x50\x2a\x4d\x18\1\0\0\0x"  # a frame that means nothing
FORMS: dict[str, tuple[bytes, Callable[[bytes], bytes]]] = {
    "gzip": (b"gzip", gzip.compress),
    "x-gzip, in capitals": (b" X-GZIP ", gzip.compress),
    "gzip of several members": (b"gzip", lambda content: b"".join(gzip.compress(part) for part in (content[:9], b"", content[9:]))),
    "deflate": (b"deflate", zlib.compress),
    "deflate without a head": (b"deflate", bare),
    "zstd": (b"zstd", zstd.compress),
    "zstd of several frames": (b"zstd", lambda content: zstd.compress(content[:9]) + SKIPPED + zstd.compress(content[9:])),
    "br": (b"br", lambda content: brotli.compress(content, quality=4)),
    "identity": (b"identity", bytes),
    "none": (b"", bytes),
}  # fmt: skip
COMPRESSED = ["gzip", "deflate", "zstd", "br"]


def read(name: bytes, content: bytes, size: int = PIECE_BYTES, limit_bytes: int = 32 << 20, **more: Any) -> bytes:
    parts = [content[at : at + size] for at in range(0, len(content), size)] or [b""]

    async def receive() -> dict[str, Any]:
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    return asyncio.run(body.read(receive, limit_bytes, 60, None, encoding=name, **more))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 7, 1000, 1 << 30])
def test_a_compressed_body_is_read_as_what_it_means(form: str, size: int) -> None:
    name, made = FORMS[form]
    content = TEXT[:4000] if size == 1 else TEXT
    assert read(name, made(content), size) == content


@pytest.mark.parametrize("name", [b"compress", b"gzip, br", b"gzip,gzip", b"zstd;q=1", b"\xff", b"*"])
def test_another_encoding_is_refused_with_those_that_are_accepted(name: bytes) -> None:
    with pytest.raises(UnsupportedEncoding) as refused:
        read(name, TEXT)
    assert refused.value.status == 415
    assert (b"accept-encoding", b"gzip, deflate, zstd, br") in refused.value.headers


@pytest.mark.parametrize("form", COMPRESSED)
def test_what_is_cut_or_wrong_or_goes_on_is_refused_in_words(form: str) -> None:
    name, made = FORMS[form]
    whole = made(TEXT)
    for broken in (whole[:-1], whole[: len(whole) // 2], whole + b"x" * 20, b"\0" + whole, b"no such thing", b"\xff" * 99):
        for size in (1000, 1 << 30):
            with pytest.raises(InvalidRequest, match=f"not valid {form}: ") as refused:
                read(name, broken, size)
            assert (refused.value.status, refused.value.code) == (400, "invalid_content_encoding")


@pytest.mark.parametrize("form", COMPRESSED)
def test_a_bomb_is_refused_before_it_takes_memory(form: str) -> None:
    name, made = FORMS[form]
    bomb = made(b"a" * (40 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match=f"more than {encoding.MAX_RATIO} times its size"):
            read(name, bomb)
        assert tracemalloc.get_traced_memory()[1] < encoding.MAX_RATIO * len(bomb) + (8 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("form", COMPRESSED)
def test_the_limit_counts_what_a_body_means(form: str) -> None:
    name, made = FORMS[form]
    assert read(name, made(TEXT), limit_bytes=len(TEXT)) == TEXT
    with pytest.raises(BodyTooLarge):
        read(name, made(TEXT), limit_bytes=len(TEXT) - 1)


def test_memory_counts_what_a_body_means() -> None:
    memory = BodyMemory(len(TEXT))
    with memory.lease("key") as lease, pytest.raises(LimitReached):
        read(b"gzip", gzip.compress(TEXT), lease=lease)
    assert memory.total == 0


def test_a_window_beyond_what_http_allows_is_refused() -> None:
    made = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    with pytest.raises(InvalidRequest, match="too much memory"):
        read(b"zstd", made.compress(TEXT) + made.flush())


def test_what_a_compressed_body_holds_is_bounded_as_any() -> None:
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        read(b"gzip", gzip.compress(b'{"x":' + NUMBERS.randbytes(300_000).hex().encode().replace(b"a", b"[")))
