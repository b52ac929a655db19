"""What a pool knows of its targets, and who may be asked next: decisions only, with the clock passed in.

A target is *eligible* when it is ready, not drained by the operator, not down by its probe, not ejected by its breaker, and not full. Of
the eligible ones those of the lowest `priority` number are candidates (a lower tier is for when the upper has none), and among these the
policy picks. When there is none the reason decides: somebody is FULL (wait), or all are SICK (`all_sick`), or there is NOBODY.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Collection, Iterator, Mapping, Sequence

from gateway.plugin import Target, Verdict
from gateway.serving.balance.affinity import Affinity
from gateway.serving.balance.breaker import Breaker, Limits, State
from gateway.serving.balance.policies import Policy
from gateway.serving.balance.settings import Health

# A target that said it is busy is left alone for so long, while others can be asked.
BUSY_S = 1.0
# Of its weight, for a target that has just come back.
SLOW_START_SHARE = 0.1

_UNBOUNDED = 1 << 60
# Until when whoever gets nothing for its answers' sake does: nobody can say.
_FOR_NOW = float("inf")

# Target, requests in flight, drained, up, why it is not, its breaker's state and until when, what it takes of ours, until when it is busy,
# since when it is back.
Standing = tuple[Target, int, bool, bool, str, State, float, int | None, float, float]


class NoHost(enum.Enum):
    """Why nobody was picked."""

    FULL = "full"
    SICK = "sick"
    NOBODY = "nobody"


class Host:
    """One target and its state. `share` is its weight as the policy shall see it now."""

    __slots__ = (
        "breaker", "broke", "busy_until", "capacity", "doubt", "drained", "in_flight", "last_event_at", "limit", "moved", "others",
        "recovered_at", "reported", "share", "shunned", "target", "told_at", "up", "verified_at", "why",
    )  # fmt: skip

    def __init__(self, target: Target, breaker: Breaker) -> None:
        self.target = target
        self.breaker = breaker
        self.in_flight = 0
        self.share = target.weight
        self.capacity: int | None = None
        self.limit = _UNBOUNDED
        # Requests that others have there, as the engine's own count tells; what it told last, and when.
        self.others = 0.0
        self.reported = 0.0
        self.told_at = 0.0
        self.up = True
        self.drained = False
        self.busy_until = 0.0
        self.recovered_at = float("-inf")
        self.last_event_at = 0.0
        self.verified_at = float("-inf")
        self.why = ""
        # Of streams that it has left in the middle: how many went on elsewhere, and how many ended.
        self.moved = 0
        self.broke = 0
        # What is wrong with its answers, where it is under alert for that, and whether it gets nothing for it while others can.
        self.doubt = ""
        self.shunned = False

    def standing(self) -> Standing:
        """How it stands, to be put into words when somebody asks: a request's record holds that of every host there was."""
        breaker = self.breaker
        state, until, why = breaker.state, breaker.until, self.why
        if self.shunned and state is State.CLOSED:
            state, until, why = State.OPEN, _FOR_NOW, self.doubt
        return (
            self.target, self.in_flight, self.drained, self.up, why, state, until,
            None if self.capacity is None else self.limit, self.busy_until, self.recovered_at,
        )  # fmt: skip


