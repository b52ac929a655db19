"""What is made of a request's record when it has ended, in this order: metrics, spans, the kept record, the log line.

Only after its settlement, so that all of them say what it came to. And not on its way: records are gathered for a few milliseconds and
observed together, which takes a third of what each alone would (docs/performance.md).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from gateway.telemetry import log
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.record import Record
from gateway.telemetry.ring import Ring

_log = logging.getLogger("penstock.tasks")

# Records wait for at most so long, and so many of them.
GATHER_S = 0.005
GATHER_MOST = 64
_TASK = "requests that have ended"


class Tracer(Protocol):
    """Makes spans of a record (`gateway.telemetry.tracer`, which is not imported where nothing is traced)."""

    def finish(self, record: Record) -> None:
        """A request has ended: record it, if it is to be."""


class Observer:
    """Everything that looks at finished requests. `log_requests`: whether each has a line in the log."""

    def __init__(self, log_requests: bool, tracer: Tracer | None = None, metrics: Metrics | None = None) -> None:
        self.metrics = metrics if metrics is not None else Metrics()
        self.ring = Ring()
        self.tracer = tracer
        # Who looks at answers, where anybody does.
        self.judge: Callable[[Record], None] | None = None
        self._log_requests = log_requests
        self._gathered: list[Record] = []
        self._timer: asyncio.TimerHandle | None = None

    def ended(self, record: Record) -> None:
        """A request's last byte has left; what it came to may still be settled."""
        if record.settling is None:
            self._gather(record)
        else:
            record.settling.add_done_callback(lambda _: self._gather(record))

    def _gather(self, record: Record) -> None:
        self._gathered.append(record)
        if len(self._gathered) >= GATHER_MOST:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GATHER_S, self.flush)

    def flush(self) -> None:
        """Observe what was gathered; also before anybody looks, and at the end."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        gathered, self._gathered = self._gathered, []
        for record in gathered:
            try:
                self.metrics.request(record)
                if self.tracer is not None:
                    self.tracer.finish(record)
                if record.sampled and self.judge is not None:
                    self.judge(record)
                record.call = record.answer = None
                self.ring.keep(record)
            except Exception:  # of one request: the others are observed all the same
                self._failed()
        try:
            log.requests(gathered, self._log_requests)
        except Exception:
            self._failed()

    def _failed(self) -> None:
        self.metrics.failed(_TASK)
        _log.exception("the task '%s' has failed", _TASK)
