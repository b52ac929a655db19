"""Where the log goes.

Never compiled: `logging` refers to its handlers weakly, and compiled code does not tell a weak reference that what it refers to is gone. A
process whose log had been set up twice died of that at its end.
"""

from __future__ import annotations

import logging
from typing import TextIO


class Stderr(logging.Handler):
    """Standard error. What cannot be written there (the disk is full, or a pipe is read no more) ends nothing; it is counted, and said in
    one line as soon as that can be."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        self.write(f"{self.format(record)}\n", 1)

    def write(self, text: str, lines: int) -> None:
        """Whole lines, so many of them, in one write."""
        lock = self.lock
        assert lock is not None
        with lock:
            try:
                if self._lost:
                    text = self._missing() + text
                self.stream.write(text)
                self.stream.flush()
                self._lost = 0
            except (OSError, ValueError):
                self._lost += lines

    def _missing(self) -> str:
        words = "%d lines of the log could not be written"
        return self.format(logging.LogRecord("penstock.log", logging.ERROR, "", 0, words, (self._lost,), None)) + "\n"
