"""Answers that workers hand on are judged, hosts are compared by what was found, and whoever is to know is told. All of it in the parent,
away from every request, so that what is known of a host is known of all workers' answers.

The judging itself is a process of its own (`gateway.sentinel.judge`), started when there is something to judge and given no more than its
share of a core; what it cannot do in time is left out and counted.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import msgspec

from gateway import config
from gateway.config import Settings, without_secrets
from gateway.processes import children, webhook
from gateway.sentinel.answers import FINISHES
from gateway.sentinel.judge import Verdict, framed
from gateway.sentinel.rules import RULES, Found
from gateway.sentinel.sample import Sample
from gateway.sentinel.statistics import Alert, Place, Share, Window
from gateway.supervision import once
from gateway.telemetry import metrics
from gateway.telemetry.metrics import JOIN, Metrics

log = logging.getLogger("penstock.sentinel")

# How often hosts are compared.
LOOK_S = 5.0
# An answer that has come is not judged before this: who is started for a moment needs no judge.
START_S = 1.0
# So many answers wait, and of so many bytes; what comes beyond is left out.
MAX_QUEUED, MAX_QUEUED_BYTES = 256, 16 << 20
# How long the judge may take for one.
JUDGE_LIMIT_S = 30.0
# Of so many requests it is remembered what their answers broke, for `penstock explain`.
MAX_REMEMBERED = 2000
# A receiver that fails is asked again after so long, then twice as long ..., until as long in all.
_FIRST_S, _LONGEST_S, _GIVE_UP_S = 1.0, 300.0, 3600.0
MAX_SENDING = 100


class Example(msgspec.Struct, frozen=True):
    """A bad answer, for the operator to read: `prompt` only where that may be kept."""

    id: str
    at: str
    backend: str
    host: str
    weights: str
    broken: dict[str, str]
    said: str
    prompt: str = ""


class Told(msgspec.Struct, frozen=True):
    """What the receiver of the webhook is told of a host. `id` is the same at the alert's beginning and at its end."""

    id: str
    at: str
    state: str
    backend: str
    host: str
    weights: str
    rule: str
    what: str
    bad: int
    answers: int
    others_bad: int
    others_answers: int
    p: float
    type: str = "sentinel.host"


