"""A Redis that comes back without its keys, or with an old state of them: what is known goes on, and can be put back or given up."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from gateway.access.keys import StoredKey, hashed
from gateway.store.keysync import what_holds
from tests.support import raw, redis
from tests.support.processes import Gateway, Rehearsal, until
from tests.support.redis import Server
from tests.wire.test_command import penstock as command
from tests.wire.test_keys import admin, alone, ask, create, metric, penstock

LOST = 'penstock_stored_keys{state="lost"}'
AGE = "penstock_key_list_age_seconds"
TWO_WORKERS = {"PENSTOCK__LISTEN__WORKERS": "2"}


def everywhere(to: Gateway, secret: str, status: int) -> bool:
    """Asked often enough to meet both workers."""
    return answers(to, [secret]) == {status}


def answers(to: Gateway, secrets: Iterable[str]) -> set[int]:
    """Every status that they get, asked as often."""
    return {ask(to, secret).status for secret in secrets for _ in range(8)}


def stored(store: Server) -> dict[str, Any]:
    found = store.client().hgetall("penstock:{default}:keys")
    return {name.decode(): json.loads(content) for name, content in found.items()}


def refused(answer: raw.Answer) -> tuple[int, str | None]:
    return answer.status, answer.error()["code"]


def test_a_redis_that_comes_back_empty_takes_no_key_with_it(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with redis.server(tmp_path / "redis") as store, alone(scripted_sglang, store, tmp_path, **TWO_WORKERS) as running:
        secrets = {name: create(running, name) for name in ("alice", "carol")}
        made = time.monotonic()
        until("they work", lambda: answers(running, secrets.values()) == {200}, 10)
        # The age is that of up to a second ago. A process that has not met them by now would not know that they are lost.
        until("every worker has read them", lambda: metric(running, AGE) + 2 < time.monotonic() - made, 20)
        store.kill()
        store.start()
        until("it is noticed", lambda: metric(running, LOST) == 2, 20)
        assert answers(running, secrets.values()) == {200}
        assert running.output().count("Redis has lost changes of the stored keys (version 0, last seen was 2)") == 1, (
            "one line, of one process"
        )
        assert running.output().count("Redis does not have 2 stored keys that work here: alice, carol") == 1
        detail = "Redis has lost 2 stored keys, which still work here: penstock keys restore"
        until("it is said", lambda: raw.call(running.port, "GET", "/readyz").json().get("detail") == detail, 10)
        assert {row["name"]: row["origin"] for row in admin(running, "GET", "/admin/keys").json()["keys"]} == {
            "alice": "lost",
            "carol": "lost",
        }
        for answer in (
            admin(running, "POST", "/admin/keys", {"name": "alice"}),
            admin(running, "POST", "/admin/keys/alice/rotate", {}),
            admin(running, "DELETE", "/admin/keys/alice"),
        ):
            assert refused(answer) == (409, "lost_key"), "whoever still knows it would not hear of it"
        secrets["bob"] = create(running, "bob")
        until("what is made now works beside them", lambda: all(everywhere(running, secret, 200) for secret in secrets.values()), 10)
        before = {worker.pid for worker in running.workers()}
        assert admin(running, "POST", "/admin/reload").status == 200
        until("others serve", lambda: not before & {worker.pid for worker in running.workers()}, 20)
        assert answers(running, secrets.values()) == {200}, "workers that begin now know them from their parent"

        done = penstock("keys", "restore", "--admin", running.admin_url)
        assert (done.returncode, done.stdout) == (0, "penstock: 2 keys were restored: alice, carol\n")
        assert set(stored(store)) == {"alice", "bob", "carol"}
        assert penstock("keys", "restore", "--admin", running.admin_url).stdout == "penstock: 0 keys were restored\n"
        until("nothing is lost", lambda: metric(running, LOST) == 0, 10)
        until("nor said to be", lambda: raw.call(running.port, "GET", "/readyz").json() == {"status": "ready"}, 10)
        assert admin(running, "DELETE", "/admin/keys/alice").status == 200
        until("and is revoked as any", lambda: everywhere(running, secrets["alice"], 401), 10)
        assert everywhere(running, secrets["carol"], 200)
        with alone(scripted_sglang, store, tmp_path / "later") as later:
            assert [ask(later, secrets[name]).status for name in ("alice", "bob", "carol")] == [401, 200, 200]


def test_what_comes_back_with_an_old_state_does_not_count(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    """As after a failover to a replica that was behind: a key that was revoked since then stays revoked."""
    with redis.server(tmp_path / "redis") as store, alone(scripted_sglang, store, tmp_path) as running:
        old, mallory = create(running, "alice"), create(running, "mallory")
        state, version = store.client().hgetall("penstock:{default}:keys"), store.client().get("penstock:{default}:keys:version")
        assert admin(running, "DELETE", "/admin/keys/mallory").status == 200
        new = admin(running, "POST", "/admin/keys/alice/rotate", {"overlap_s": 0}).json()["key"]
        until("both are known", lambda: [ask(running, secret).status for secret in (old, new, mallory)] == [401, 200, 401], 10)
        names = "penstock:{default}:keys", "penstock:{default}:keys:version"
        back = store.client().pipeline()
        back.delete(names[0]).hset(names[0], mapping=state).set(names[1], version)
        back.execute()
        until("it is noticed", lambda: metric(running, LOST) == 1, 10)
        bob = create(running, "bob")
        until("what is made now works", lambda: ask(running, bob).status == 200, 10)
        assert [ask(running, secret).status for secret in (old, new, mallory)] == [401, 200, 401]
        assert admin(running, "DELETE", "/admin/keys/bob").status == 200
        until("what is revoked now does not", lambda: ask(running, bob).status == 401, 10)
        assert admin(running, "POST", "/admin/stored-keys/restore", {}).json() == {"restored": ["alice"]}
        assert list(stored(store)) == ["alice"]
        assert stored(store)["alice"]["hash"] == hashed(new)
        with alone(scripted_sglang, store, tmp_path / "later") as later:
            assert [ask(later, secret).status for secret in (old, new, mallory, bob)] == [401, 200, 401, 401]


def test_what_is_lost_on_purpose_is_given_up_at_every_gateway(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(redis.server(tmp_path / "redis"))
        one, two = (stack.enter_context(alone(scripted_sglang, store, tmp_path / name)) for name in ("1", "2"))
        secret = create(one, "alice")
        until("both know it", lambda: [ask(to, secret).status for to in (one, two)] == [200, 200], 10)
        until("their parents too", lambda: [metric(to, 'penstock_stored_keys{state="usable"}') for to in (one, two)] == [1, 1], 10)
        store.client().flushall()
        until("both have noticed", lambda: [metric(to, LOST) for to in (one, two)] == [1, 1], 10)
        assert [ask(to, secret).status for to in (one, two)] == [200, 200]
        done = penstock("keys", "restore", "--discard", "--admin", one.admin_url)
        assert done.stdout == "penstock: 1 keys were discarded: alice\n"
        until("it is no good any more", lambda: [ask(to, secret).status for to in (one, two)] == [401, 401], 10)
        assert stored(store) == {}
        assert admin(two, "POST", "/admin/keys", {"name": "alice"}).status == 201, "and the name is free"


def test_keys_are_exported_and_imported(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with redis.server(tmp_path / "redis") as store, alone(scripted_sglang, store, tmp_path / "1") as running:
        alice = create(running, "alice", rpm=6000, metadata={"team": "blue"})
        create(running, "bob")
        exported = penstock("keys", "export", "--admin", running.admin_url).stdout
        assert alice not in exported
        rows = {row["name"]: row for row in json.loads(exported)["keys"]}
        assert rows["alice"]["hash"] == hashed(alice)
        assert rows["alice"]["metadata"] == {"team": "blue"}
    # So many that they do not go with one request.
    many = [{**rows["bob"], "name": f"bob-{number}", "metadata": {"words": "w" * 500}} for number in range(200)]
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [rows["alice"], *many]}))
    with redis.server(tmp_path / "another") as store, alone(scripted_sglang, store, tmp_path / "2") as running:
        create(running, "bob-7")
        done = penstock("keys", "import", str(tmp_path / "keys.json"), "--admin", running.admin_url)
        assert done.stdout == "penstock: 200 keys were imported, 1 were there already\n", done.stderr
        assert len(stored(store)) == 201
        assert stored(store)["bob-7"]["hash"] != rows["bob"]["hash"], "what is there stays as it is"
        until("they work", lambda: ask(running, alice).status == 200, 10)
        again = penstock("keys", "import", str(tmp_path / "keys.json"), "--admin", running.admin_url)
        assert again.stdout == "penstock: 0 keys were imported, 201 were there already\n"

        (tmp_path / "bad.json").write_text(json.dumps({"keys": [{**rows["bob"], "name": "fresh"}, *many, {**rows["bob"], "rpm": 0}]}))
        failed = penstock("keys", "import", str(tmp_path / "bad.json"), "--admin", running.admin_url)
        assert failed.returncode == 1
        assert ".rpm: 0.0 is out of range" in failed.stderr or ".rpm: 0 is out of range" in failed.stderr
        assert "fresh" not in stored(store), "all are looked at before the first is stored"
        for content, words in (
            ({"keys": "x"}, "The body must be"),
            ({"keys": [], "extra": 1}, "The body must be"),
            ({"keys": [{"name": "x"}]}, "keys.0: `hash` is missing"),
            ({"keys": [rows["bob"], rows["bob"]]}, "'bob' is there twice"),
            ({"keys": [{**rows["bob"], "expires": "0001-01-01"}]}, "keys.0.expires: '0001-01-01'"),
        ):
            answer = admin(running, "POST", "/admin/stored-keys", content)
            assert answer.status == 400, content
            assert words in answer.error()["message"]
        (tmp_path / "nonsense").write_text("{}")
        nonsense = penstock("keys", "import", str(tmp_path / "nonsense"), "--admin", running.admin_url)
        assert "is not what `penstock keys export` writes" in nonsense.stderr


@pytest.mark.parametrize(("how", "warned"), [("forgetful", True), ("durable", False), ("silent", False)])
def test_a_redis_that_keeps_nothing_is_warned_of_at_the_start(scripted_sglang: Rehearsal, tmp_path: Path, how: str, warned: bool) -> None:
    """`silent`: a Redis whose configuration may not be read, as most that are rented."""
    users = ["--user", "default", "on", "nopass", "~*", "+@all", "-config"] if how == "silent" else []
    with redis.server(tmp_path / "redis", arguments=users, durable=how == "durable") as store:
        words = "redis.url: keeps nothing on disk: stored keys and the ledger are gone when it is started again (set appendonly yes there)"
        with alone(scripted_sglang, store, tmp_path) as running:
            create(running, "alice")  # by then it has looked
            until("it serves", lambda: metric(running, 'penstock_stored_keys{state="usable"}') == 1, 10)
            assert running.output().count(words) == (1 if warned else 0)
        checked = command("check", "-c", str(tmp_path / "penstock.yaml"), folder=tmp_path)
        assert checked.returncode == 0
        assert (f"note: {words}" in checked.stdout) == warned


def key(name: str, version: int = 1) -> StoredKey:
    return StoredKey(name=name, hash=hashed(f"{name}-{version}"))


def test_of_lost_keys_what_was_known_holds_with_what_has_changed_since() -> None:
    known = {"kept": key("kept"), "newer": key("newer", 2), "dropped": key("dropped"), "rotated": key("rotated"), "gone": key("gone")}
    then = {"newer": key("newer"), "dropped": key("dropped"), "rotated": key("rotated"), "back": key("back")}
    now = {"newer": key("newer"), "rotated": key("rotated", 2), "back": key("back"), "made": key("made")}
    assert what_holds(known, then, then) == known
    assert what_holds(known, then, now) == {
        "kept": key("kept"),  # which the store has lost
        "gone": key("gone"),
        "newer": key("newer", 2),  # which it has in an old state
        "rotated": key("rotated", 2),  # since
        "made": key("made"),  # since
    }, "dropped since, and what came back with the old state is not there"
