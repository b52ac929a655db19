"""Who waits for a place, and who is next: strict classes, and inside a class the keys in turn, so that one key's thousand requests do not
stand before another's first. Bounded; a request whose deadline cannot be kept is refused at once, with an honest time to come again."""

from __future__ import annotations

from collections import OrderedDict, deque

# The drain rate is an average over about so many seconds.
RATE_WINDOW_S = 10.0
RETRY_AFTER_MAX_S = 60.0


class Ticket:
    """One waiting request: its class (lower is first), whose it is, and until when it waits. `called` is set when it is its turn."""

    __slots__ = ("called", "deadline", "key", "priority")

    def __init__(self, priority: int, key: str, deadline: float) -> None:
        self.priority = priority
        self.key = key
        self.deadline = deadline
        self.called = False


class Queue:
    """Tickets of one pool; no clock of its own."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._classes: dict[int, OrderedDict[str, deque[Ticket]]] = {}
        self._rate = 0.0
        self._left_at = 0.0
        self.waiting = 0

    def enter(self, ticket: Ticket, now: float, again: bool = False) -> bool:
        """Whether there is a place, and a hope to be called in time. `again`: it was called and found nothing, so it is first again."""
        if not again and (self.waiting >= self._limit or now + self.wait_s() > ticket.deadline):
            return False
        ticket.called = False
        keys = self._classes.setdefault(ticket.priority, OrderedDict())
        line = keys.setdefault(ticket.key, deque())
        if again:
            line.appendleft(ticket)
            keys.move_to_end(ticket.key, last=False)
        else:
            line.append(ticket)
        self.waiting += 1
        return True

    def leave(self, ticket: Ticket) -> None:
        """It waits no longer: its client is gone, or its time is up. One that was called has left already."""
        keys = self._classes.get(ticket.priority)
        line = keys.get(ticket.key) if keys is not None else None
        if keys is not None and line is not None and ticket in line:
            line.remove(ticket)
            self.waiting -= 1
            if not line:
                del keys[ticket.key]

    def call(self) -> Ticket | None:
        """The next one, which thereby leaves the queue."""
        for priority in sorted(self._classes):
            keys = self._classes[priority]
            if not keys:
                continue
            key, line = next(iter(keys.items()))
            ticket = line.popleft()
            if line:
                keys.move_to_end(key)
            else:
                del keys[key]
            self.waiting -= 1
            ticket.called = True
            return ticket
        return None

    def freed(self, now: float) -> None:
        """A place became free: the rate at which that happens says how long others will wait."""
        gap_s = min(max(now - self._left_at, 1e-4), RATE_WINDOW_S)
        self._left_at = now
        share = gap_s / (gap_s + RATE_WINDOW_S / 4)
        self._rate += share * (1.0 / gap_s - self._rate)

    def wait_s(self) -> float:
        """How long a newcomer would wait; 0 while nothing is known."""
        return (self.waiting + 1) / self._rate if self._rate > 0 else 0.0

    def retry_after_s(self) -> float:
        """When to come again, in seconds; at most a minute, which is what the SDKs honour."""
        return min(max(self.wait_s(), 1.0), RETRY_AFTER_MAX_S)
