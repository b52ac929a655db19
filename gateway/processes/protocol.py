"""What parent and workers say to each other over their socket pair: one JSON object a line. Its end means the other is dead."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import msgspec

from gateway.access.callers import Calls
from gateway.access.keys import KeyList
from gateway.plugin import ServiceState
from gateway.sentinel.sample import Sample
from gateway.serving.hostview import HostView
from gateway.telemetry.listing import Row, Sought
from gateway.telemetry.metrics import Exemplars, Snapshot

# A line is settings, states or counts: kilobytes. The bound keeps a confused peer from filling memory.
MAX_LINE = 8 << 20


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """Parent to worker, first: the effective settings as plain values, the home folder, what was used this month (without Redis), the
    stored keys as they are known (with it), and the teams of those who come with tokens."""

    settings: dict[str, Any]
    home: str
    usage: dict[str, dict[str, int]] = {}
    stored_keys: KeyList = KeyList()
    teams: dict[str, str] = {}


class Services(msgspec.Struct, tag="services", frozen=True):
    """Parent to worker, at every change: the state of every service by name."""

    states: dict[str, ServiceState]


class Ask(msgspec.Struct, tag="ask", frozen=True):
    """Parent to worker: report now, under this number."""

    number: int


class Find(msgspec.Struct, tag="find", frozen=True):
    """Parent to worker: what do you know of the request of this id?"""

    number: int
    name: str


class Found(msgspec.Struct, tag="found", frozen=True):
    """Worker to parent: this."""

    number: int
    record: dict[str, Any] | None


class List(msgspec.Struct, tag="list", frozen=True):
    """Parent to worker: which of your requests are such?"""

    number: int
    sought: Sought


class Listed(msgspec.Struct, tag="listed", frozen=True):
    """Worker to parent: these."""

    number: int
    rows: list[Row]


class Spent(msgspec.Struct, tag="spent", frozen=True):
    """Worker to parent: what is in the ledger of this key from one day to another, both included?"""

    number: int
    key: str
    first: str
    last: str


class Ledger(msgspec.Struct, tag="ledger", frozen=True):
    """Parent to worker: this; None where the store that keeps it does not answer."""

    number: int
    rows: dict[str, dict[str, int]] | None


class Retire(msgspec.Struct, tag="retire", frozen=True):
    """Parent to worker: end. Times in seconds, one after the other.

    `ready`: what `/readyz` still says (a worker that others replace is no sign of an end). For `grace_s` connections are still accepted,
    but none is kept after its next answer; then open answers have `limit_s` to finish, and connections are closed once they were idle for
    `linger_s`; what is left gets an error event.
    """

    ready: bool
    grace_s: float
    linger_s: float
    limit_s: float


class Drain(msgspec.Struct, tag="drain", frozen=True):
    """Parent to worker: these targets get no new requests, and no others."""

    targets: list[str]


class Doubt(msgspec.Struct, tag="doubt", frozen=True):
    """Parent to worker: the answers of these targets are under alert, and of no others; by backend, the worst first, and why."""

    doubted: dict[str, dict[str, str]]


class Serving(msgspec.Struct, tag="serving", frozen=True):
    """Worker to parent: it accepts connections now, or not any more."""

    accepting: bool


class Report(msgspec.Struct, tag="report", frozen=True):
    """Worker to parent, when asked, once a second, and before it ends: what it has counted and is doing.

    `waiting`: why it cannot serve, or "". `usage`: what was added to the ledger since the last report (without Redis).
    """

    number: int
    open: int
    oldest_s: float
    resident_bytes: int
    waiting: str
    counts: Snapshot
    hosts: list[HostView]
    usage: dict[str, dict[str, int]] = {}
    exemplars: Exemplars = {}
    calls: Calls = Calls()


ToWorker = Hello | Services | Ask | Find | List | Ledger | Retire | Drain | Doubt
ToParent = Serving | Report | Found | Listed | Spent | Sample
# What a worker is asked, and what it answers.
Question = Ask | Find | List
Answer = Report | Found | Listed
_to_worker = msgspec.json.Decoder(Hello | Services | Ask | Find | List | Ledger | Retire | Drain | Doubt)
_to_parent = msgspec.json.Decoder(Serving | Report | Found | Listed | Spent | Sample)
_encoder = msgspec.json.Encoder()


def line(message: ToWorker | ToParent) -> bytes:
    """A message as it goes over the wire."""
    return _encoder.encode(message) + b"\n"


def to_worker(data: bytes) -> ToWorker:
    """A line from the parent."""
    message: ToWorker = _to_worker.decode(data)
    return message


def to_parent(data: bytes) -> ToParent:
    """A line from a worker."""
    message: ToParent = _to_parent.decode(data)
    return message


async def streams(end: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Reader and writer on one end of the pair."""
    return await asyncio.open_connection(sock=end, limit=MAX_LINE)
