"""Who waits for a place, and who is next.

Classes come one after the other, but each lower one gets its floor of the places. Inside a class teams, and keys without one, take turns by
weight, as do the keys of a team, whoever has sent how much; inside a key the nearest deadline is first. Bounded: when it is full, whoever
has most in it makes room for who has less. One whose deadline cannot be kept is refused at once, with an honest time to come again.

Turns are start-time fair queueing (Goyal, Vin and Cheng, 1996): the next turn of each is a number that grows by 1 / weight when it is
taken, the smallest is next, and who comes anew begins where the others are, or where it had left.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from typing import Final, final

# The drain rate is an average over about so many seconds.
RATE_WINDOW_S = 10.0
RETRY_AFTER_MAX_S = 60.0
# Floors add up out of fractions.
_WHOLE: Final = 1.0 - 1e-9
# Whoever has left is remembered while that could be an advantage to it; beyond so many names it is looked whether that is still so.
_REMEMBERED: Final = 16

# Why a request got no place.
FULL: Final = "queue_full"
DISPLACED: Final = "displaced"
TOO_LONG: Final = "queue_time"
DEADLINE: Final = "client_deadline"


@final
class Ticket:
    """One waiting request: its class (lower is first), whose it is, and until when it waits.

    `called` is set when it is its turn, `waits` while it is in the queue, `shed` (one of the words above) when it got no place.
    """

    __slots__ = (
        "called", "deadline", "group", "group_weight", "ignored", "key", "named_by", "patience_s", "priority", "shed", "since", "waits",
        "weight",
    )  # fmt: skip

    def __init__(
        self, priority: int, key: str, deadline: float, since: float = 0.0, weight: float = 1.0, team: str = "", team_weight: float = 1.0
    ) -> None:
        self.priority = priority
        self.key = key
        self.weight = weight
        # No key's name has a slash.
        self.group = f"team/{team}" if team else key
        self.group_weight = team_weight if team else weight
        self.deadline = deadline
        self.since = since
        # How long its client waits, if it says so and will not wait for longer than we would; in which header; which others made no sense.
        self.patience_s = 0.0
        self.named_by = ""
        self.ignored: tuple[str, ...] = ()
        self.called = False
        self.waits = False
        self.shed = ""

    @property
    def late(self) -> str:
        """Why it is shed when its deadline cannot be kept: whose deadline that is."""
        return DEADLINE if self.patience_s else TOO_LONG


def _deadline(ticket: Ticket) -> float:
    return ticket.deadline


@final
class _Flow:
    """Somebody whose tickets wait beside those of others: a key with its tickets, or a team with its keys."""

    __slots__ = ("below", "name", "tickets", "turn", "waiting", "weight")

    def __init__(self, name: str, turn: float) -> None:
        self.name = name
        self.turn = turn
        self.weight = 1.0
        self.waiting = 0
        # The nearest deadline first.
        self.tickets: list[Ticket] = []
        self.below: _Turns | None = None

    def size(self) -> float:
        """How much it has waiting, for its weight."""
        return self.waiting / self.weight


@final
class _Turns:
    """Flows that take turns."""

    __slots__ = ("_left", "_now", "flows")

    def __init__(self) -> None:
        self.flows: dict[str, _Flow] = {}
        self._now = 0.0
        self._left: dict[str, float] = {}

    def flow(self, name: str, weight: float) -> _Flow:
        """Of that name; it may begin to wait only now."""
        found = self.flows.get(name)
        if found is None:
            found = self.flows[name] = _Flow(name, self._begins(name))
            self._left.pop(name, None)
        found.weight = weight
        return found

    def _begins(self, name: str) -> float:
        return max(self._now, self._left.get(name, 0.0))

    def next(self) -> _Flow:
        """Whose turn it is."""
        return min(self.flows.values(), key=lambda flow: flow.turn)

    def take(self, flow: _Flow) -> None:
        """It takes its turn."""
        self._now = flow.turn
        flow.turn += 1.0 / flow.weight

    def part(self, flow: _Flow) -> None:
        """Nothing of it waits any more."""
        del self.flows[flow.name]
        if not self.flows:
            self._left.clear()
            self._now = 0.0
        elif flow.turn > self._now:
            self._left[flow.name] = flow.turn
            if len(self._left) > _REMEMBERED + len(self.flows):
                self._left = {name: turn for name, turn in self._left.items() if turn > self._now}

    def before(self, name: str, weight: float, own: int) -> int:
        """How many turns are taken before that of a flow whose own number `own` (from 0) it is."""
        flow = self.flows.get(name)
        turn = (self._begins(name) if flow is None else flow.turn) + own / weight
        found, behind = own, False
        for other in self.flows.values():
            if other is flow:
                behind = True  # of two with the same turn who began to wait first is first
            else:
                turns = (turn - other.turn) * other.weight
                found += min(other.waiting, max(0, math.ceil(turns) if behind else math.floor(turns) + 1))
        return found


@final
class _Class:
    """Tickets of one class. `again`: those that were called and found nothing; `owed`: what of its floor it has not got yet, in places."""

    __slots__ = ("again", "owed", "turns", "waiting")

    def __init__(self) -> None:
        self.again: deque[Ticket] = deque()
        self.turns = _Turns()
        self.owed = 0.0
        self.waiting = 0

    def add(self, ticket: Ticket) -> None:
        """At the end of its own line, or before those that may wait for longer."""
        group = self.turns.flow(ticket.group, ticket.group_weight)
        line = group
        if ticket.group != ticket.key:
            if group.below is None:
                group.below = _Turns()
            line = group.below.flow(ticket.key, ticket.weight)
            line.waiting += 1
        line.tickets.insert(bisect_right(line.tickets, ticket.deadline, key=_deadline), ticket)
        group.waiting += 1

    def next(self) -> Ticket:
        """Whose turn it is, which it takes."""
        if self.again:
            return self.again.popleft()
        group = self.turns.next()
        self.turns.take(group)
        line = group
        if group.below is not None:
            line = group.below.next()
            group.below.take(line)
        ticket = line.tickets[0]
        self._out(group, line, ticket)
        return ticket

    def remove(self, ticket: Ticket) -> None:
        """One that waits no longer."""
        if ticket in self.again:
            self.again.remove(ticket)
            return
        group = self.turns.flows[ticket.group]
        self._out(group, group if group.below is None else group.below.flows[ticket.key], ticket)

    def _out(self, group: _Flow, line: _Flow, ticket: Ticket) -> None:
        line.tickets.remove(ticket)
        group.waiting -= 1
        if group.below is not None:
            line.waiting -= 1
            if not line.waiting:
                group.below.part(line)
        if not group.waiting:
            self.turns.part(group)

    def before(self, ticket: Ticket) -> int:
        """How many of this class would be called before it."""
        group = self.turns.flows.get(ticket.group)
        line = group
        if group is not None and group.below is not None:
            line = group.below.flows.get(ticket.key)
        own = bisect_right(line.tickets, ticket.deadline, key=_deadline) if line is not None else 0
        if group is not None and group.below is not None:
            own = group.below.before(ticket.key, ticket.weight, own)
        return len(self.again) + self.turns.before(ticket.group, ticket.group_weight, own)

    def last(self, newcomer: Ticket | None = None) -> Ticket | None:
        """The last one of whoever has most waiting; with `newcomer` only where that is more than the newcomer's own would be with it."""
        group = max(self.turns.flows.values(), key=_Flow.size, default=None)
        if group is None:
            return None
        same = newcomer is not None and newcomer.group == group.name
        if newcomer is not None and not same:
            mine = self.turns.flows.get(newcomer.group)
            if group.size() <= ((mine.waiting if mine is not None else 0) + 1) / newcomer.group_weight:
                return None
        if group.below is None:
            return None if same else group.tickets[-1]
        line = max(group.below.flows.values(), key=_Flow.size)
        if newcomer is not None and same:
            mine = group.below.flows.get(newcomer.key)
            if line.size() <= ((mine.waiting if mine is not None else 0) + 1) / newcomer.weight:
                return None
        return line.tickets[-1]


