"""Keys in an operator's day: changed while they are used, good at once at every gateway, made from a table, and listed with what they
used."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.access.keys import hashed
from tests.support import redis
from tests.support.processes import Gateway, Rehearsal, gateway, until
from tests.support.redis import Server
from tests.wire.test_keys import admin, ask, create, penstock


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with redis.server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(scope="module")
def pair(store: Server, scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, Gateway]]:
    config = {
        **scripted_sglang.backend(),
        "keys": [{"name": "in-file", "hash": hashed("in-file")}],
        "redis": {"url": store.url},
        "admin": {"key_hash": hashed("the-operator")},
    }
    config["models"]["deepseek-v3"]["price"] = {"prompt": 1000, "completion": 1000}
    folder = tmp_path_factory.mktemp("pair")
    with gateway(folder / "1", config, PENSTOCK__LISTEN__WORKERS="2") as one, gateway(folder / "2", config) as two:
        for running in (one, two):
            running.wait_ready()
        yield one, two


def listed(to: Gateway, name: str) -> dict[str, Any]:
    row: dict[str, Any] = next(row for row in admin(to, "GET", "/admin/keys").json()["keys"] if row["name"] == name)
    return row


def test_a_key_is_good_at_once_at_every_gateway_and_so_is_a_rotated_one(pair: tuple[Gateway, Gateway]) -> None:
    for number in range(5):
        secret = create(pair[number % 2], f"at-once-{number}")
        assert [ask(to, secret).status for to in pair for _ in range(4)] == [200] * 8
        newer = admin(pair[0], "POST", f"/admin/keys/at-once-{number}/rotate", {"overlap_s": 60}).json()["key"]
        assert [ask(to, newer).status for to in pair] == [200, 200]
    assert ask(pair[0], "sk-never-was").status == 401


def test_limits_change_while_a_key_is_used(pair: tuple[Gateway, Gateway]) -> None:
    secret = create(pair[0], "grown", rpm=60, tpm=1_000_000, models=["deepseek-v3"], metadata={"of": "ann"})
    assert ask(pair[1], secret).headers["x-ratelimit-limit-requests"] == "60"
    where = ["--admin", pair[0].admin_url]
    done = penstock("keys", "edit", "grown", "--rpm", "600", "--unset", "tpm", *where)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == 'penstock: \'grown\' is changed: rpm=600.0  models=["deepseek-v3"]  metadata={"of":"ann"}\n'
    until("it holds at the other", lambda: ask(pair[1], secret).headers.get("x-ratelimit-limit-requests") == "600")
    assert "x-ratelimit-limit-tokens" not in ask(pair[1], secret).headers
    row = listed(pair[1], "grown")
    assert (row["rpm"], row["models"], row["metadata"], "tpm" in row) == (600, ["deepseek-v3"], {"of": "ann"}, False)
    # What was before and after is in the audit.
    entry = next(one for one in admin(pair[0], "GET", "/admin/audit").json()["audit"] if one["what"] == "PATCH /admin/keys/grown")
    assert (entry["before"], entry["after"]) == ({"rpm": 60.0, "tpm": 1_000_000.0}, {"rpm": 600.0})


def test_what_cannot_be_changed_is_refused_and_nothing_is_lost(pair: tuple[Gateway, Gateway]) -> None:
    secret = create(pair[0], "stays", rpm=60)
    before = listed(pair[0], "stays")
    for content, status, words in (
        ({"rmp": 5}, 400, "rmp: unknown key; did you mean 'rpm'?"),
        ({"rmp": None}, 400, "rmp: unknown key; did you mean 'rpm'?"),
        ({"rpm": 0}, 400, "rpm: 0 is out of range; accepted: above 0"),
        ({"models": ["deepseek-v4"]}, 400, "no model is called 'deepseek-v4'; did you mean 'deepseek-v3'?"),
        ({"name": "other"}, 400, "'name' of a key cannot be changed"),
        ({"hash": "sha256:" + "0" * 64}, 400, "'hash' of a key cannot be changed"),
        ({}, 400, "Nothing is to be changed"),
    ):
        refused = admin(pair[0], "PATCH", "/admin/keys/stays", content)
        assert (refused.status, words in refused.error()["message"]) == (status, True), refused.body
    assert listed(pair[0], "stays") == before
    assert ask(pair[0], secret).status == 200
    assert admin(pair[0], "PATCH", "/admin/keys/nobody", {"rpm": 1}).status == 404
    assert admin(pair[0], "PATCH", "/admin/keys/in-file", {"rpm": 1}).error()["code"] == "key_in_file"
    nothing = penstock("keys", "edit", "stays", "--admin", pair[0].admin_url)
    assert (nothing.returncode, nothing.stdout) == (1, "")
    assert "nothing is to be changed" in nothing.stderr


def test_a_list_says_when_a_key_was_used_and_how_much_of_its_limits(pair: tuple[Gateway, Gateway]) -> None:
    secret = create(pair[0], "spender", tokens_per_day=200, budget={"amount": 1})
    create(pair[0], "idle", tokens_per_day=100)
    statuses = [ask(pair[0], secret).status for _ in range(20)]
    assert {200, 429} == set(statuses)
    where = ["--admin", pair[1].admin_url]

    def rows() -> dict[str, list[str]]:
        return {line.split()[0]: line.split() for line in penstock("keys", "list", *where).stdout.splitlines()}

    until("the ledger has all of them", lambda: rows()["spender"][3:5] == [str(statuses.count(200)), str(statuses.count(429))], every_s=0.3)
    found = rows()
    assert found["key"] == ["key", "origin", "last", "use", "requests", "limited", "tokens", "cost", "share", "today;", "may"]
    assert found["spender"][1:3] == ["stored", "today"]
    assert int(found["spender"][7].removesuffix("%")) > 50
    assert found["idle"][1:8] == ["stored", "-", "0", "0", "0", "0", "0%"]
    shown = dict(line.split(maxsplit=1) for line in penstock("keys", "show", "spender", *where).stdout.splitlines())
    assert f"{statuses.count(429)} refused by limits" in shown["today"]
    shares = [line for line in penstock("keys", "show", "spender", *where).stdout.splitlines() if line.startswith("of ")]
    assert [line.split()[1] for line in shares] == ["tokens_per_day", "budget"]
    assert all(line.endswith("%") and line.split()[2] != "0.0%" for line in shares)


def test_keys_are_made_from_a_table(pair: tuple[Gateway, Gateway], tmp_path: Path) -> None:
    table = tmp_path / "class.csv"
    table.write_text(
        'name,rpm,models,budget,expires,metadata\n'
        'ada,60,deepseek-v3; org/deepseek,50/month,2030-01-31,"{""seat"": ""1""}"\n'
        "ben,,,,,\n"
        "\n"
        "cleo,120,,5,,\n"
    )  # fmt: skip
    where = ["--admin", pair[0].admin_url]
    done = penstock("keys", "import", str(table), *where)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "penstock: 3 keys were imported, 0 were there already\n"
    secrets = dict(csv.reader(done.stdout.splitlines()))
    assert list(secrets) == ["ada", "ben", "cleo"]
    assert [ask(to, secret).status for to in pair for secret in secrets.values()] == [200] * 6
    ada = listed(pair[0], "ada")
    assert (ada["rpm"], ada["models"], ada["budget"], ada["metadata"]) == (
        60, ["deepseek-v3", "org/deepseek"], {"amount": 50.0, "per": "month"}, {"seat": "1"},
    )  # fmt: skip
    assert ada["expires"] == "2030-01-31"
    assert listed(pair[0], "cleo")["budget"]["amount"] == 5
    # Once more with one line more: what is there stays, and works with the key that it had.
    table.write_text(table.read_text() + "dora,60,,,,\n")
    again = penstock("keys", "import", str(table), *where)
    assert again.stderr == "penstock: 1 keys were imported, 3 were there already\n"
    assert list(dict(csv.reader(again.stdout.splitlines()))) == ["dora"]
    assert ask(pair[1], secrets["ada"]).status == 200


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("nam,rpm\nx,1\n", ":1: has no column 'name'; columns: rpm, tpm, "),
        ("name,rmp\nx,1\n", ":1: there is no column 'rmp'; did you mean 'rpm'?"),
        ("name,rpm\nok,1\nbad,fast\n", ":3: rpm: expected `float | nothing`, got `str`"),
        ("name,rpm\nok,1\n\nok,2\n", ":4: name: 'ok' stands in line 2 already"),
        ("name,rpm\nok,1,2\n", ":2: has more cells than there are columns"),
        ("name,models\nok,\nbad,deepseek-v4\n", ":3: models: no model is called 'deepseek-v4'; did you mean 'deepseek-v3'?"),
    ],
)
def test_a_table_with_a_mistake_makes_no_key(pair: tuple[Gateway, Gateway], tmp_path: Path, table: str, words: str) -> None:
    before = admin(pair[0], "GET", "/admin/keys").json()
    file = tmp_path / "t.csv"
    file.write_text(table)
    done = penstock("keys", "import", str(file), "--admin", pair[0].admin_url)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"t.csv{words}" in done.stderr
    assert done.stderr.count("\n") == 1
    assert admin(pair[0], "GET", "/admin/keys").json() == before
