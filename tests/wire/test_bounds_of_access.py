"""Bounds on what is remembered of callers, and on the words that are under way to a receiver."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from gateway import config
from gateway.access.callers import Calls, Known, TokenCaller
from gateway.access.keys import hashed
from gateway.processes import alerts as watching
from gateway.processes import callers
from gateway.processes.alerts import Alerts
from gateway.processes.usage import Usage
from gateway.store import callers as kept
from gateway.store.callers import CallerStore
from gateway.store.connect import Client
from gateway.telemetry.metrics import Metrics
from tests.support import store
from tests.support.receiver import receiver
from tests.support.redis import Server


def test_a_gateway_knows_so_many_callers_and_forgets_those_that_called_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callers, "MAX_CALLERS", 100)
    known = callers.Callers(Usage(tmp_path, config.LimitRules()))
    for number in range(1000):
        caller = TokenCaller(name=f"staff:{number}")
        known.take(Calls({caller.name: number * 60.0 + 60}, [], [caller]))
        assert len(known.tokens) <= 100
    found = asyncio.run(known.known())
    assert len(found.at) <= 100
    assert {f"staff:{number}" for number in range(920, 1000)} <= found.at.keys() & found.tokens.keys()


def test_redis_keeps_so_many_callers_and_forgets_those_that_called_first(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MAX_CALLERS", 100)
    server.client().flushall()
    now = int(time.time()) // 60 * 60

    async def work() -> None:
        client = Client(config.Redis(url=server.url))
        callers_there = CallerStore(client, keep_days=30)
        try:
            for start in range(0, 300, 50):
                names = [f"staff:{number}" for number in range(start, start + 50)]
                at = {name: now - 60 * (300 - start - index) for index, name in enumerate(names)}
                await callers_there.write(Known(at, {name: TokenCaller(name=name, team="blue") for name in names}))
            found = await callers_there.read()
            assert set(found.at) == set(found.tokens) == {f"staff:{number}" for number in range(200, 300)}
            assert found.tokens["staff:299"].team == "blue"
            # What is later stays, and who has not called for as long as the ledger is kept is forgotten.
            await callers_there.write(Known({"staff:299": 60, "long-ago": now - 31 * 86400}, {}))
            found = await callers_there.read()
            assert found.at["staff:299"] == now - 60
            assert "long-ago" not in found.at
        finally:
            await client.aclose()

    asyncio.run(work())


def test_so_many_words_are_under_way_and_the_rest_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "MAX_SENDING", 2)
    monkeypatch.setattr(watching, "FIRST_S", 0.05)
    (tmp_path / "secret").write_text("a secret of some length")

    async def work(url: str) -> None:
        settings = config.load(
            environment={},
            overrides={
                "keys": [{"name": f"k{number}", "hash": hashed(f"k{number}"), "tokens_per_day": 100} for number in range(5)],
                "alerts": {"webhook": url, "secret_file": str(tmp_path / "secret"), "thresholds": [80]},
            },
        ).settings
        usage = Usage(tmp_path, settings.limits)
        day = time.strftime("%Y-%m-%d", time.gmtime())
        usage.rows = {(day, f"k{number}", "m"): {"prompt": 90} for number in range(5)}
        alerts = Alerts(lambda: settings, usage, callers.Callers(usage), lambda: None, Metrics())
        try:
            for _ in range(3):
                await alerts.look()
                assert len(alerts._sending) == 2
            to.all = None
            for _ in range(200):
                await alerts.look()
                assert len(alerts._sending) <= 2
                if len(to.taken()) == 5:
                    break
                await asyncio.sleep(0.05)
            await store.until("all are told", lambda: not alerts._sending, 20)
            await alerts.look()
            assert sorted(sent.json()["name"] for sent in to.taken()) == [f"k{number}" for number in range(5)]
        finally:
            await alerts.aclose()

    with receiver() as to:
        to.all = 500
        asyncio.run(work(to.url))
