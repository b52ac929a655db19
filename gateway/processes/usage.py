"""The ledger of a gateway without Redis: the parent adds up what its workers report, and keeps it in a file."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from gateway.access import ledger
from gateway.config import LimitRules
from gateway.home import private, state_folder

log = logging.getLogger("penstock.parent")

WRITE_INTERVAL_S = 10.0


class Usage:
    """Rows of all workers that are and were."""

    def __init__(self, home: Path, rules: LimitRules) -> None:
        self._home = home if rules.ledger_file is None else None
        self._path = Path(rules.ledger_file) if rules.ledger_file is not None else home / "state" / "usage.json"
        self._lock: IO[bytes] | None = None
        self._file = ledger.File(self._path)
        self._keep_days = rules.keep_days
        self._days = ledger.Days(rules.timezone)
        self._written = True
        self._failed = False
        self.rows: ledger.Rows = {}

    def beside(self, name: str) -> Path | None:
        """A file of this name beside the ledger's, which is as much this gateway's own; None where that is another's."""
        return self._path.with_name(f"{self._path.stem}-{name}.json") if self._lock is not None else None

    def read(self) -> None:
        """What an earlier life has left. A file that cannot be read is put aside, never overwritten; one that another gateway keeps is left
        alone, since the last of two writers would win."""
        try:
            if self._home is not None:
                state_folder(self._home)
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = open(self._path.with_suffix(".lock"), "wb", opener=private)  # noqa: SIM115 - kept as long as we live
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock = None
            log.error("%s belongs to another gateway (%s): this one's ledger is in memory only; set limits.ledger_file", self._path, error)
            return
        try:
            self.rows = self._file.read()
        except (OSError, ValueError) as error:
            aside = self._path.with_suffix(f".unreadable-{int(time.time())}")
            log.error("%s cannot be read (%s); it is kept as %s, and the ledger begins anew", self._path, error, aside.name)
            self._path.rename(aside)

    def take(self, more: Mapping[str, dict[str, int]]) -> None:
        """What a worker has counted since its last report."""
        if more:
            ledger.merge(self.rows, ledger.unpacked(more))
            self._written = False

    def recent(self) -> dict[str, dict[str, int]]:
        """This month's rows, for a worker whose budgets begin where they were."""
        month = self._days.at(time.time())["month"][0]
        return ledger.packed({place: found for place, found in self.rows.items() if place[0].startswith(month)})

    def write(self) -> None:
        """Write the file, if there is anything new."""
        if self._written or self._lock is None:
            return
        ledger.forget(self.rows, self._keep_days, self._days.at(time.time())["day"][0])
        try:
            self._file.write(self.rows)
            self._written = True
            if self._failed:
                log.warning("the ledger can be written again")
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.error("the ledger cannot be written (%s); it is kept in memory until it can", error)
            self._failed = True

    async def write_forever(self) -> None:
        """Every ten seconds: so much is lost at most when the machine goes down."""
        while True:
            await asyncio.sleep(WRITE_INTERVAL_S)
            await asyncio.to_thread(self.write)