class Sentinel:
    """`tell`: hears whose answers are under alert, by backend and host, and why; whenever hosts were compared."""

    def __init__(self, settings: Callable[[], Settings], count: Metrics, tell: Callable[[dict[str, dict[str, str]]], None]) -> None:
        self._settings = settings
        self._count = count
        self._tell = tell
        self._queue: deque[Sample] = deque()
        self._queued_bytes = 0
        self._some = asyncio.Event()
        self._chosen: config.Sentinel | None = None
        self._window, self._examples = self._begin()
        # What each host served when it answered last.
        self._serves: dict[tuple[str, str], str] = {}
        self._remembered: OrderedDict[str, dict[str, str]] = OrderedDict()
        # Under alert, since when (seconds since 1970).
        self._alerts: dict[tuple[Place, str], tuple[float, Alert]] = {}
        self._sending: set[asyncio.Task[None]] = set()
        self.resident_bytes = 0

    def _begin(self) -> tuple[Window, deque[Example]]:
        """Count anew; what a reload has changed holds from here on."""
        chosen = self._chosen = self._settings().sentinel
        return Window(list(RULES), chosen.window_s, chosen.min_sample, chosen.window_s / LOOK_S), deque(maxlen=chosen.examples)

    def take(self, sample: Sample) -> None:
        """An answer that a worker hands on."""
        if len(self._queue) >= MAX_QUEUED or self._queued_bytes + len(sample.answer) > MAX_QUEUED_BYTES:
            self._count.add(metrics.UNJUDGED, ("full",))
            return
        self._queue.append(sample)
        self._queued_bytes += len(sample.answer)
        self._some.set()

    async def _next(self) -> Sample:
        while not self._queue:
            self._some.clear()
            await self._some.wait()
        sample = self._queue.popleft()
        self._queued_bytes -= len(sample.answer)
        return sample

    # Judging

    async def judge_forever(self) -> None:
        """Keep a judge while there is something to judge. Raises when it has ended by itself: whoever supervises this begins again."""
        await self._some.wait()
        await asyncio.sleep(START_S)
        argv = [sys.executable, "-P", "-m", "gateway.sentinel.judge"]
        process = await children.spawn(argv, os.environ, [], asyncio.subprocess.PIPE)
        try:
            while True:
                sample = await self._next()
                verdict = await self._judged(process, sample)
                self.heard(sample, verdict, time.monotonic())
                await asyncio.sleep(verdict.cpu_s * (1 / self._settings().sentinel.cpu_share - 1))
        finally:
            self.resident_bytes = 0
            await asyncio.shield(children.end(process, 0.0))

    async def _judged(self, process: asyncio.subprocess.Process, sample: Sample) -> Verdict:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(JUDGE_LIMIT_S):
                process.stdin.write(framed(sample))
                await process.stdin.drain()
                length = int.from_bytes(await process.stdout.readexactly(4), "big")
                return msgspec.msgpack.decode(await process.stdout.readexactly(length), type=Verdict)
        except (TimeoutError, OSError, EOFError) as error:
            self._count.add(metrics.UNJUDGED, ("judge",))
            why = f"it took more than {JUDGE_LIMIT_S:g} s" if isinstance(error, TimeoutError) else "it ended"
            raise RuntimeError(f"the judge of answers was lost over {sample.id}: {why}") from None

    def heard(self, sample: Sample, verdict: Verdict, now: float) -> None:
        """What was found in an answer."""
        self.resident_bytes = verdict.resident_bytes
        self._count.add(metrics.JUDGE_CPU, (), verdict.cpu_s)
        found = verdict.found
        if found is None:
            self._count.add(metrics.UNJUDGED, ("unreadable",))
            return
        backend, weights, host = place = sample.backend, sample.weights, sample.host
        for rule in found.applied:
            self._count.add(metrics.JUDGED, (backend, host, weights, rule, "bad" if rule in found.broken else "ok"))
        for finish in found.finishes:
            self._count.add(metrics.FINISHES, (backend, host, finish if finish in FINISHES else FINISHES[-1]))
        self._serves[backend, host] = weights
        self._window.count(place, sample.id if sample.unit is None else sample.unit, found.applied, list(found.broken), now)
        if found.broken:
            self._remember(sample, found)

    def _remember(self, sample: Sample, found: Found) -> None:
        self._remembered[sample.id] = found.broken
        while len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)
        prompt = without_secrets(sample.prompt.decode(errors="replace"))
        said = without_secrets(found.said)
        at = _instant(time.time())
        self._examples.append(Example(sample.id, at, sample.backend, sample.host, sample.weights, found.broken, said, prompt))

    # Comparing

    async def look_forever(self) -> None:
        """Compare hosts, again and again."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look(time.monotonic())

    def look(self, now: float) -> None:
        """Compare hosts at that time (monotonic seconds); says who comes under alert and who is out of it."""
        if self._settings().sentinel != self._chosen:
            self._window, self._examples = self._begin()
        present = [alert for alert in self._window.look(now) if self._serves[alert.place[0], alert.place[2]] == alert.place[1]]
        before, found = self._alerts, {(alert.place, alert.rule): alert for alert in present}
        self._alerts = {key: (before[key][0] if key in before else time.time(), alert) for key, alert in found.items()}
        for key in found.keys() - before.keys():
            self._say(*self._alerts[key])
        for key in before.keys() - found.keys():
            since, alert = before[key]
            log.info("host %s is out of alert: no more %s than the others'", alert.place[2], RULES[alert.rule], extra=_about(alert))
            self._send(since, alert, "over")
        if found or before:
            doubted: dict[str, dict[str, str]] = {}
            for alert in found.values():
                backend, _, host = alert.place
                hosts = doubted.setdefault(backend, {})
                hosts[host] = f"{hosts[host]}; {in_words(alert)}" if host in hosts else in_words(alert)
            self._tell(doubted)

    def _say(self, since: float, alert: Alert) -> None:
        host = alert.place[2]
        if self._settings().sentinel.eject:
            then = "it gets nothing while others can answer, within max_ejected_share"
        else:
            then = "it goes on answering: drain it (penstock hosts drain), or set sentinel.eject"
        example = next((one.id for one in reversed(self._examples) if one.host == host and alert.rule in one.broken), "")
        shown = f"; see penstock explain {example}" if example else ""
        log.warning("host %s gives bad output: %s (p = %.0e); %s%s", host, in_words(alert), alert.p, then, shown, extra=_about(alert))
        self._send(since, alert, "begun")

    def gauges(self) -> dict[str, list[float]]:
        """Who is under alert, as a metric has it."""
        return {JOIN.join((backend, host, rule)): [1.0] for (backend, _, host), rule in self._alerts}

    def of(self, id: str) -> dict[str, str]:
        """What the answer of that id broke, by rule, and how."""
        return self._remembered.get(id, {})

    def shown(self) -> dict[str, Any]:
        """Everything, for the operator."""
        alerts = [
            {"backend": alert.place[0], "weights": alert.place[1], "host": alert.place[2], "rule": alert.rule, "since": _instant(since),
             "why": in_words(alert), "p": alert.p}
            for since, alert in self._alerts.values()
        ]  # fmt: skip
        hosts = [
            {"backend": place[0], "weights": place[1], "host": place[2],
             "rules": {rule: {"answers": share.of, "bad": share.bad} for rule, share in self._window.shares(place).items()}}
            for place in sorted(self._window.places())
        ]  # fmt: skip
        return {"rules": RULES, "hosts": hosts, "alerts": alerts, "examples": list(self._examples)}

    # Telling

    def _send(self, since: float, alert: Alert, state: str) -> None:
        settings = self._settings()
        if settings.alerts.webhook is None or len(self._sending) >= MAX_SENDING:
            return
        backend, weights, host = alert.place
        number = hashlib.sha256(f"{settings.redis.prefix}/{alert.place}/{alert.rule}/{since:.3f}".encode()).hexdigest()[:32]
        told = Told(
            f"alert_{number}", _instant(time.time()), state, backend, host, weights, alert.rule, RULES[alert.rule], alert.own.bad,
            alert.own.of, alert.others.bad, alert.others.of, alert.p,
        )  # fmt: skip
        task = once("webhook", self._deliver(told), self._count.failed)
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _deliver(self, told: Told) -> None:
        body, delay_s, until = msgspec.json.encode(told), _FIRST_S, time.monotonic() + _GIVE_UP_S
        while (settings := self._settings().alerts).webhook is not None:
            problem = await webhook.post(settings, body)
            if not problem:
                self._count.add(metrics.ALERTS, ("told",))
                return
            self._count.add(metrics.ALERTS, ("failed",))
            if time.monotonic() > until:
                self._count.add(metrics.ALERTS, ("given_up",))
                log.error("the webhook was never told of host %s: %s", told.host, without_secrets(problem))
                return
            log.warning("the webhook cannot be told of host %s: %s; it is tried again", told.host, without_secrets(problem))
            await asyncio.sleep(delay_s * random.uniform(0.8, 1.2))  # noqa: S311
            delay_s = min(delay_s * 2, _LONGEST_S)

    async def aclose(self) -> None:
        """What was not told is told no more."""
        for task in self._sending:
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)


def in_words(alert: Alert) -> str:
    """What is wrong with a host's answers, beside the others'."""
    own, others = alert.own, alert.others
    return f"{_percent(own)} {RULES[alert.rule]} ({own.bad} of {own.of}), the others {_percent(others)} ({others.bad} of {others.of})"


def _percent(share: Share) -> str:
    return f"{100 * share.part:.2g}%"


def _about(alert: Alert) -> dict[str, dict[str, str]]:
    backend, _, host = alert.place
    return {"fields": {"host": host, "backend": backend, "rule": alert.rule, "cause": in_words(alert)}}


def _instant(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
