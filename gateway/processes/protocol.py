"""What parent and workers say to each other over their socket pair: one JSON object a line. Its end means the other is dead."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import msgspec

from gateway.plugin import ServiceState

# A line is settings or states: kilobytes. The bound keeps a confused peer from filling memory.
_MAX_LINE = 1 << 20


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """Parent to worker, first: the effective settings as plain values, and the home folder."""

    settings: dict[str, Any]
    home: str


class Services(msgspec.Struct, tag="services", frozen=True):
    """Parent to worker, at every change: the state of every service by name."""

    states: dict[str, ServiceState]


class Serving(msgspec.Struct, tag="serving", frozen=True):
    """Worker to parent: it accepts connections now."""


ToWorker = Hello | Services
_to_worker = msgspec.json.Decoder(Hello | Services)
_to_parent = msgspec.json.Decoder(Serving)
_encoder = msgspec.json.Encoder()


def line(message: ToWorker | Serving) -> bytes:
    """A message as it goes over the wire."""
    return _encoder.encode(message) + b"\n"


def to_worker(data: bytes) -> ToWorker:
    """A line from the parent."""
    message: ToWorker = _to_worker.decode(data)
    return message


def to_parent(data: bytes) -> Serving:
    """A line from a worker."""
    return _to_parent.decode(data)


async def streams(end: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Reader and writer on one end of the pair."""
    return await asyncio.open_connection(sock=end, limit=_MAX_LINE)
