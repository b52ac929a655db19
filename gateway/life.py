"""What one worker knows of itself: whether it is on its way out, whom it is answering, and what it has counted."""

from __future__ import annotations

import time

from gateway.context import RequestContext
from gateway.metrics import Metrics


class Life:
    """`ready`: what `/readyz` may say; `keep`: connections stay open after an answer; `open`: requests that are being answered."""

    def __init__(self) -> None:
        self.ready = True
        self.keep = True
        self.open: set[RequestContext] = set()
        self.metrics = Metrics()

    def oldest_s(self) -> float:
        """For how long the oldest open request has been under way, in seconds."""
        now = time.monotonic()
        return max((now - record.started_at for record in self.open), default=0.0)