class Queue:
    """Tickets of one pool; no clock of its own. `floor`: of the places, what each lower class gets while an upper one waits."""

    def __init__(self, limit: int, floor: float = 0.0) -> None:
        self._limit = limit
        self._floor = floor
        self._reserved = max(1, int(limit * floor)) if floor else 0
        # Those of which somebody waits.
        self._classes: dict[int, _Class] = {}
        self._rate = 0.0
        self._left_at = 0.0
        self.waiting = 0
        # Those that had to make room, for whoever tells them.
        self.displaced: list[Ticket] = []

    def enter(self, ticket: Ticket, now: float, again: bool = False) -> bool:
        """Whether there is a place, and a hope to be called in time; else `shed` says why not. `again`: it was called and found nothing, so
        it is first again."""
        if not again and now + self.wait_s(ticket) > ticket.deadline:
            ticket.shed = ticket.late
            return False
        if not again and self.waiting >= self._limit and not self._displace(ticket):
            ticket.shed = FULL
            return False
        of = self._classes.get(ticket.priority)
        if of is None:
            of = self._classes[ticket.priority] = _Class()
        if again:
            of.again.append(ticket)
            of.owed = 1.0
        else:
            of.add(ticket)
        of.waiting += 1
        self.waiting += 1
        ticket.waits, ticket.called = True, False
        return True

    def _displace(self, newcomer: Ticket) -> bool:
        """Whether one leaves a full queue for the newcomer. It is the last one of whoever has most in it: of a lower class (but for what
        each has for sure), of the newcomer's own, or of an upper one where its own has not what it has for sure."""
        own = self._classes.get(newcomer.priority)
        short = (own.waiting if own is not None else 0) < self._reserved
        for priority in sorted(self._classes, reverse=True):
            of = self._classes[priority]
            if priority == newcomer.priority:
                found = of.last(newcomer)
            elif of.waiting > self._reserved and (priority > newcomer.priority or short):
                found = of.last()
            else:
                continue
            if found is not None:
                found.shed = DISPLACED
                self.leave(found)
                self.displaced.append(found)
                return True
        return False

    def leave(self, ticket: Ticket) -> None:
        """It waits no longer: its client is gone, or its time is up. One that was called has left already."""
        if ticket.waits:
            of = self._classes[ticket.priority]
            of.remove(ticket)
            self._gone(of, ticket)

    def _gone(self, of: _Class, ticket: Ticket) -> None:
        ticket.waits = False
        of.waiting -= 1
        self.waiting -= 1
        if not of.waiting:
            del self._classes[ticket.priority]

    def call(self) -> Ticket | None:
        """The next one, which thereby leaves the queue."""
        if not self._classes:
            return None
        first = min(self._classes)
        of = self._classes[first]
        for priority in sorted(self._classes):
            other = self._classes[priority]
            if priority != first:
                other.owed += self._floor
                if other.owed >= _WHOLE and (of is self._classes[first] or other.owed > of.owed):
                    of = other
        of.owed = max(0.0, of.owed - 1.0)
        ticket = of.next()
        self._gone(of, ticket)
        ticket.called = True
        return ticket

    def freed(self, now: float) -> None:
        """A place became free: the rate at which that happens says how long others will wait."""
        gap_s = min(max(now - self._left_at, 1e-4), RATE_WINDOW_S)
        self._left_at = now
        share = gap_s / (gap_s + RATE_WINDOW_S / 4)
        self._rate += share * (1.0 / gap_s - self._rate)

    def wait_s(self, ticket: Ticket | None = None) -> float:
        """How long this one would wait if it came now, or one that is behind all others; 0 while nothing is known."""
        if self._rate <= 0:
            return 0.0
        return ((self.waiting if ticket is None else self._before(ticket)) + 1) / self._rate

    def _before(self, ticket: Ticket) -> int:
        of = self._classes.get(ticket.priority)
        own = of.before(ticket) if of is not None else 0
        found = own + sum(other.waiting for priority, other in self._classes.items() if priority < ticket.priority)
        if self._floor:
            found = min(found, math.ceil((own + 1) / self._floor))
        return min(found, self.waiting)

    def retry_after_s(self, ticket: Ticket | None = None) -> float:
        """When to come again, in seconds; at most a minute, which is what the SDKs honour."""
        return min(max(self.wait_s(ticket), 1.0), RETRY_AFTER_MAX_S)
