"""Budgets are watched by the parent, away from every request: how much of each is used, and who is told when it is much.

Of several gateways on one Redis one claims what is to be told, says so again while it tries, and in the end that it is told; when it dies
its claim ends by itself and another takes it up. So each is told once, and twice at worst where a gateway died between the receiver's
answer and its own word.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import secrets
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from gateway.access import ledger
from gateway.access.budgets import Watched, watched
from gateway.access.limits.rules import StoreFailed
from gateway.config import Allowance, Settings, without_secrets
from gateway.home import private
from gateway.processes import webhook
from gateway.processes.callers import Callers
from gateway.processes.usage import Usage
from gateway.supervision import once
from gateway.telemetry.metrics import ALERTS, JOIN, MAX_SERIES, Metrics

if TYPE_CHECKING:
    from gateway.store.admin import AdminStore

log = logging.getLogger("penstock.alerts")

# How often budgets are looked at, and how long a claim holds that is not renewed.
LOOK_S, LEASE_S = 5.0, 20.0
# How long a receiver that fails is left alone: this long, then twice as long ..., up to so long.
FIRST_S, LONGEST_S = 1.0, 300.0
# So many are on their way at once; what is beyond them is found again at a later look.
MAX_SENDING = 100
# A budget that has refused a request is used up from here on: what is left is too little for some, and 100 % might never be seen.
ALMOST = 0.9
# What was told is remembered for so long after its period has ended.
_KEPT_S = 86400.0


class Alert(msgspec.Struct, frozen=True):
    """What the receiver is told. `id` is the same whoever tells it."""

    id: str
    at: str
    of: str
    name: str
    limit: str
    threshold: float
    share: float
    used: float
    amount: float
    period: str
    renewed_at: str
    type: str = "budget.threshold"


class Alerts:
    """`shares`: of every budget the used part, as a metric has it."""

    def __init__(
        self, settings: Callable[[], Settings], usage: Usage, callers: Callers, store: Callable[[], AdminStore | None], metrics: Metrics
    ) -> None:
        self._settings = settings
        self._usage = usage
        self._callers = callers
        self._store = store
        self._metrics = metrics
        self._me = secrets.token_hex(8)
        self.shares: dict[str, list[float]] = {}
        # Budgets that have refused a request, with their amounts.
        self._exhausted: dict[str, float] = {}
        self._told: set[str] = set()
        self._sending: dict[str, asyncio.Task[None]] = {}
        self._failed = False

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look()
            except StoreFailed as error:  # which is said by whoever needs it for requests
                log.debug("budgets cannot be looked at: %s", error)

    async def aclose(self) -> None:
        """What was not told is told by others, or in another life."""
        for task in self._sending.values():
            task.cancel()
        await asyncio.gather(*self._sending.values(), return_exceptions=True)

    async def look(self) -> None:
        """Once. Raises StoreFailed."""
        settings = self._settings()
        days = ledger.Days(settings.limits.timezone)
        found = list(watched(self._every(settings), settings.teams, days.at(time.time())))
        used = await self._used(found, settings, days)
        self.shares = {
            JOIN.join((one.of, one.name, one.limit.unit)): [amount / one.limit.amount]
            for one, amount in zip(found[:MAX_SERIES], used, strict=False)
        }
        amounts = {one.key: one.limit.amount for one in found}
        refused = {key: amounts[key] for key in self._callers.exhausted if key in amounts}
        self._exhausted = {key: amount for key, amount in (self._exhausted | refused).items() if amounts.get(key) == amount}
        self._callers.exhausted.clear()
        # Of periods that are over nothing need be remembered.
        self._told = {place for place in self._told if place.rsplit("/", 2)[0] in amounts}
        for place in list(self._sending):
            if await self._claim(place) != "ours":
                self._sending[place].cancel()
        if settings.alerts.webhook is not None:
            for one, amount in zip(found, used, strict=True):
                await self._tell(one, amount, settings)

    def _every(self, settings: Settings) -> Iterator[tuple[str, Allowance]]:
        """Keys in the file, stored ones, and who has come with a token."""
        yield from ((key.name, key) for key in settings.keys)
        store = self._store()
        if store is not None:
            yield from store.known().keys.items()
        yield from self._callers.tokens.items()

    async def _used(self, found: list[Watched], settings: Settings, days: ledger.Days) -> list[float]:
        store = self._store()
        if store is not None:
            return await store.budgets.used([one.key for one in found])
        teams = {**self._callers.teams(), **{key.name: key.team for key in settings.keys if key.team is not None}}
        quotas = ledger.quotas(self._usage.rows, days, teams)
        return [quotas.get(one.key, 0.0) for one in found]

    async def _tell(self, one: Watched, amount: float, settings: Settings) -> None:
        """Every threshold that is reached and of which nobody was told. Of a budget that is changed it is told anew."""
        share = amount / one.limit.amount
        reached = 1.0 if share >= ALMOST and one.key in self._exhausted else share
        for threshold in sorted(set(settings.alerts.thresholds)):
            if reached * 100 < threshold:
                return
            place = f"{one.key}/{one.limit.amount:.17g}/{threshold:g}"
            if place in self._told or place in self._sending or len(self._sending) >= MAX_SENDING:
                continue
            whose = await self._claim(place)
            if whose == "told":
                self._told.add(place)
            elif whose == "ours":
                alert = Alert(
                    _id(settings.redis.prefix, place), _instant(time.time()), one.of, one.name, one.limit.unit, threshold, round(share, 6),
                    one.shown(amount), one.shown(one.limit.amount), one.period, _instant(one.ends_at),
                )  # fmt: skip
                task = once("webhook", self._deliver(place, alert, one.ends_at), self._metrics.failed)
                self._sending[place] = task
                task.add_done_callback(partial(self._ended, place))

    def _ended(self, place: str, task: asyncio.Task[None]) -> None:
        del self._sending[place]

    async def _deliver(self, place: str, alert: Alert, ends_at: float) -> None:
        """Until the receiver has taken it, or its period is over."""
        body, delay_s = msgspec.json.encode(alert), FIRST_S
        what = f"{alert.of} '{alert.name}' has used {alert.share:.1%} of its {alert.limit}"
        while True:
            settings = self._settings().alerts
            if settings.webhook is None:
                return
            problem = await webhook.post(settings, body)
            if not problem:
                break
            self._metrics.add(ALERTS, ("failed",))
            if not self._failed:
                log.error("the webhook cannot be told that %s: %s; it is tried again", what, without_secrets(problem))
            self._failed = True
            await asyncio.sleep(delay_s * random.uniform(0.8, 1.2))  # noqa: S311
            delay_s = min(delay_s * 2, LONGEST_S)
            if time.time() > ends_at:
                self._metrics.add(ALERTS, ("given_up",))
                log.error("the webhook was never told that %s: its period is over", what)
                return
        self._failed = False
        self._metrics.add(ALERTS, ("told",))
        log.info("%s: the webhook was told at %g%%", what, alert.threshold)
        await self._is_told(place, ends_at - time.time() + _KEPT_S)

    async def _claim(self, place: str) -> str:
        store = self._store()
        return await store.budgets.claim(place, self._me, LEASE_S) if store is not None else "ours"

    async def _is_told(self, place: str, keep_s: float) -> None:
        self._told.add(place)
        store = self._store()
        if store is None:
            self._write()
            return
        while True:
            try:
                await store.budgets.told(place, keep_s)
                return
            except StoreFailed:  # it must hear of it, or another gateway tells it again
                await asyncio.sleep(FIRST_S)

    def read(self) -> None:
        """What an earlier life has told, without Redis; where that cannot be read it is told again."""
        if (path := self._usage.beside("alerts")) is not None:
            with contextlib.suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError):
                self._told = msgspec.json.decode(path.read_bytes(), type=set[str])

    def _write(self) -> None:
        if (path := self._usage.beside("alerts")) is not None:
            fresh = path.with_suffix(".new")
            try:
                with open(fresh, "wb", opener=private) as out:
                    out.write(msgspec.json.encode(sorted(self._told)))
                fresh.replace(path)
            except OSError as error:
                log.error("what the webhook was told cannot be kept (%s): after a restart it is told again", error)


def _id(deployment: str, place: str) -> str:
    return f"alert_{hashlib.sha256(f'{deployment}/{place}'.encode()).hexdigest()[:32]}"


def _instant(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
