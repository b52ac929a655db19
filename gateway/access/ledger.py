"""What was used, by key, model and day: counted when a request ends, in Redis where there is one, else by the parent in a file.

*Generated* is what engines made; limits count it. *Delivered* is what reached the client; money counts it. The rest was *wasted*: the
client had left, or the host died with it.
"""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import msgspec

from gateway.access.limits import rules
from gateway.access.limits.rules import Row
from gateway.access.used import Used
from gateway.config import Price
from gateway.home import private
from gateway.telemetry.record import Record

# Requests by how they ended. `lost`: they were open at a gateway that died, and what they used is not known.
OUTCOMES = ("ok", "failed", "client_gone", "lost")
# `limited`: requests that a limit refused, which are none of those above. `estimated`: those completion tokens among the generated that no
# engine reported. `cost`: in thousand-millionths of the currency's unit.
COLUMNS = (*OUTCOMES, "limited", "prompt", "cached", "generated", "delivered", "wasted_client", "wasted_host", "estimated", "cost")
# What such a request adds.
LIMITED: Mapping[str, int] = {"limited": 1}
# day, key, model -> counts by column
Rows = dict[tuple[str, str, str], dict[str, int]]

_JOIN = "\x1f"


class Days:
    """Calendar days and months in a time zone."""

    def __init__(self, zone: str) -> None:
        self._zone = ZoneInfo(zone)
        self._from = self._until = 0.0
        self._periods: dict[str, tuple[str, float]] = {}

    def at(self, now: float) -> Mapping[str, tuple[str, float]]:
        """`day` and `month` at that time (seconds since 1970): what they are called, and when they end."""
        if not self._from <= now < self._until:  # also where the clock was set back
            here = datetime.fromtimestamp(now, self._zone)
            day = here.replace(hour=0, minute=0, second=0, microsecond=0)
            month = (day.replace(day=1) + timedelta(days=32)).replace(day=1)
            tomorrow = (day + timedelta(days=1)).timestamp()
            self._periods = {"day": (f"{day:%Y-%m-%d}", tomorrow), "month": (f"{day:%Y-%m}", month.timestamp())}
            self._from, self._until = day.timestamp(), tomorrow
        return self._periods


def cost(price: Price | None, prompt: int, cached: int, completion: int) -> int:
    """In thousand-millionths; prices are for a million tokens, cached ones cost as much as others unless it is said."""
    if price is None:
        return 0
    of_cached = price.prompt if price.cached is None else price.cached
    return round(((prompt - cached) * price.prompt + cached * of_cached + completion * price.completion) * rules.NANO / 1e6)


def counts(record: Record, prompt: int, generated: int, estimated: int, price: Price | None) -> dict[str, int]:
    """What a finished request adds; `prompt` and `generated` are what engines worked on in all its attempts."""
    usage, gone = record.usage, record.client_gone
    delivered = min(record.delivered, generated)
    cached = (usage.cached_tokens or 0) if usage is not None else 0
    found = {"client_gone" if gone else "ok" if record.outcome == "ok" else "failed": 1}
    if prompt:
        found["prompt"] = prompt
    if cached:
        found["cached"] = cached
    if generated:
        found["generated"] = generated
        if delivered:
            found["delivered"] = delivered
        if wasted := generated - delivered:
            found["wasted_client" if gone else "wasted_host"] = wasted
    if estimated:
        found["estimated"] = estimated
    # A host's failure costs the client nothing, unless an answer had begun; a client that leaves pays for the work it asked for.
    if price is not None and (gone or record.first_event_at > 0) and (money := cost(price, prompt, cached, delivered)):
        found["cost"] = money
    return found


def add(rows: Rows, row: Row) -> None:
    """Count a settled request."""
    into = rows.setdefault((row.day, row.key, row.model), {})
    for name, value in row.counts.items():
        into[name] = into.get(name, 0) + value


