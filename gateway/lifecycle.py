"""How a worker stands: whether it is on its way out, and whom it is answering. Written by the server and by whoever observes requests."""

from __future__ import annotations

import time

from gateway.telemetry.record import Record


class Lifecycle:
    """`ready`: what `/readyz` may say; `keep`: connections stay open after an answer; `open`: requests that are being answered."""

    def __init__(self) -> None:
        self.ready = True
        self.keep = True
        self.open: set[Record] = set()

    def oldest_s(self) -> float:
        """For how long the oldest open request has been under way, in seconds."""
        now = time.monotonic()
        return max((now - record.started_at for record in self.open), default=0.0)
