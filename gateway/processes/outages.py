"""Hosts that go down and come back, said once for all workers, with the cause and the consequence."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from gateway.serving.hostview import HostView

log = logging.getLogger("penstock.hosts")

# Workers report once a second: at the second look everybody has said what became of the streams that a host has left.
LOOK_S = 1.0
# What has left a host so long before it was seen to be down has left it for the same reason.
BEFORE_S = 5.0
# States in which a host takes requests, and those that are an outage.
WELL = frozenset(["ok", "full"])
OUT = frozenset(["down", "ejected", "not ready"])
# An outage only of a host that was well: of one that begins it is how it begins.
LOADING = "not ready"

Place = tuple[str, str]


class _Outage(NamedTuple):
    """`since`: when it was first seen. `before`: the host while it was well. `said`: whether it is in the log."""

    since: float
    before: HostView
    said: bool = False


class Outages:
    """Looks at how hosts stand; `hosts` gives them as all workers together know them."""

    def __init__(self, hosts: Callable[[], Sequence[HostView]]) -> None:
        self._hosts = hosts
        # How each host was lately when it was well, and when that was.
        self._well: dict[Place, list[tuple[float, HostView]]] = {}
        self._out: dict[Place, _Outage] = {}

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look(self._hosts(), time.monotonic())

    def look(self, hosts: Sequence[HostView], now: float) -> None:
        """How they stand at that time (monotonic seconds); says what has changed."""
        for host in hosts:
            place = host.backend, host.id
            if host.state in WELL:
                outage = self._out.pop(place, None)
                if outage is not None and outage.said:
                    passed_s, well = now - outage.since, _left(host, hosts, "take requests")
                    log.info("host %s is back after %.0f s; %s", host.id, passed_s, well, extra=_about(host, ""))
                if outage is not None:
                    self._well.pop(place, None)
                lately = self._well.setdefault(place, [])
                lately.append((now, host))
                while len(lately) > 1 and lately[1][0] <= now - BEFORE_S:
                    del lately[0]
            elif host.state in OUT and (place in self._well or host.state != LOADING):
                before = self._well[place][0][1] if place in self._well else msgspec.structs.replace(host, moved=0, broke=0)
                outage = self._out.setdefault(place, _Outage(now, before))
                if not outage.said and now > outage.since:
                    self._out[place] = outage._replace(said=True)
                    cause, what = host.why.partition(";")[0].rstrip(".") or host.state, _consequence(outage.before, host, hosts)
                    log.warning("host %s is %s: %s; %s", host.id, host.state, cause, what, extra=_about(host, cause))
        present = {(host.backend, host.id) for host in hosts}
        for gone in {*self._well, *self._out} - present:
            self._well.pop(gone, None)
            self._out.pop(gone, None)


def _consequence(before: HostView, host: HostView, hosts: Sequence[HostView]) -> str:
    """What became of its streams (a worker that ended meanwhile has taken its counts with it), and who is left."""
    moved, broke = max(0, host.moved - before.moved), max(0, host.broke - before.broke)
    ended = f", {broke} ended" if broke else ""
    return f"{moved} {'stream' if moved == 1 else 'streams'} moved{ended}, {_left(host, hosts)}"


def _left(host: HostView, hosts: Sequence[HostView], what: str = "left") -> str:
    same = [other for other in hosts if other.backend == host.backend]
    return f"{sum(other.state in WELL for other in same)} of {len(same)} hosts {what}"


def _about(host: HostView, cause: str) -> dict[str, dict[str, str]]:
    return {"fields": {"host": host.id, "backend": host.backend, **({"cause": cause} if cause else {})}}
