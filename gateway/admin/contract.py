"""What the admin API asks of the process that serves it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from gateway.access.callers import Known
from gateway.access.ledger import Rows
from gateway.admin.handler import StoredKeys
from gateway.config import Settings
from gateway.serving.hostview import HostView
from gateway.telemetry.listing import Row, Sought
from gateway.telemetry.metrics import Exemplars, Snapshot


class WorkerView(msgspec.Struct, frozen=True):
    """One worker, as `/admin/workers` shows it."""

    pid: int
    generation: int
    state: str
    up_s: float
    open: int
    oldest_s: float
    resident_bytes: int
    waiting: str


class Reloaded(msgspec.Struct, frozen=True):
    """What became of a reload: the generation that serves now, and what was wrong with the new configuration."""

    ok: bool
    generation: int
    problem: str = ""


# States of a host, from the best to the gravest.
GRAVITY = ("ok", "full", "probation", "draining", "drained", "ejected", "down", "not ready")


class Operated(Protocol):
    """What the admin API shows and changes."""

    @property
    def settings(self) -> Settings:
        """Those in force."""

    def made_key_hash(self) -> str | None:
        """Of the admin key that was made because none is configured; None where it could not be."""

    async def look(self) -> tuple[Sequence[WorkerView], Snapshot]:
        """Every worker now, and everybody's counts together."""

    def exemplars(self) -> Exemplars:
        """Traces as examples of what was counted, as of the last look."""

    async def hosts(self) -> Sequence[HostView]:
        """Every host, how it is and why."""

    async def drain(self, target: str, drained: bool) -> bool:
        """Give a host no new requests, or give it some again; False where there is no such host."""

    def effective(self) -> list[dict[str, Any]]:
        """Every effective value with its origin, secrets masked."""

    def judged(self) -> dict[str, Any]:
        """What the sentinel has found: rules, hosts, alerts, examples."""

    async def find(self, name: str) -> dict[str, Any] | None:
        """What became of the request of this id; None where it is not known, or not any more."""

    async def requests(self, sought: Sought) -> list[Row]:
        """Those that are sought, of every worker, and of the whole deployment where they share a store."""

    def stored_keys(self) -> StoredKeys | None:
        """The keys that were made while gateways run; None without Redis."""

    async def callers(self) -> Known:
        """Who has called, and when last. Raises StoreFailed."""

    async def usage(self, first: str, last: str) -> Rows:
        """The ledger of these days, both included."""

    async def reload(self, why: str) -> Reloaded:
        """Read the configuration again and roll the workers; a bad one changes nothing."""
