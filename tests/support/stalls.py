"""A loop that knows how long it was held: the most CPU time that passed between two looks at its sockets."""

from __future__ import annotations

import selectors
import time
from collections.abc import Coroutine
from typing import Any

from tests.support.memory_net import Loop


class _Watched(selectors.SelectSelector):
    """Between the end of one `select` and the beginning of the next everything that is ready has its turn."""

    began: float | None = None
    longest_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self.began is not None:
            self.longest_s = max(self.longest_s, time.thread_time() - self.began)
        found = super().select(timeout)
        self.began = time.thread_time()
        return found


class Stalls(Loop):
    """CPU seconds of this thread, so that neighbours on the machine do not count."""

    def __init__(self) -> None:
        self._watched = _Watched()
        super().__init__(self._watched)

    def stall_s(self, work: Coroutine[Any, Any, Any]) -> float:
        """The longest turn while `work` is done."""
        self._watched.began, self._watched.longest_s = None, 0.0
        self.run_until_complete(work)
        return self._watched.longest_s
