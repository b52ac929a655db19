"""When a target that fails is left alone, and when it is tried again.

The law, as a table. SICK and OK are outcomes of requests; TRIP is the verdict that there were too many SICK ones (or that a probe saw a
hang); EXPIRE is the end of an ejection.

    state       OK          SICK        TRIP    EXPIRE
    CLOSED      CLOSED      CLOSED      OPEN    CLOSED        requests pass; outcomes are counted over a window
    OPEN        OPEN        OPEN        OPEN    PROBATION     nothing passes; outcomes are of requests that began before
    PROBATION   CLOSED      OPEN        OPEN    PROBATION     one request at a time passes, and decides

An ejection lasts `ejection_s`, twice that the next time, and so on up to `max_ejection_s`, each with a fifth of jitter either way, so
that gateways do not come back all at once. Busy and a client's own fault are not counted at all. Clock and chance are passed in.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass


class State(enum.Enum):
    """Where a breaker stands."""

    CLOSED = "closed"
    OPEN = "open"
    PROBATION = "probation"


class Event(enum.Enum):
    """What moves it."""

    OK = "ok"
    SICK = "sick"
    TRIP = "trip"
    EXPIRE = "expire"


TABLE: dict[tuple[State, Event], State] = {
    (State.CLOSED, Event.OK): State.CLOSED,
    (State.CLOSED, Event.SICK): State.CLOSED,
    (State.CLOSED, Event.TRIP): State.OPEN,
    (State.CLOSED, Event.EXPIRE): State.CLOSED,
    (State.OPEN, Event.OK): State.OPEN,
    (State.OPEN, Event.SICK): State.OPEN,
    (State.OPEN, Event.TRIP): State.OPEN,
    (State.OPEN, Event.EXPIRE): State.PROBATION,
    (State.PROBATION, Event.OK): State.CLOSED,
    (State.PROBATION, Event.SICK): State.OPEN,
    (State.PROBATION, Event.TRIP): State.OPEN,
    (State.PROBATION, Event.EXPIRE): State.PROBATION,
}


@dataclass(frozen=True)
class Limits:
    """`min_sample` outcomes within `window_s` of which `failure_ratio` are SICK open the breaker; times in seconds."""

    min_sample: int = 5
    failure_ratio: float = 0.5
    window_s: float = 10.0
    ejection_s: float = 5.0
    max_ejection_s: float = 300.0


class Breaker:
    """One target's."""

    def __init__(self, limits: Limits, chance: Callable[[], float]) -> None:
        self._limits = limits
        self._chance = chance
        self.state = State.CLOSED
        self.until = 0.0
        self.closed_at = float("-inf")
        self._ejections = 0
        # Outcomes of this half of the window and of the one before: [ok, sick].
        self._half = 0
        self._counts = ([0, 0], [0, 0])

    def _move(self, event: Event, now: float) -> None:
        before, self.state = self.state, TABLE[self.state, event]
        if self.state is State.OPEN and before is not State.OPEN:
            if before is State.CLOSED and now - self.closed_at > self._limits.max_ejection_s:
                self._ejections = 0  # it was well for so long that the past is forgiven
            length_s = min(self._limits.ejection_s * 2**self._ejections, self._limits.max_ejection_s)
            self._ejections += 1
            self.until = now + length_s * (0.8 + 0.4 * self._chance())
        elif self.state is State.CLOSED and before is not State.CLOSED:
            self.closed_at = now
            self._counts = ([0, 0], [0, 0])

    def outcome(self, sick: bool, now: float) -> bool:
        """Count an outcome; whether by the numbers the target should be ejected (who may decide against it, and calls `trip`)."""
        was_closed = self.state is State.CLOSED
        self._move(Event.SICK if sick else Event.OK, now)
        if not was_closed:
            return False
        self._turn(now)
        self._counts[0][sick] += 1
        ok, failed = (one + two for one, two in zip(*self._counts, strict=True))
        return sick and ok + failed >= self._limits.min_sample and failed >= self._limits.failure_ratio * (ok + failed)

    def trip(self, now: float) -> None:
        """Eject."""
        self._move(Event.TRIP, now)

    def look(self, now: float) -> State:
        """The state now: an ejection that has run out is probation."""
        if self.state is State.OPEN and now >= self.until:
            self._move(Event.EXPIRE, now)
        return self.state

    def _turn(self, now: float) -> None:
        half = int(now / (self._limits.window_s / 2))
        if half != self._half:
            recent = self._counts[0] if half == self._half + 1 else [0, 0]
            self._counts = ([0, 0], recent)
            self._half = half
