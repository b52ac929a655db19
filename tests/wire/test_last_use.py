"""When a key was last used, to the minute, at whatever gateway; and those who come with tokens, who stand in no list of keys."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from gateway.access.callers import MINUTE, minute
from gateway.access.keys import hashed
from tests.support import raw, redis
from tests.support.issuer import issuer
from tests.support.processes import Gateway, Rehearsal, gateway, until
from tests.wire.test_command import penstock
from tests.wire.test_tokens import ask, configuration

KEYS = [{"name": "used", "hash": hashed("used"), "team": "blue"}, {"name": "idle", "hash": hashed("idle")}]


def listed(to: Gateway) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in to.admin("/admin/keys").json()["keys"]}


def within(began: float) -> set[str]:
    """Every minute since then."""
    first, last = int(began) // MINUTE, int(time.time()) // MINUTE
    return {minute(number * MINUTE) for number in range(first, last + 1)}


def test_it_is_kept_in_a_file_and_teams_of_tokens_are_too(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with issuer() as provider:
        settings = configuration(scripted_sglang, provider, groups=[{"name": "research", "team": "blue", "budget": {"amount": 5}}])
        settings["models"]["deepseek-v3"]["price"] = {"prompt": 1000, "completion": 1000}
        settings |= {"keys": KEYS, "teams": [{"name": "blue", "budget": {"amount": 1.0}}]}
        began = time.time()
        token = provider.token("rsa", groups="research")
        with gateway(tmp_path / "run", settings, PENSTOCK_HOME=str(tmp_path)) as running:
            running.wait_ready()
            assert [ask(running, secret).status for secret in ("used", token)] == [200, 200]
            until("it is seen", lambda: {"used", "staff:alice"} <= {name for name, row in listed(running).items() if "last_used" in row})
            rows = listed(running)
            assert rows["used"]["last_used"] in within(began)
            assert "last_used" not in rows["idle"]
            holder = rows["staff:alice"]
            assert (holder["origin"], holder["team"], holder["budget"]) == ("token", "blue", {"amount": 5.0, "per": "month"})
            where = ("--admin", running.admin_url)
            lines = {
                line.split()[0]: line
                for line in penstock("keys", "list", *where, folder=tmp_path, PENSTOCK_HOME=str(tmp_path)).stdout.splitlines()
            }
            assert rows["used"]["last_used"] in lines["used"]
            assert " token " in lines["staff:alice"]
            shown = dict(
                line.split(maxsplit=1)
                for line in penstock("keys", "show", "used", *where, folder=tmp_path, PENSTOCK_HOME=str(tmp_path)).stdout.splitlines()
            )
            assert any(at in line for line in shown.values() for at in within(began))
            by_team = running.admin("/admin/usage?by=team").json()["usage"]
            assert {row["team"]: row["requests"] for row in by_team} == {"blue": 2}
            until("the team's budget is used up", lambda: ask(running, token).status == 429)
            before = listed(running)["used"]["last_used"]
        with gateway(tmp_path / "again", settings, PENSTOCK_HOME=str(tmp_path)) as again:
            again.wait_ready()
            assert listed(again)["used"]["last_used"] == before
            assert listed(again)["staff:alice"]["team"] == "blue"
            # What the holder of the token had used of the team's budget is known, though no list of keys says which team that was.
            refused = ask(again, "used")
            assert refused.status == 429
            assert "team 'blue'" in refused.error()["message"]


def test_all_gateways_of_a_redis_know_it_and_no_request_writes_it(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with issuer() as provider, redis.server(tmp_path / "redis") as store, contextlib.ExitStack() as stack:
        settings = configuration(scripted_sglang, provider, groups=[{"name": "research", "team": "blue"}])
        settings |= {"redis": {"url": store.url}, "keys": KEYS}
        began = time.time()
        homes = [tmp_path / name for name in ("one", "two")]
        one, two = (stack.enter_context(gateway(home, settings, PENSTOCK_HOME=str(home))) for home in homes)
        for running in (one, two):
            running.wait_ready()
        token = provider.token("rsa", groups="research")
        for _ in range(10):
            assert [ask(one, "used").status, ask(one, token).status] == [200, 200]
        kept = store.client().zcard("penstock:{default}:callers:at")
        assert kept == 0 or time.time() - began > MINUTE / 2, "written once a minute, or when somebody asks"
        until("the first knows", lambda: "staff:alice" in listed(one))
        assert store.client().zcard("penstock:{default}:callers:at") == 2
        rows = listed(two)
        assert rows["used"]["last_used"] in within(began)
        assert (rows["staff:alice"]["origin"], rows["staff:alice"]["team"]) == ("token", "blue")
        by_team = until("all are counted", lambda: two.admin("/admin/usage?by=team").json()["usage"])
        assert {row["team"] for row in by_team} == {"blue"}
        # What another version may have written there is no reason to show nothing.
        store.client().hset("penstock:{default}:callers:tokens", "strange", json.dumps({"name": 5}))
        assert "strange" not in listed(two)


def test_who_was_refused_has_called_too(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    settings = {**scripted_sglang.backend(), "keys": [{"name": "short", "hash": hashed("short"), "tokens_per_day": 1}]}
    with gateway(tmp_path / "run", settings, PENSTOCK_HOME=str(tmp_path)) as running:
        running.wait_ready()
        assert raw.call(running.port, "POST", "/v1/chat/completions", raw.chat("hi"), {"authorization": "Bearer short"}).status == 429
        until("it is seen", lambda: "last_used" in listed(running)["short"])
