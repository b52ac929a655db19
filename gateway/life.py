"""What one worker knows of itself: whether it is on its way out, whom it is answering, and what it has counted."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from gateway.access import ledger
from gateway.access.admission import Admission
from gateway.access.keys import Keys
from gateway.config import Settings
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.record import Record
from gateway.telemetry.ring import Ring

if TYPE_CHECKING:
    from gateway.telemetry.tracer import Tracer


class Life:
    """`ready`: what `/readyz` may say; `keep`: connections stay open after an answer; `open`: requests that are being answered; `keys`: who
    may call; `admission`: where they are admitted and settled; `ring`: what became of the
    last of them; `tracer`: where they are traced, and `sampling`
    which of them; `usage`: what the ledger's keeper was not told yet, and what it has told us.
    """

    def __init__(self, settings: Settings) -> None:
        self.ready = True
        self.keep = True
        self.open: set[Record] = set()
        self.metrics = Metrics()
        self.keys = Keys(settings)
        self.admission: Admission | None = None
        self.tracer: Tracer | None = None
        self.sampling = 0
        self.ring = Ring()
        self.usage: ledger.Rows = {}
        self.usage_before: ledger.Rows = {}

    def oldest_s(self) -> float:
        """For how long the oldest open request has been under way, in seconds."""
        now = time.monotonic()
        return max((now - record.started_at for record in self.open), default=0.0)
