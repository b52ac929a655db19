"""`penstock top`: hosts, keys and workers as they are now, over and over in a terminal, or once."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click
import msgspec

from gateway.admin.client import Client
from gateway.admin.commands import asks
from gateway.admin.operating import workers_in_words
from gateway.terminal import say_lines, table
from gateway.wire.visible import visible

_SERIES = re.compile(r"^(penstock_(?:engine_\w+|queue_waiting))\{([^}]*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
# Of a terminal: another screen without a cursor, and back; to its beginning; to the end of this line, and of the screen.
_ENTER, _LEAVE, _HOME, _LINE, _REST = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l", "\x1b[H", "\x1b[K", "\x1b[J"


class Sample:
    """What a gateway said of itself at one moment (monotonic seconds)."""

    def __init__(self, at: float, ready: str, workers: list[dict[str, Any]], hosts: list[dict[str, Any]], keys: list[dict[str, Any]],
                 usage: list[dict[str, Any]], metrics: str) -> None:  # fmt: skip
        self.at = at
        self.ready = ready
        self.workers = workers
        self.hosts = hosts
        self.keys = {row["name"]: row for row in keys}
        self.used = {row["key"]: row for row in usage}
        # Of each host, by (backend, host): what its engine says. And how many wait, by backend.
        self.engines: dict[tuple[str, str], dict[str, float]] = {}
        self.queued = 0.0
        for name, labels, value in _SERIES.findall(metrics):
            of = dict(_LABEL.findall(labels))
            if name == "penstock_queue_waiting":
                self.queued += float(value)
            else:
                self.engines.setdefault((of["backend"], of["host"]), {})[name.removeprefix("penstock_engine_")] = float(value)

    @classmethod
    def of(cls, client: Client) -> Sample:
        """Ask for all of it."""
        ready = msgspec.json.decode(client.ask("GET", "/readyz", accept=(503,)))
        return cls(
            time.monotonic(),
            ready["error"]["message"] if "error" in ready else "",
            msgspec.json.decode(client.ask("GET", "/admin/workers"))["workers"],
            msgspec.json.decode(client.ask("GET", "/admin/hosts"))["hosts"],
            msgspec.json.decode(client.ask("GET", "/admin/keys"))["keys"],
            msgspec.json.decode(client.ask("GET", "/admin/usage?by=key"))["usage"],
            client.ask("GET", "/metrics").decode(),
        )


def screen(now: Sample, before: Sample, where: str) -> list[str]:
    """The lines of one look; rates are over the time since the one before."""
    lines = [
        f"penstock at {visible(where)}   {visible(now.ready) or 'ready'}",
        f"workers  {workers_in_words(now.workers)}; {now.queued:g} waiting for a host",
        "",
        *table(("host", "state", "in flight", "of", "running", "queued", "kv", "tok/s", "why"), list(_hosts(now))),
    ]
    keys = list(_keys(now, before))
    if keys:
        lines += ["", *table(("key", "req/s", "tok/s", "of rpm", "of tpm", "requests today", "tokens today", "cost today"), keys)]
    return lines


def _hosts(now: Sample) -> Iterator[Sequence[str | float | None]]:
    for row in now.hosts:
        engine: Mapping[str, float] = now.engines.get((row["backend"], row["id"]), {})
        usage = engine.get("kv_usage_ratio")
        speed = engine.get("generation_tokens_per_second")
        yield (
            row["id"], row["state"], row["in_flight"], row["capacity"], engine.get("running_requests"), engine.get("queued_requests"),
            None if usage is None else f"{usage:.0%}", None if speed is None else round(speed), row["why"],
        )  # fmt: skip


def _keys(now: Sample, before: Sample) -> Iterator[Sequence[str | float | None]]:
    """Whoever was busiest since the last look first, then whoever was busiest today."""
    passed_s = max(now.at - before.at, 1e-3)
    rows = []
    for name in {**now.keys, **now.used}:
        of, used, former = now.keys.get(name, {}), now.used.get(name, {}), before.used.get(name, {})
        requests, tokens = used.get("requests", 0), _tokens(used)
        # A day that has just begun counts from nothing.
        rate = max(requests - former.get("requests", 0), 0) / passed_s
        speed = max(tokens - _tokens(former), 0) / passed_s
        rows.append((speed, rate, tokens, name, of, requests, used.get("cost", 0.0)))
    for speed, rate, tokens, name, of, requests, cost in sorted(rows, key=lambda row: (-row[0], -row[1], -row[2], row[3])):
        shares = [f"{amount * 60 / of[limit]:.0%}" if of.get(limit) else None for amount, limit in ((rate, "rpm"), (speed, "tpm"))]
        yield name or "(none)", round(rate, 1), round(speed), *shares, requests, tokens, round(cost, 4)


def _tokens(row: Mapping[str, Any]) -> int:
    return int(row.get("prompt_tokens", 0) + row.get("generated_tokens", 0))


@click.command()
@click.option("--every", type=click.FloatRange(0.2, 60), default=2.0, show_default=True, help="Seconds between two looks.")
@click.option("--once", is_flag=True, help="Look twice, print once: for a pipe.")
@asks
def top(client: Client, every: float, once: bool) -> None:
    """Hosts, keys and workers as they are now, until Ctrl-C."""
    before = Sample.of(client)
    if once or not sys.stdout.isatty():
        time.sleep(every)
        say_lines("\n".join(screen(Sample.of(client), before, client.url)))
        return
    write = sys.stdout.write
    write(_ENTER)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                now = Sample.of(client)
                width, height = shutil.get_terminal_size()
                shown = [line[:width] for line in screen(now, before, client.url)[: height - 1]]
                write(_HOME + "".join(f"{line}{_LINE}\n" for line in shown) + _REST)
                sys.stdout.flush()
                before = now
                time.sleep(every)
    finally:
        write(_LEAVE)
        sys.stdout.flush()