class Hosts:
    """The targets of one pool. `divided`: among how many workers a target's capacity is shared out."""

    def __init__(self, health: Health, chance: random.Random, divided: int = 1) -> None:
        self._health = health
        self._chance = chance
        self._divided = divided
        limits = Limits(health.min_sample, health.failure_ratio, health.window_s, health.ejection_s, health.max_ejection_s)
        self._limits = limits
        self._by_id: dict[str, Host] = {}
        self._ordered: list[Host] = []
        self.drained: frozenset[str] = frozenset()
        # Who is eligible, while that does not change.
        self._calm: list[Host] = []
        self._settled_until = 0.0

    def __iter__(self) -> Iterator[Host]:
        return iter(self._ordered)

    def get(self, target: str) -> Host | None:
        """By the target's id."""
        return self._by_id.get(target)

    def update(self, targets: Sequence[Target], now: float) -> None:
        """The backend's latest snapshot; states of those that stay are kept."""
        known = self._by_id
        self._by_id = {}
        for target in targets:
            host = known.get(target.id) or Host(target, Breaker(self._limits, self._chance.random))
            self._by_id[target.id] = host
            drained = target.id in self.drained
            if host.target == target and host.drained == drained and target.id in known:
                continue
            if target.ready and not host.target.ready:
                host.recovered_at = now
            host.target, host.drained, host.share = target, drained, target.weight
            host.capacity = None if target.capacity is None else max(1, -(-target.capacity // self._divided))
            self._bound(host)
            self._settled_until = 0.0
        if len(self._by_id) != len(known):
            self._settled_until = 0.0
        self._ordered = sorted(self._by_id.values(), key=lambda host: host.target.priority)

    def _bound(self, host: Host) -> None:
        """How many of ours it may get: what others leave of its capacity, but never less than half of that. So two gateways that both
        want all of it meet in the middle, whoever came first."""
        whole = host.target.capacity
        if whole is None or host.capacity is None:
            host.limit = _UNBOUNDED
        else:
            host.limit = min(host.capacity, max(1, -(-whole // 2), whole - int(host.others)))

    def told(self, host: Host, ours: int) -> None:
        """The engine may have said how many requests it has, at a time when at most so many were ours. Its count is a moment old, and
        what has ended since would look like others': so of two in a row the smaller counts."""
        stats, at = host.target.stats, host.target.stats_at
        if stats is None or stats.running_requests is None or at <= host.told_at:
            return
        host.told_at = at
        reported = max(0.0, stats.running_requests + (stats.queued_requests or 0.0) - ours)
        host.others, host.reported = min(reported, host.reported), reported
        self._bound(host)

    def choose(self, policy: Policy, bound: Affinity, tried: Collection[str], now: float) -> Host | NoHost:
        """The next host that was not tried yet, or why there is none. What it costs is in docs/performance.md."""
        if now < self._settled_until and not tried:
            # Nothing has changed but how full they are: the same list is passed, so that a policy may keep what it has made of it.
            calm = self._calm
            for host in calm:
                if host.in_flight >= host.limit:
                    break
            else:
                return policy.pick(calm, bound)
        return self._choose(policy, bound, tried, now)

    def _choose(self, policy: Policy, bound: Affinity, tried: Collection[str], now: float) -> Host | NoHost:
        candidates: list[Host] = []
        calm: list[Host] = []
        full = False
        sick: list[Host] = []
        shunned: list[Host] = []
        tier = 0
        settled_until = float("inf")
        slow_s = self._health.slow_start_s
        for host in self._ordered:
            target = host.target
            if candidates and target.priority != tier:
                break
            if not target.ready or host.drained or target.id in tried:
                continue
            state = host.breaker.state
            if state is not State.CLOSED:
                settled_until = min(settled_until, host.breaker.until if state is State.OPEN else now)
            if not host.up or (state is not State.CLOSED and not self._may_prove_itself(host, now)):
                sick.append(host)
                continue
            if host.in_flight >= host.limit:
                full = full or not host.shunned
                continue
            if host.shunned:
                shunned.append(host)
                continue
            since_s = now - host.recovered_at
            if since_s >= slow_s:
                host.share = target.weight
            else:
                host.share = target.weight * max(SLOW_START_SHARE, since_s / slow_s)
                settled_until = now
            tier = target.priority
            candidates.append(host)
            if host.busy_until <= now:
                calm.append(host)
            else:
                settled_until = min(settled_until, host.busy_until)
        if candidates:
            candidates = calm or candidates
            # With somebody full or tried the list is this pick's own; else it holds until something changes.
            self._settled_until = settled_until if not full and not tried else 0.0
            self._calm = candidates
            return policy.pick(candidates, bound)
        if full:
            return NoHost.FULL
        if shunned:
            return policy.pick(shunned, bound)
        if sick:
            return policy.pick(sick, bound) if self._health.all_sick == "try_all" else NoHost.SICK
        return NoHost.NOBODY

    def _may_prove_itself(self, host: Host, now: float) -> bool:
        return host.breaker.look(now) is not State.OPEN and host.in_flight == 0

    def begin(self, host: Host, now: float) -> None:
        """A request goes there."""
        if host.in_flight == 0:
            host.last_event_at = now  # silence counts from here
        host.in_flight += 1

    def end(self, host: Host, verdict: Verdict | None, now: float, nobody: str = "") -> None:
        """It is over. `verdict` None: it says nothing (the client left). `nobody`: why nobody was there at all."""
        host.in_flight -= 1
        if verdict is not Verdict.OK or host.breaker.state is not State.CLOSED:
            self._settled_until = 0.0
        if verdict is Verdict.BUSY:
            host.busy_until = now + BUSY_S
        elif verdict is Verdict.SICK:
            if nobody:
                host.up, host.why = False, nobody
            if host.breaker.outcome(True, now) and (self._may_be_ejected(host) or self._give_way(host)):
                self.eject(host, "too many failures", now)
        elif verdict is Verdict.OK:
            was = host.breaker.state
            host.breaker.outcome(False, now)
            if was is State.PROBATION:
                host.recovered_at = now

    def probed(self, host: Host, up: bool, now: float, why: str = "") -> None:
        """What its probe said, and why it is not up where that is known."""
        if up != host.up:
            self._settled_until = 0.0
        if up and not host.up:
            host.recovered_at = now
        host.up = up
        host.why = "" if up else why or host.why or "its probe fails"

    def eject(self, host: Host, why: str, now: float) -> None:
        """Open its breaker, whatever the counts say."""
        host.breaker.trip(now)
        host.why = why
        self._settled_until = 0.0

    def _may_be_ejected(self, host: Host) -> bool:
        total = ejected = 0.0
        for other in self._ordered:
            total += other.target.weight
            if (other.breaker.state is not State.CLOSED or other.shunned) and other is not host:
                ejected += other.target.weight
        return ejected + host.target.weight <= self._health.max_ejected_share * total

    def _give_way(self, host: Host) -> bool:
        """Whether a sick host may be ejected once those are back that only answer badly: they are, then."""
        if not any(other.shunned for other in self._ordered):
            return False
        for other in self._ordered:
            other.shunned = False
        return self._may_be_ejected(host)

    def doubt(self, doubted: Mapping[str, str], eject: bool, now: float) -> None:
        """What is wrong with targets' answers, the worst first. With `eject` they get nothing while others can, as many of them as the
        allowed share leaves room for beside those that are sick."""
        before = [host for host in self._ordered if host.shunned]
        for host in self._ordered:
            host.doubt, host.shunned = doubted.get(host.target.id, ""), False
        if eject:
            for target in doubted:
                doubtful = self._by_id.get(target)
                if doubtful is not None:
                    doubtful.shunned = self._may_be_ejected(doubtful)
        for host in before:
            if not host.shunned:
                host.recovered_at = now
        self._settled_until = 0.0

    def has_another(self, tried: Collection[str]) -> bool:
        """Whether somebody who was not tried is well, free, and not doubted."""
        for host in self._ordered:
            well = host.target.ready and host.up and not host.drained and not host.doubt and host.breaker.state is State.CLOSED
            if well and host.in_flight < host.limit and host.target.id not in tried:
                return True
        return False

    def wedged(self, now: float) -> list[Host]:
        """Hosts with requests in flight that have sent nothing for a while, though others have."""
        limit = now - self._health.wedged_s
        quiet = [host for host in self._ordered if host.in_flight and host.last_event_at < limit]
        others = any(host.last_event_at >= limit and host.in_flight for host in self._ordered)
        return quiet if others else []

    def state(self, host: Host, now: float) -> tuple[str, str]:
        """A word for people, and why."""
        host.breaker.look(now)
        return in_words(host.standing(), now, self._health.slow_start_s)


def in_words(standing: Standing, now: float, slow_start_s: float) -> tuple[str, str]:
    """A word for people on how a host stood at that time, and why."""
    target, in_flight, drained, up, why, state, until, capacity, busy_until, recovered_at = standing
    if not target.ready:
        return "not ready", target.reason
    if drained:
        return ("draining" if in_flight else "drained"), "by the operator"
    if not up:
        return "down", why
    if state is State.OPEN:
        return "ejected", f"{why}; tried again in {max(0.0, until - now):.0f} s" if until < _FOR_NOW else why
    if state is State.PROBATION:
        return "probation", why
    if capacity is not None and in_flight >= capacity:
        return "full", f"{in_flight} of {capacity} in flight"
    if busy_until > now:
        return "ok", "said a moment ago that it is busy"
    return "ok", "slow start" if now - recovered_at < slow_start_s else ""
