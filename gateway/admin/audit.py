"""Who changed what: one JSON object a line, for as long as two files of a few megabytes last."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

log = logging.getLogger("penstock.admin")

# A file is put aside at this size, in place of the one that was put aside before; a change takes a few hundred bytes.
MAX_FILE_BYTES = 8 << 20
# Of entries in one answer.
MAX_SHOWN = 1000


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request that changed something, or would have: when (UTC), who (an admin key's name) from where, which request of ours, what, and
    what became of it. `before` and `after`: what it was about, where that was there and could be read."""

    at: str
    who: str
    client: str
    request_id: str
    what: str
    status: int
    before: Any = None
    after: Any = None


class Audit:
    """The files in a folder, which is made when there is something to write."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "audit.jsonl"
        self._aside = folder / "audit.1.jsonl"

    def write(self, entry: Entry) -> None:
        """Keep it; a disk that takes no more stops no operator, and is in the log."""
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._file.exists() and self._file.stat().st_size >= MAX_FILE_BYTES:
                self._file.replace(self._aside)
            descriptor = os.open(self._file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                size = os.fstat(descriptor).st_size
                cut = size and os.pread(descriptor, 1, size - 1) != b"\n"  # when the machine went down
                # In one call, so that two gateways with one home do not split each other's lines.
                os.write(descriptor, (b"\n" if cut else b"") + msgspec.json.encode(entry) + b"\n")
            finally:
                os.close(descriptor)
        except OSError as error:
            log.error("the audit cannot be written: %s", error)

    def last(self, count: int) -> list[Mapping[str, Any]]:
        """The last entries, newest first. Raises OSError."""
        found: list[Mapping[str, Any]] = []
        for file in (self._file, self._aside):
            lines = file.read_bytes().splitlines() if file.exists() else []
            for line in reversed(lines):
                if len(found) == count:
                    return found
                try:
                    found.append(msgspec.json.decode(line, type=dict[str, Any]))
                except msgspec.DecodeError:  # one that was cut off
                    continue
        return found


def now() -> str:
    """The time as it stands in an entry."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
