"""Bodies that a client compressed, taken apart piece by piece: never more at once than a piece, whatever it was made of."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, Protocol

from gateway.errors import InvalidRequest, UnsupportedEncoding
from gateway.wire.structure import PIECE_BYTES

ACCEPTED = b"gzip, deflate, zstd, br"
# How many times its size a body may come to, once it comes to more than FREE_BYTES: JSON repeats itself 5 to 50 times, a bomb 1000 times.
MAX_RATIO = 200
FREE_BYTES = 1 << 20
# A decoder of zstd keeps a window of what it has given out: 8 MB, as RFC 9659 says for HTTP, and not the 128 MB that a frame may ask for.
_ZSTD_WINDOW_LOG = 23


class Decoder(Protocol):
    """One body's decoder."""

    def feed(self, data: bytes) -> None:
        """More of what the client sent; only when `take` has given all there was."""

    def take(self) -> bytes:
        """The next piece of what it means, some PIECE_BYTES at most; b"" when more is needed. Raises InvalidRequest."""

    def end(self) -> None:
        """There is no more; raises InvalidRequest where there should be."""


def decoder(encoding: bytes) -> Decoder | None:
    """What undoes a `content-encoding`, None where there is nothing to undo; raises UnsupportedEncoding."""
    name = encoding.strip().lower()
    if name in (b"", b"identity"):
        return None
    make = _DECODERS.get(name)
    if make is None:
        raise UnsupportedEncoding(ACCEPTED)
    return _Bounded(name.decode(), make)


class _Bounded:
    """Bounds what a decoder makes of little, and calls what is wrong by its name."""

    def __init__(self, name: str, make: Callable[[], Decoder]) -> None:
        self._name = name
        self._inner = make()
        self._fed = self._taken = 0

    def feed(self, data: bytes) -> None:
        self._fed += len(data)
        self._inner.feed(data)

    def take(self) -> bytes:
        try:
            piece = self._inner.take()
        except (zlib.error, ValueError) as error:
            raise self._broken(str(error)) from None
        self._taken += len(piece)
        if self._taken > FREE_BYTES and self._taken > MAX_RATIO * self._fed:
            raise InvalidRequest(f"The request body decompresses to more than {MAX_RATIO} times its size.", code="invalid_content_encoding")
        return piece

    def end(self) -> None:
        try:
            if self._fed:
                self._inner.end()
        except ValueError as error:
            raise self._broken(str(error)) from None

    def _broken(self, problem: str) -> InvalidRequest:
        return InvalidRequest(f"The request body is not valid {self._name}: {problem}.", code="invalid_content_encoding")


class _Zlib:
    """gzip of one member or more, and deflate: with zlib's head as RFC 9110 says, or without as many send it."""

    def __init__(self, gzip: bool) -> None:
        self._gzip = gzip
        self._inner: Any = zlib.decompressobj(31) if gzip else None
        self._waiting = b""

    def feed(self, data: bytes) -> None:
        self._waiting += data

    def take(self) -> bytes:
        while self._waiting:
            if self._inner is None:
                if len(self._waiting) < 2:
                    break
                head = self._waiting[0] & 0x0F == 8 and (self._waiting[0] << 8 | self._waiting[1]) % 31 == 0
                self._inner = zlib.decompressobj(15 if head else -15)
            if self._inner.eof:
                if not self._gzip:
                    raise ValueError("something follows its end")
                self._inner = zlib.decompressobj(31)  # another member
            piece: bytes = self._inner.decompress(self._waiting, PIECE_BYTES)
            self._waiting = self._inner.unused_data if self._inner.eof else self._inner.unconsumed_tail
            if piece:
                return piece
        return b""

    def end(self) -> None:
        if self._inner is None or not self._inner.eof:
            raise ValueError("it is cut off")


class _Zstd:
    """One frame or more."""

    def __init__(self) -> None:
        from backports import zstd  # 5 ms that only who needs it has to spend

        self._make: Callable[[], Any] = lambda: zstd.ZstdDecompressor(
            options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG}
        )
        self._error = zstd.ZstdError
        self._inner = self._make()
        self._waiting = b""

    def feed(self, data: bytes) -> None:
        self._waiting += data

    def take(self) -> bytes:
        try:
            while self._waiting or not (self._inner.needs_input or self._inner.eof):
                if self._inner.eof:
                    self._inner = self._make()  # another frame
                data, self._waiting = self._waiting, b""
                piece: bytes = self._inner.decompress(data, PIECE_BYTES)
                if self._inner.eof:
                    self._waiting = self._inner.unused_data
                if piece:
                    return piece
        except self._error as error:
            raise ValueError(str(error)) from None
        return b""

    def end(self) -> None:
        if not self._inner.eof:
            raise ValueError("it is cut off")


class _Brotli:
    """One stream; its decoder gives out blocks of 32 and 64 kB."""

    def __init__(self) -> None:
        import brotli

        self._inner: Any = brotli.Decompressor()
        self._error: type[Exception] = brotli.error
        self._waiting = b""
        self._full = False  # the last piece was one of several

    def feed(self, data: bytes) -> None:
        self._waiting += data

    def take(self) -> bytes:
        try:
            while self._waiting or self._full:
                data = b""
                if self._inner.can_accept_more_data() and not self._full:
                    if self._inner.is_finished():
                        raise ValueError("something follows its end")
                    data, self._waiting = self._waiting, b""
                piece: bytes = self._inner.process(data, output_buffer_limit=PIECE_BYTES // 2)
                self._full = len(piece) > 0  # whether there is more it says only when it is asked
                if piece:
                    return piece
                if not data and not self._inner.can_accept_more_data():
                    raise ValueError("its decoder does not go on")
        except self._error as error:
            raise ValueError(str(error)) from None
        return b""

    def end(self) -> None:
        if not self._inner.is_finished():
            raise ValueError("it is cut off")


_DECODERS: dict[bytes, Callable[[], Decoder]] = {
    b"gzip": lambda: _Zlib(gzip=True),
    b"x-gzip": lambda: _Zlib(gzip=True),
    b"deflate": lambda: _Zlib(gzip=False),
    b"zstd": _Zstd,
    b"br": _Brotli,
}
