"""Much of a budget is used: a signed webhook says so once, whatever becomes of receiver and gateways, and a metric says how much."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.access.keys import hashed
from gateway.processes.alerts import LOOK_S
from tests.support import raw, redis
from tests.support.processes import Gateway, Rehearsal, gateway, gone, until
from tests.support.receiver import Receiver, receiver, verified
from tests.wire.test_command import penstock

CHAT = "/v1/chat/completions"
SECRET = b"a secret of some length"


def ask(to: Gateway, secret: str) -> int:
    return raw.call(to.port, "POST", CHAT, raw.chat("hi", max_tokens=8), {"authorization": f"Bearer {secret}"}).status


@contextlib.contextmanager
def mortal(folder: Path, settings: dict[str, Any]) -> Iterator[Gateway]:
    """One that may have been killed when it is to be stopped."""
    running = contextlib.ExitStack()
    served = running.enter_context(gateway(folder, settings, PENSTOCK_HOME=str(folder)))
    try:
        yield served
    finally:
        with contextlib.suppress(AssertionError) if served.process.poll() is not None else contextlib.nullcontext():
            running.close()


def configuration(engine: Rehearsal, to: Receiver, folder: Path, **more: Any) -> dict[str, Any]:
    (folder / "secret").write_bytes(SECRET + b"\n")
    alerts = {"webhook": to.url, "secret_file": str(folder / "secret"), "timeout_s": 1}
    settings = {**engine.backend(), "alerts": alerts, "keys": [{"name": "free", "hash": hashed("free")}], **more}
    settings["models"]["deepseek-v3"]["price"] = {"prompt": 1000, "completion": 1000}
    return settings


def cost(of: Gateway) -> float:
    """What one request costs."""
    assert ask(of, "free") == 200

    def counted() -> float:
        rows: list[dict[str, float]] = [row for row in of.admin("/admin/usage?by=key").json()["usage"] if row["requests"]]
        return max((row["cost"] / row["requests"] for row in rows), default=0.0)

    return until("it is counted", counted)


def create(to: Gateway, name: str, **more: Any) -> str:
    secret: str = to.admin("/admin/keys", "POST", content={"name": name, **more}).json()["key"]
    return secret


def thresholds(to: Receiver) -> list[float]:
    return [sent.json()["threshold"] for sent in to.taken()]


def share(of: Gateway, name: str) -> float:
    found = re.search(rf'penstock_budget_used_ratio{{of="key",name="{name}",limit="budget"}} (\S+)', of.admin("/metrics").body.decode())
    return float(found[1]) if found else -1.0


@contextlib.contextmanager
def pair(engine: Rehearsal, to: Receiver, folder: Path) -> Iterator[tuple[Gateway, Gateway]]:
    """Two gateways on one Redis."""
    with redis.server(folder / "redis") as store, contextlib.ExitStack() as stack:
        settings = configuration(engine, to, folder, redis={"url": store.url})
        one, two = (stack.enter_context(mortal(folder / name, settings)) for name in ("one", "two"))
        for running in (one, two):
            running.wait_ready()
        yield one, two


@pytest.mark.slow
def test_each_threshold_is_told_once_by_two_gateways_to_a_receiver_that_fails_first(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with receiver() as to, pair(scripted_sglang, to, tmp_path) as (one, two):
        secret = create(one, "spender", budget={"amount": round(20 * cost(one), 6), "per": "day"})
        to.behaviours = [500, 307, "hang", 404]
        for _ in range(5):
            assert (ask(one, secret), ask(two, secret)) == (200, 200)
        until("the receiver is asked", lambda: to.sent)
        # Whatever the receiver does, nobody waits for it.
        assert ask(one, "free") == 200
        until("half of it is told", lambda: thresholds(to) == [50], 60)
        assert [sent.status for sent in to.sent] == [500, 307, 599, 404, 204]
        assert {sent.path for sent in to.sent} == {"/hook?for=us"}, "no redirect is followed"
        assert len({sent.body for sent in to.sent}) == 1
        until("the metric says so", lambda: all(0.49 < share(running, "spender") < 0.6 for running in (one, two)))
        for _ in range(3):
            assert (ask(one, secret), ask(two, secret)) == (200, 200)
        until("most of it is told", lambda: thresholds(to) == [50, 80], 60)
        until("it is used up", lambda: ask(two, secret) == 429)
        until("all of it is told", lambda: thresholds(to) == [50, 80, 100], 60)
        time.sleep(2 * LOOK_S + 1)  # both look again, twice
        assert thresholds(to) == [50, 80, 100]
        assert len({sent.json()["id"] for sent in to.taken()}) == 3
        told = to.taken()[0].json()
        assert {name: told[name] for name in ("type", "of", "name", "limit")} == {
            "type": "budget.threshold", "of": "key", "name": "spender", "limit": "budget",
        }  # fmt: skip
        assert 0.49 < told["share"] < 0.6
        assert told["used"] == pytest.approx(told["share"] * told["amount"], rel=1e-3)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", told["period"])
        assert all(verified(SECRET, sent) for sent in to.sent)
        assert not verified(b"another secret", to.sent[0])
        counts = [re.findall(r'penstock_alerts_total\{result="(\w+)"\} (\d+)', each.admin("/metrics").body.decode()) for each in (one, two)]
        assert sum(int(count) for each in counts for result, count in each if result == "told") == 3
        assert sum(int(count) for each in counts for result, count in each if result == "failed") == 4
        assert "for=us" not in one.output() + two.output(), "a query may be a secret"


@pytest.mark.slow
def test_what_a_gateway_that_died_had_to_tell_is_told_by_another(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with receiver() as to, pair(scripted_sglang, to, tmp_path) as (one, two):
        to.all = 500
        secret = create(one, "spender", budget={"amount": round(10 * cost(one), 6)})
        assert [ask(one, secret) for _ in range(6)] == [200] * 6
        words = "the webhook cannot be told"
        dying = until("one of them tries", lambda: next((each for each in (one, two) if words in each.output()), None), 60)
        assert dying is not None
        family = dying.family()
        dying.process.kill()
        gone(family)
        to.all = None
        until("the other tells it", lambda: thresholds(to) == [50], 90)


@pytest.mark.slow
def test_without_redis_it_is_told_once_in_several_lives_and_teams_too(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with receiver() as to:
        settings = configuration(scripted_sglang, to, tmp_path)
        home = str(tmp_path)
        with gateway(tmp_path / "0", settings, PENSTOCK_HOME=home) as running:
            running.wait_ready()
            amount = round(10 * cost(running), 6)
        settings["keys"].append({"name": "member", "hash": hashed("member"), "team": "blue"})
        settings |= {"teams": [{"name": "blue", "budget": {"amount": amount}}]}
        with gateway(tmp_path / "1", settings, PENSTOCK_HOME=home) as running:
            running.wait_ready()
            assert [ask(running, "member") for _ in range(6)] == [200] * 6
            until("it is told", lambda: thresholds(to) == [50], 30)
            told = to.taken()[0].json()
            assert (told["of"], told["name"]) == ("team", "blue")
        with gateway(tmp_path / "2", settings, PENSTOCK_HOME=home) as running:
            running.wait_ready()
            assert [ask(running, "member") for _ in range(3)] == [200] * 3
            until("the next is told", lambda: 80 in thresholds(to), 30)
            assert thresholds(to) == [50, 80]
            text = running.admin("/metrics").body.decode()
            assert 'penstock_budget_used_ratio{of="team",name="blue",limit="budget"} 0.9' in text


def test_settings_that_cannot_be_right_are_refused_in_one_line(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    def problem(**alerts: Any) -> str:
        (tmp_path / "p.yaml").write_text(json.dumps(scripted_sglang.backend() | {"alerts": alerts}))
        done = penstock("check", "-c", "p.yaml", folder=tmp_path)
        assert (done.returncode, len(done.stderr.splitlines())) in ((0, 0), (2, 1)), done.stderr
        return done.stderr

    (tmp_path / "short").write_text("secret\n")
    (tmp_path / "good").write_bytes(SECRET)
    url = "https://hooks.example/T0/secret"
    assert problem(webhook=url, secret_file=str(tmp_path / "good")) == ""
    for alerts, words in (
        ({"webhook": url}, "alerts.secret_file: is missing"),
        ({"webhook": url, "secret_file": str(tmp_path / "short")}, "alerts.secret_file: holds 6 characters; accepted: 16 or more"),
        ({"webhook": url, "secret_file": str(tmp_path / "none")}, "alerts.secret_file: cannot be read"),
        ({"webhook": "hooks.example"}, "alerts.webhook: is no URL; accepted: a URL like https://"),
        ({"thresholds": [120]}, "alerts.thresholds.0: 120 is out of range; accepted: above 0, up to 100"),
        ({"thresholds": []}, "alerts.thresholds: holds 0; accepted: one or more"),
    ):
        assert words in problem(**alerts), alerts
        assert "T0" not in problem(**alerts)
