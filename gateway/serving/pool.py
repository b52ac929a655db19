"""One backend at work: which of its targets is next (decided in `balance`), who waits for a place, and how each of them is."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple, TypeVar

from gateway.config import Admission, Retry
from gateway.errors import MAX_MESSAGE, GatewayError, Unavailable
from gateway.masking import without_secrets
from gateway.plugin import ABILITIES, Backend, Target, Verdict
from gateway.serving.balance.affinity import UNBOUND, Affinity
from gateway.serving.balance.breaker import State
from gateway.serving.balance.hosts import Host, Hosts, NoHost, Standing
from gateway.serving.balance.policies import Policy, TwoChoices
from gateway.serving.balance.queue import DEADLINE, DISPLACED, FULL, Queue, Ticket
from gateway.serving.balance.retries import Budget
from gateway.serving.balance.settings import Health
from gateway.serving.hostview import HostView
from gateway.supervision import Failed, once, uncounted

log = logging.getLogger("penstock.pool")

# The backend's snapshot may be so old when a target is picked.
REFRESH_S = 0.1
# A probe that generates costs a token and, on a hung engine, a long wait: one target is asked at most so often.
VERIFY_INTERVAL_S = 15.0
# One that was called and found nothing for it stands in line again after so long.
AGAIN_S = 0.05
# Makes the ticket of a request that has to wait, now (monotonic seconds) and for at most so many seconds.
Waiting = Callable[[float, float], Ticket]
ALL_DRAINED = "All hosts are drained by the operator."
# Of so many hosts a request's record says how they stood.
_SHOWN = 8


class Pair(NamedTuple):
    """Two hosts that answer a call together."""

    prefill: Host
    decode: Host


Place = TypeVar("Place", Host, Pair)


class Pool:
    """A backend, the states of its targets, and the queue before them."""

    def __init__(
        self,
        name: str,
        backend: Backend,
        health: Health,
        admission: Admission,
        retry: Retry,
        divided: int = 1,
        failed: Failed = uncounted,
    ) -> None:
        self.name = name
        self.backend = backend
        self.endpoints = backend.endpoints()
        self._health = health
        # Those that answer, and where these only decode, those that prefill for them.
        self.hosts = Hosts(health, random.Random(), divided)  # noqa: S311 - a balance is no secret
        self.prefills = Hosts(health, random.Random(), divided)  # noqa: S311
        # Whether what generates takes two hosts.
        self.paired = False
        self._decoding = TwoChoices(random.Random())  # noqa: S311
        self.budget = Budget(retry.budget_share, retry.reserve_tokens)
        self.queue = Queue(admission.max_queue, admission.floor)
        self._called: dict[Ticket, asyncio.Future[None]] = {}
        self._refreshed_at = float("-inf")
        self._verifying: set[asyncio.Task[None]] = set()
        self._failed = failed

    def refresh(self, now: float | None = None) -> None:
        """Take the backend's snapshot of its targets."""
        self._refreshed_at = time.monotonic() if now is None else now
        targets = self.backend.targets()
        for target in targets:
            if target.role == "prefill":
                self.paired = True
                break
        if self.paired:
            self.prefills.update([target for target in targets if target.role == "prefill"], self._refreshed_at)
            targets = [target for target in targets if target.role != "prefill"]
        self.hosts.update(targets, self._refreshed_at)

    def _among(self, host: Host) -> Hosts:
        return self.prefills if host.target.role == "prefill" else self.hosts

    def everyone(self) -> Iterable[Host]:
        """All hosts, whatever their role."""
        return chain(self.hosts, self.prefills) if self.paired else self.hosts

    def drain(self, drained: frozenset[str]) -> None:
        """These targets get no new requests; those they have go on."""
        self.hosts.drained = self.prefills.drained = drained
        self.refresh()
        self._call_all()

    def choose(self, policy: Policy, bound: Affinity, tried: Collection[str]) -> Host | NoHost:
        """The next host, or why there is none."""
        now = time.monotonic()
        if now - self._refreshed_at > REFRESH_S:
            self.refresh(now)
        return self.hosts.choose(policy, bound, tried, now)

    async def host(self, policy: Policy, bound: Affinity, tried: Collection[str], waiting: Waiting, wait_s: float) -> Host | NoHost:
        """A host to send to, begun; waits for one while all are full, and for that `waiting` makes its ticket. Raises Unavailable when the
        wait is hopeless or over."""
        found: Host | NoHost = NoHost.FULL
        if not self.queue.waiting:  # nobody is overtaken
            found = self.choose(policy, bound, tried)
        if found is NoHost.FULL:
            found = await self._wait(lambda: self.choose(policy, bound, tried), waiting(time.monotonic(), wait_s))
        if isinstance(found, Host):
            self.hosts.begin(found, time.monotonic())
        return found

    def choose_pair(self, policy: Policy, bound: Affinity, tried: Collection[str]) -> Pair | NoHost:
        """The next pair, or why there is none. Prefixes are cached where they were prefilled, so there the model's policy picks; it
        is decoded by whoever has least to do."""
        decode = self.choose(self._decoding, UNBOUND, tried)
        if not isinstance(decode, Host):
            return decode
        prefill = self.prefills.choose(policy, bound, tried, time.monotonic())
        return Pair(prefill, decode) if isinstance(prefill, Host) else prefill

    def has_another(self, tried: Collection[str], generates: bool) -> bool:
        """Whether somebody who was not tried is well and free, and nobody waits for a place."""
        if self.queue.waiting or not self.hosts.has_another(tried):
            return False
        return not self.paired or not generates or self.prefills.has_another(tried)

    def doubt(self, doubted: Mapping[str, str], eject: bool) -> None:
        """What is wrong with targets' answers, the worst first; with `eject` these get nothing while others can."""
        for hosts in (self.hosts, self.prefills):
            hosts.doubt(doubted, eject, time.monotonic())
        self._call_all()

    async def pair(self, policy: Policy, bound: Affinity, tried: Collection[str], waiting: Waiting, wait_s: float) -> Pair | NoHost:
        """The same as `host`, of two that answer together."""
        found: Pair | NoHost = NoHost.FULL
        if not self.queue.waiting:
            found = self.choose_pair(policy, bound, tried)
        if found is NoHost.FULL:
            found = await self._wait(lambda: self.choose_pair(policy, bound, tried), waiting(time.monotonic(), wait_s))
        if isinstance(found, Pair):
            now = time.monotonic()
            self.prefills.begin(found.prefill, now)
            self.hosts.begin(found.decode, now)
        return found

    async def _wait(self, choose: Callable[[], Place | NoHost], ticket: Ticket) -> Place | NoHost:
        again = False
        while True:
            if not self.queue.enter(ticket, time.monotonic(), again):
                raise self._no_place(ticket, True)
            while self.queue.displaced:
                self._wake(self.queue.displaced.pop())
            future = self._called[ticket] = asyncio.get_running_loop().create_future()
            self._call_all()
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + max(0.0, ticket.deadline - time.monotonic())):
                    await future
            except TimeoutError:
                ticket.shed = ticket.shed or ticket.late
                raise self._no_place(ticket) from None
            except asyncio.CancelledError:
                if ticket.called:  # the place it was called to is another's now
                    asyncio.get_running_loop().call_soon(self._call_all)
                raise
            finally:
                self.queue.leave(ticket)
                self._called.pop(ticket, None)
            if ticket.shed:
                raise self._no_place(ticket)
            found = choose()
            if found is not NoHost.FULL:
                return found
            if time.monotonic() >= ticket.deadline:
                ticket.shed = ticket.late
                raise self._no_place(ticket)
            # Somebody else may be able to use the place that it was called to: one that has not tried that host. It stands back for a
            # moment, or it would be called at once again, and nobody else would ever run.
            self._call_all()
            await asyncio.sleep(AGAIN_S)
            again = True

    def _wake(self, ticket: Ticket) -> None:
        future = self._called.get(ticket)
        if future is not None and not future.done():
            future.set_result(None)

    def _no_place(self, ticket: Ticket, hopeless: bool = False) -> GatewayError:
        """What a client is told, and an operator after it. `hopeless`: it was not let into the queue."""
        waited_s, limit_s = time.monotonic() - ticket.since, ticket.deadline - ticket.since
        if ticket.shed == FULL:
            message = "Every engine is full, and so is the queue."
        elif ticket.shed == DISPLACED:
            message = (
                f"Every engine was full for {waited_s:.1f} s, and so is the queue: its place is another's, who has fewer requests in it."
            )
        elif ticket.shed == DEADLINE:
            asked = f"its client waits {ticket.patience_s:g} s ({ticket.named_by})"
            ahead_s = self.queue.wait_s(ticket)
            message = (
                f"Every engine is full: a place is about {ahead_s:.1f} s away, and {asked}."
                if hopeless
                else f"Every engine was full for {waited_s:.1f} s, and {asked}."
            )
        else:
            message = (
                f"Every engine is full: a place is about {self.queue.wait_s(ticket):.1f} s away, and {limit_s:g} s is the longest wait."
                if hopeless
                else f"Every engine was full for {limit_s:g} s."
            )
        return Unavailable(message, code="engine_overloaded", retry_after_s=self.queue.retry_after_s(ticket))

    def _call_all(self) -> None:
        """Call as many of the waiting as there are free places."""
        if not self.queue.waiting:
            return
        free = self._free()
        while free > 0 and (ticket := self.queue.call()) is not None:
            free -= 1
            self._wake(ticket)

    def _free(self) -> int:
        """Free places, less those that somebody was called to and has not taken yet."""
        places = self._places(self.hosts)
        if self.paired:
            places = min(places, self._places(self.prefills))
        return places - sum(ticket.called for ticket in self._called)

    def _places(self, hosts: Hosts) -> int:
        places, shunned, now = 0, 0, time.monotonic()
        for host in hosts:
            if not (host.target.ready and host.up) or host.drained:
                continue
            state, free = host.breaker.look(now), 0
            if state is State.CLOSED:
                free = self.queue.waiting if host.capacity is None else max(0, host.limit - host.in_flight)
            elif state is State.PROBATION and host.in_flight == 0:
                free = 1  # which is how it proves itself
            if host.shunned:
                shunned += free
            else:
                places += free
        return places or shunned

    def considered(self) -> list[Standing]:
        """How every host stands; of very many only the first."""
        found: list[Standing] = []
        for host in self.everyone() if self.paired else self.hosts:
            found.append(host.standing())
            if len(found) == _SHOWN:
                break
        return found

    def end(self, host: Host, verdict: Verdict | None, nobody: str = "") -> None:
        """A request there is over; see `Hosts.end`."""
        now = time.monotonic()
        self._among(host).end(host, verdict, now, nobody)
        if self.queue.waiting or host.capacity is not None:
            self.queue.freed(now)
            self._call_all()

    def waiting_for(self) -> Target | None:
        """The target that will be ready first, when none is; where an operator has drained all of them, one that says so."""
        self.refresh()
        hosts = list(self.hosts if not self.paired or not _any_up(self.hosts) else self.prefills)
        if hosts and all(host.drained for host in hosts):
            role = f" {hosts[0].target.role}" if self.paired else ""
            return Target("", ready=False, reason=ALL_DRAINED.replace(" hosts", f"{role} hosts"))
        return min((host.target for host in hosts if not host.drained), key=lambda target: target.retry_after_s, default=None)

    def available(self) -> bool:
        """Whether any target would take a request now, or in a while: full is not down."""
        self.refresh()
        return _any_up(self.hosts) and (not self.paired or _any_up(self.prefills))

    def least(self) -> tuple[int | None, dict[str, bool]]:
        """Context length and abilities that every target has, of those that have told."""
        self.refresh()
        targets = [host.target for host in self.everyone()]
        lengths = [target.context_length for target in targets if target.context_length is not None]
        told = [target.abilities for target in targets if target.abilities]
        known = [name for name in ABILITIES if any(name in abilities for abilities in told)]
        return min(lengths, default=None), {name: all(abilities.get(name, False) for abilities in told) for name in known}

    def view(self) -> Sequence[HostView]:
        """Every host, for people."""
        now = time.monotonic()
        self.refresh(now)
        rows = []
        for host in self.everyone():
            state, why = self.hosts.state(host, now)
            target = host.target
            rows.append(
                HostView(
                    target.id,
                    self.name,
                    target.weight,
                    target.priority,
                    state,
                    why or host.doubt,
                    host.in_flight,
                    host.capacity,
                    target.stats,
                    target.details,
                    host.moved,
                    host.broke,
                    target.role,
                    host.doubt,
                )
            )
        return rows

    async def probe_forever(self) -> None:
        """Ask every ready target once an interval, and whoever looks wedged for a proof. What comes of it is said in the log by the parent,
        once for all workers."""
        while True:
            self.refresh()
            asked = [host for host in self.everyone() if host.target.ready]
            before = [host.in_flight for host in asked]
            answers = await asyncio.gather(*(self.backend.probe(host.target.id) for host in asked), return_exceptions=True)
            now = time.monotonic()
            for host, answer in zip(asked, answers, strict=True):
                why = repr(answer) if isinstance(answer, BaseException) else answer if isinstance(answer, str) else ""
                # It may quote a library that quotes a URL.
                self._among(host).probed(host, answer is True, now, without_secrets(why[:MAX_MESSAGE]))
            self.refresh(now)
            for host, ours in zip(asked, before, strict=True):
                self._among(host).told(host, max(ours, host.in_flight))
            for host in (*self.hosts.wedged(now), *self.prefills.wedged(now)):
                self._suspect(host, now)
            self._call_all()
            await asyncio.sleep(self._health.probe_s)

    def _suspect(self, host: Host, now: float) -> None:
        if now - host.verified_at < VERIFY_INTERVAL_S:
            return
        host.verified_at = now
        task = once("proof of a host", self._verify(host), self._failed)
        self._verifying.add(task)
        task.add_done_callback(self._verifying.discard)

    async def _verify(self, host: Host) -> None:
        name = host.target.id
        log.info("host %s streams nothing while others do; asking it for a token", name, extra={"fields": {"host": name}})
        why = ""
        try:
            well = await self.backend.verify(name)
        except Exception as error:
            well, why = False, f" ({without_secrets(repr(error)[:MAX_MESSAGE])})"
        if not well:
            self._among(host).eject(host, f"wedged: it accepts requests and generates nothing{why}", time.monotonic())

    async def aclose(self) -> None:
        """Stop asking, and close the backend."""
        for task in self._verifying:
            task.cancel()
        await asyncio.gather(*self._verifying, return_exceptions=True)
        await self.backend.aclose()


def _any_up(hosts: Hosts) -> bool:
    return any(host.target.ready and host.up and not host.drained for host in hosts)
