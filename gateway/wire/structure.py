"""What a large body is made of, found out piece by piece as it arrives, so that nothing it holds can take long or much to decode later.

Small bodies go straight to the decoder, which is quicker than looking. A decoder in C holds the whole event loop, and what it makes of a
body can be thirty times as large: so the number of values, their nesting and the number of parameters are bounded before it is let near.
A piece of 64 kB takes 0.03 ms where it is text and 1.4 ms where it is brackets (2026-11-25, 2 shared cores, AMD EPYC; time.thread_time
around `Structure.feed` over 31 MB of each).
"""

from __future__ import annotations

import codecs
import re
from itertools import accumulate

from gateway.errors import InvalidRequest

# Beyond this a body is looked through before it is decoded. Below, the decoder's own guard against recursion bounds the nesting.
LARGE_BYTES = 256 << 10
# So much is looked at without letting others have their turn.
PIECE_BYTES = 64 << 10
# Parameters of a request; OpenAI's largest endpoint has 37, the engines add some 60.
MAX_PARAMETERS = 1000
# Arrays and objects in one another. Held in one byte each while a piece is looked at.
MAX_NESTING = 250
# Numbers, texts, arrays and objects together: two million token ids are fifteen prompts of 128k.
MAX_VALUES = 2_000_000
# Prompts of one request to complete: OpenAI's own bound on a batch of inputs.
MAX_PROMPTS = 2048

_TOKENS = b"[]{}:"
_ELSE = bytes(byte for byte in range(256) if byte not in _TOKENS)
_STEPS = bytes(1 if byte in b"[{" else 0xFF if byte in b"]}" else 0 for byte in range(256))
_SPACES = b" \t\r\n"
# What an array begins with.
_FIRST = re.compile(rb"\[[ \t\r\n]*(.)", re.DOTALL)


class Outside:
    """What of a JSON text stands outside its strings, piece by piece."""

    __slots__ = ("_escape", "_inside")

    def __init__(self) -> None:
        self._inside = False
        self._escape = b""  # a backslash whose second half has not come yet

    def feed(self, piece: bytes) -> bytes:
        """The part of `piece` that is outside of strings, quotes left out."""
        if self._escape:
            piece, self._escape = self._escape + piece, b""
        if b"\\" in piece:
            if (len(piece) - len(piece.rstrip(b"\\"))) & 1:
                piece, self._escape = piece[:-1], b"\\"
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = piece.split(b'"')
        outside = b"".join(parts[1::2] if self._inside else parts[::2])
        if not len(parts) & 1:
            self._inside = not self._inside
        return outside


class Structure:
    """A body's counts so far: values, nesting, parameters. Memory for one piece, whatever the body."""

    __slots__ = ("_at", "_before", "_outside", "_text", "nesting", "parameters", "values")

    def __init__(self) -> None:
        self._outside = Outside()
        self._text: codecs.IncrementalDecoder | None = None
        self._before = b""  # the last character outside of strings: after a brace or a comma a name follows
        self._at = 0
        self.nesting = self.parameters = self.values = 0

    def feed(self, piece: bytes) -> None:
        """Look at the next piece (PIECE_BYTES at most); raises InvalidRequest for what is beyond a bound, or no UTF-8.

        Whether it is JSON is left to the decoder.
        """
        self._check_text(piece)
        outside = self._outside.feed(piece)
        if self.nesting == 1 and len(piece) == PIECE_BYTES and not outside and self._before in b"{,":
            raise InvalidRequest(f"The name of a parameter is longer than {PIECE_BYTES >> 10} kB.", code="invalid_json")
        self._before = outside.rstrip(_SPACES)[-1:] or self._before
        tokens = outside.translate(None, _ELSE)
        self.values += outside.count(b",") + outside.count(b"[") + outside.count(b"{")
        if self.values > MAX_VALUES:
            raise InvalidRequest(f"The request body holds more than {MAX_VALUES} values.", code="invalid_json")
        if not tokens:
            return
        try:
            # The nesting after each token, and before the first.
            depths = bytes(accumulate(memoryview(tokens.translate(_STEPS)).cast("b"), initial=self.nesting))
        except ValueError:  # below none, or beyond what a byte holds
            if tokens.count(b"[") + tokens.count(b"{") > MAX_NESTING - self.nesting:
                raise too_deep() from None
            raise InvalidRequest("The request body is not valid JSON: it closes more than it has opened.", code="invalid_json") from None
        if max(depths) > MAX_NESTING:
            raise too_deep()
        # Colons of the outermost object: what leaves the nesting at one and does not close anything.
        self.parameters += depths.count(1, 1) - depths.count(b"\x02\x01") - depths.count(b"\x00\x01")
        if self.parameters > MAX_PARAMETERS:
            raise too_many_parameters()
        self.nesting = depths[-1]

    def end(self) -> None:
        """The body has ended; raises InvalidRequest where a character has not."""
        self._check_text(b"", final=True)

    def _check_text(self, piece: bytes, final: bool = False) -> None:
        if self._text is None:
            if piece.isascii():
                self._at += len(piece)
                return
            self._text = codecs.getincrementaldecoder("utf-8")()
        try:
            self._text.decode(piece, final)
        except UnicodeDecodeError as error:
            held = len(error.object) - len(piece)  # of a character that began in the piece before
            raise no_utf8(self._at + error.start - held) from None
        self._at += len(piece)


class Prompts:
    """How many prompts a parameter holds that may be a text, the tokens of one, or an array of either.

    An array of numbers is one prompt. One that mixes texts with anything else is refused: engines do not agree about it.
    """

    __slots__ = ("_at", "_commas", "_opened", "_outside", "_texts", "_value", "count")

    def __init__(self, value: memoryview) -> None:
        self.count = 1
        self._value = value
        self._at = self._commas = self._opened = 0
        self._outside = Outside()
        found = _FIRST.match(value)
        self._texts = found is not None and found[1] == b'"'
        if found is None or found[1] not in (b'"', b"["):
            self._at = len(value)

    def look(self) -> bool:
        """Count in the next piece; False when there is none. Raises InvalidRequest."""
        if self._at >= len(self._value):
            return False
        left = self._outside.feed(bytes(self._value[self._at : self._at + PIECE_BYTES])).translate(None, _SPACES)
        self._at += PIECE_BYTES
        if self._texts and left.strip(b"[]").strip(b","):
            raise InvalidRequest("'prompt' mixes texts with something else.", param="prompt", code="invalid_type")
        self._commas += left.count(b",")
        self._opened += left.count(b"[")
        self.count = self._commas + 1 if self._texts else self._opened - 1
        if self.count > MAX_PROMPTS:
            raise InvalidRequest(f"'prompt' holds more than {MAX_PROMPTS} prompts.", param="prompt", code="invalid_value")
        return True


def no_utf8(at: int) -> InvalidRequest:
    """A body that is no text."""
    return InvalidRequest(f"The request body is not valid UTF-8 (byte {at}).", code="invalid_json")


def too_deep() -> InvalidRequest:
    """A body nested beyond what anybody reads."""
    return InvalidRequest("The request body is nested too deeply.", code="invalid_json")


def too_many_parameters() -> InvalidRequest:
    """A body with more parameters than any endpoint has."""
    return InvalidRequest(f"The request body holds more than {MAX_PARAMETERS} parameters.", code="invalid_json")