class Unreported:
    """What a worker has counted since it last told its parent (without a shared store)."""

    def __init__(self) -> None:
        self._rows: Rows = {}

    def add(self, row: Row) -> None:
        """Count a settled request."""
        add(self._rows, row)

    def take(self) -> Rows:
        """All of it; from now on it is told."""
        taken, self._rows = self._rows, {}
        return taken


def merge(rows: Rows, more: Rows) -> None:
    """Add all of `more`."""
    for (day, key, model), found in more.items():
        add(rows, Row(day, key, model, found))


def shown(rows: Rows) -> list[Used]:
    """For people, the latest day first."""
    ordered = sorted(rows.items(), key=lambda item: (item[0][0], item[0][1:]))
    ordered.sort(key=lambda item: item[0][0], reverse=True)
    return [_used(row, {name: found.get(name, 0) for name in COLUMNS}) for row, found in ordered]


def _used(row: tuple[str, str, str], of: dict[str, int]) -> Used:
    requests = sum(of[name] for name in OUTCOMES)
    return Used(
        *row, requests, of["ok"], of["failed"], of["client_gone"], of["lost"], of["limited"], of["prompt"], of["cached"], of["generated"],
        of["delivered"], of["wasted_client"], of["wasted_host"], of["estimated"], of["cost"] / rules.NANO,
    )  # fmt: skip


def as_csv(rows: Iterable[Used]) -> bytes:
    """The same as a table, with a header line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Used.__struct_fields__)
    for row in rows:
        # A key's name is the operator's own, but a spreadsheet would still run what begins like a formula.
        writer.writerow(
            [f"'{value}" if isinstance(value, str) and value[:1] in "=+-@" and value else value for value in msgspec.structs.astuple(row)]
        )
    return out.getvalue().encode()


def packed(rows: Rows) -> dict[str, dict[str, int]]:
    """Rows under one name each, for a file or a line between processes."""
    return {_JOIN.join(row): found for row, found in rows.items()}


def unpacked(content: Mapping[str, dict[str, int]]) -> Rows:
    """The reverse."""
    rows: Rows = {}
    for name, found in content.items():
        day, key, model = name.split(_JOIN)
        rows[day, key, model] = dict(found)
    return rows


class File:
    """The ledger of a gateway without Redis, between one life and the next."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Rows:
        """What was written last; nothing where nothing was. Raises OSError or ValueError."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return {}
        return unpacked(msgspec.json.decode(content, type=dict[str, dict[str, int]]))

    def write(self, rows: Rows) -> None:
        """All or nothing: whoever reads it finds the whole of what was written before, or the whole of this."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".new")
        with open(fresh, "wb", opener=private) as out:
            out.write(msgspec.json.encode(packed(rows)))
            out.flush()
            os.fsync(out.fileno())
        fresh.replace(self._path)


def forget(rows: Rows, days: int, today: str) -> None:
    """Drop what is older than so many days."""
    oldest = (datetime.fromisoformat(today).replace(tzinfo=UTC) - timedelta(days=days)).date().isoformat()
    for row in [row for row in rows if row[0] < oldest]:
        del rows[row]


def quotas(rows: Rows, days: Days, teams: Mapping[str, str]) -> dict[str, float]:
    """What the quotas of the present day and month had used, by the names that `keys.Caller` gives them. `teams`: of keys."""
    found: dict[str, float] = {}
    for period, (name, _) in days.at(time.time()).items():
        for (day, key, model), of in rows.items():
            if day.startswith(name):
                if period == "day":
                    tokens = of.get("prompt", 0) + of.get("generated", 0)
                    counted = [f"key/{key}/day", f"key/{key}/model/{model}/day", f"model/{model}/day"]
                    for limit in counted if key not in teams else (*counted, f"team/{teams[key]}/day"):
                        found[f"{limit}/{name}"] = found.get(f"{limit}/{name}", 0.0) + tokens
                for whose in (f"key/{key}", f"team/{teams[key]}") if key in teams else (f"key/{key}",):
                    budget = f"{whose}/budget/{name}"
                    found[budget] = found.get(budget, 0.0) + of.get("cost", 0)
    return found
