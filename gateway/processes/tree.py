"""The process tree: what runs below the parent, under which configuration, and the counts that outlive whoever made them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from gateway.access.keys import KeyList
from gateway.config import Loaded, Settings
from gateway.plugin import Service, ServiceState
from gateway.processes import protocol
from gateway.processes.callers import Callers
from gateway.processes.fleet import Counts, Fleet, Worker
from gateway.processes.services import Observer, Services
from gateway.processes.usage import Usage
from gateway.sentinel.sample import Sample


class Plan(msgspec.Struct, frozen=True):
    """A configuration that can be served: checked, and with what it wants run."""

    loaded: Loaded
    services: Sequence[Service]

    @property
    def settings(self) -> Settings:
        """The settings alone."""
        return self.loaded.settings


class Tree:
    """The fleets (the last one is the newest), the services, and what every fleet is given. `plan`: the one in force."""

    def __init__(self, plan: Plan, home: Path, listener: socket.socket, observe: Observer) -> None:
        self.plan = plan
        self.fleets: list[Fleet] = []
        self.counts = Counts()
        self.usage = Usage(home, plan.settings.limits)
        self.callers = Callers(self.usage)
        self.services = Services(self._service_changed, self.counts.own.failed)
        self._home = home
        self._listener = listener
        self._observe = observe
        self._drained: set[str] = set()
        self._doubted: dict[str, dict[str, str]] = {}
        # Who judges answers.
        self.judge: Callable[[Sample], None] = lambda sample: None
        # The stored keys as they are known here, for workers to come.
        self.stored_keys: Callable[[], KeyList] = KeyList
        # Who answers workers that ask for the ledger.
        self.asked: Callable[[Worker, protocol.Spent], None] = lambda worker, question: None

    @property
    def workers(self) -> list[Worker]:
        """Of every generation."""
        return [worker for fleet in self.fleets for worker in fleet.workers]

    def grow(self, generation: int, settings: Settings) -> Fleet:
        """Start a further fleet with these settings, beside those there are."""
        states, keys, asked = self.services.states, self._known_keys, self._asked
        fleet = Fleet(generation, settings, self._home, self._listener, states, self.counts, self.usage, self.callers, keys, asked)
        fleet.drain(sorted(self._drained))
        fleet.doubt(self._doubted)
        fleet.judge = lambda sample: self.judge(sample)
        self.fleets.append(fleet)
        fleet.start()
        return fleet

    def _asked(self, worker: Worker, question: protocol.Spent) -> None:
        self.asked(worker, question)

    def _known_keys(self) -> KeyList:
        return self.stored_keys()

    def drain(self, target: str, drained: bool) -> None:
        """No new requests for a host, from any worker that is or will be; or some again."""
        (self._drained.add if drained else self._drained.discard)(target)
        for fleet in self.fleets:
            fleet.drain(sorted(self._drained))

    def doubt(self, doubted: dict[str, dict[str, str]]) -> None:
        """Whose answers are under alert, by backend, and why: for every worker that is or will be."""
        self._doubted = doubted
        for fleet in self.fleets:
            fleet.doubt(doubted)

    def _service_changed(self, name: str, state: ServiceState) -> None:
        for fleet in self.fleets:
            fleet.services(self.services.states)
        self._observe(name, state)
