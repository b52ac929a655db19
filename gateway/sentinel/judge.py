"""The process that judges answers: `python -m gateway.sentinel.judge`, samples on standard input, what was found on standard output.

Apart from everybody who serves: what strangers' answers and schemas make of a validator costs nobody else time or memory, and whoever kills
it loses one sample. It gets the next one when it has rested for its share of a core (`processes.sentinel`), and ends with its input.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from typing import IO

import msgspec

from gateway.sentinel.answers import Unreadable
from gateway.sentinel.rules import Found, judge
from gateway.sentinel.sample import Sample

# What it may take of memory, all that it maps included.
MEMORY_BYTES = 2 << 30
# It gives way to whoever serves.
_NICE = 10
_LENGTH_BYTES = 4


class Verdict(msgspec.Struct, frozen=True):
    """What was found; None in place of an answer that cannot be read. `cpu_s`: what it took."""

    found: Found | None
    cpu_s: float
    resident_bytes: int = 0


_encoder = msgspec.msgpack.Encoder()
_samples = msgspec.msgpack.Decoder(Sample)


def framed(message: Sample | Verdict) -> bytes:
    """A message as it goes over a pipe."""
    content = _encoder.encode(message)
    return len(content).to_bytes(_LENGTH_BYTES, "big") + content


def serve(source: IO[bytes], sink: IO[bytes]) -> None:
    """Judge one after the other until the samples end."""
    while len(length := source.read(_LENGTH_BYTES)) == _LENGTH_BYTES:
        content = source.read(int.from_bytes(length, "big"))
        began = time.process_time()
        found: Found | None = None
        with contextlib.suppress(Unreadable, UnicodeError, MemoryError, msgspec.MsgspecError):  # which is said by None
            found = judge(_samples.decode(content))
        took_s = time.process_time() - began
        sink.write(framed(Verdict(found, took_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)))
        sink.flush()


def main() -> None:
    """Entry point of the process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    os.nice(_NICE)
    serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
