"""Teams: keys that share limits and a budget, in memory and in Redis, and what they used together."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from gateway.access.keys import hashed
from tests.support import raw, redis
from tests.support.processes import Gateway, Rehearsal, gateway, until
from tests.wire.test_command import penstock

CHAT = "/v1/chat/completions"


def ask(running: Gateway, key: str) -> raw.Answer:
    return raw.call(running.port, "POST", CHAT, raw.chat("hi"), {"authorization": f"Bearer {key}"})


def configuration(engine: Rehearsal, *teams: dict[str, Any], **more: Any) -> dict[str, Any]:
    members = {"ann": "blue", "bob": "blue", "cid": "red", "dan": None}
    keys = [{"name": name, "hash": hashed(name), **({"team": team} if team else {})} for name, team in members.items()]
    config = {**engine.backend(), "keys": keys, "teams": list(teams), **more}
    config["models"]["deepseek-v3"]["price"] = {"prompt": 1000, "completion": 1000}
    return config


def used(running: Gateway, by: str, **query: str) -> dict[str, int]:
    rest = "".join(f"&{name}={value}" for name, value in query.items())
    rows = running.admin(f"/admin/usage?by={by}{rest}").json()["usage"]
    return {row[by]: row["requests"] for row in rows}


@pytest.mark.parametrize("where", ["memory", "redis"])
def test_keys_of_a_team_share_its_limits_and_others_do_not(scripted_sglang: Rehearsal, tmp_path: Path, where: str) -> None:
    with contextlib.ExitStack() as stack:
        more = {"redis": {"url": stack.enter_context(redis.server(tmp_path / "redis")).url}} if where == "redis" else {}
        config = configuration(scripted_sglang, {"name": "blue", "rpm": 3}, {"name": "red", "rpm": 600}, **more)
        running = stack.enter_context(gateway(tmp_path / "run", config))
        running.wait_ready()
        assert [ask(running, key).status for key in ("ann", "bob", "ann")] == [200] * 3
        refused = ask(running, "bob")
        assert (refused.status, refused.headers["x-ratelimit-limit-requests"]) == (429, "3")
        assert "Rate limit reached for team 'blue' on requests per minute (rpm): limit 3" in refused.error()["message"]
        assert [ask(running, key).status for key in ("cid", "dan")] == [200, 200]
        until("all are counted", lambda: used(running, "team") == {"blue": 3, "red": 1, "": 1})
        assert used(running, "key", team="blue") == {"ann": 2, "bob": 1}
        shown = penstock("usage", "--by", "team,key", "--admin", running.admin_url, folder=tmp_path).stdout.splitlines()
        assert shown[0].split()[:4] == ["day", "team", "key", "model"]
        assert sorted(line.split()[:3] for line in shown[1:] if "blue" in line) == [["blue", "ann", "2"], ["blue", "bob", "1"]]
        table = running.admin("/admin/usage?by=team&format=csv").body.decode().splitlines()
        assert table[0].endswith(",cost,team")
        assert any(line.endswith(",blue") for line in table)


def test_a_budget_is_shared_and_is_known_again_after_a_restart(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    config = configuration(scripted_sglang, {"name": "blue", "budget": {"amount": 0.5}, "tokens_per_day": 100_000}, {"name": "red"})
    with gateway(tmp_path, config) as running:
        running.wait_ready()
        statuses = [ask(running, key).status for _ in range(20) for key in ("ann", "bob")]
        assert set(statuses) == {200, 429}
        assert ask(running, "ann").error()["message"].startswith("You exceeded your current quota: team 'blue', budget of 0.5 a month.")
        assert ask(running, "cid").status == 200
    with gateway(tmp_path, config) as running:
        running.wait_ready()
        assert [ask(running, key).status for key in ("ann", "bob", "cid")] == [429, 429, 200]


def test_a_stored_key_joins_and_leaves_a_team(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with redis.server(tmp_path / "redis") as store:
        config = configuration(scripted_sglang, {"name": "blue", "rpm": 2}, {"name": "red"}, redis={"url": store.url})
        with gateway(tmp_path / "run", config) as running:
            running.wait_ready()

            def keys(*arguments: str) -> Any:
                return penstock("keys", *arguments, "--admin", running.admin_url, folder=tmp_path)

            secret = keys("create", "eve", "--team", "blue").stdout.strip()
            assert [ask(running, key).status for key in ("ann", secret, "bob")] == [200, 200, 429]
            wrong = keys("edit", "eve", "--team", "blu")
            assert (wrong.returncode, wrong.stderr) == (1, "penstock: team: no team is called 'blu'; did you mean 'blue'?\n")
            assert ask(running, secret).status == 429
            assert keys("edit", "eve", "--unset", "team").returncode == 0
            until("it has left", lambda: ask(running, secret).status == 200)
            assert ask(running, "ann").status == 429


def test_what_is_wrong_with_teams_is_said(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(
        "models: {m: {backend: s}}\nbackends: {s: {kind: scripted}}\nteams:\n"
        "  - {name: blue, rpm: 5}\n  - {name: blue}\n  - {name: rich, budget: {amount: 5}}\n"
        f"keys:\n  - {{name: a, hash: '{hashed('a')}', team: bleu}}\n"
    )
    done = penstock("check", "-c", "p.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "penstock: p.yaml:5: teams.1.name: 'blue' is used twice",
        "penstock: p.yaml:6: teams.2.budget: no model has a price, so nothing would ever be spent: set models.NAME.price",
        "penstock: p.yaml:8: keys.0.team: no team is called 'bleu'; did you mean 'blue'?",
    ]
