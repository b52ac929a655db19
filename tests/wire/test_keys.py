"""Keys that are made while gateways run: shown once, good everywhere at once, and no good anywhere within two seconds."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gateway.access.keys import hashed
from tests.support import raw, redis
from tests.support.processes import Gateway, Rehearsal, environment, gateway, until
from tests.support.redis import Server

CHAT = "/v1/chat/completions"
ADMIN = {"authorization": "Bearer the-operator"}
# The issue's own bound for a revocation, on every gateway.
REVOKED_WITHIN_S = 2.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with redis.server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(scope="module")
def pair(store: Server, scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, Gateway]]:
    """Two gateways of one deployment; one of them has two workers."""
    config = {
        **scripted_sglang.backend(),
        "keys": [{"name": "in-file", "hash": hashed("in-file"), "rpm": 6000}],
        "redis": {"url": store.url},
        "admin": {"key_hash": hashed("the-operator")},
    }
    folder = tmp_path_factory.mktemp("pair")
    with gateway(folder / "1", config, PENSTOCK__LISTEN__WORKERS="2") as one, gateway(folder / "2", config) as two:
        for running in (one, two):
            running.wait_ready()
        yield one, two


def ask(to: Gateway, secret: str) -> raw.Answer:
    return raw.call(to.port, "POST", CHAT, raw.chat("hi"), {"authorization": f"Bearer {secret}"})


def admin(to: Gateway, method: str, path: str, content: dict[str, Any] | None = None) -> raw.Answer:
    return to.admin(path, method, ADMIN, content)


def create(to: Gateway, name: str, **more: Any) -> str:
    made = admin(to, "POST", "/admin/keys", {"name": name, **more})
    assert made.status == 201, made.body
    secret: str = made.json()["key"]
    return secret


def everywhere(pair: tuple[Gateway, Gateway], secret: str, status: int) -> bool:
    """Asked often enough to meet both workers."""
    return all(ask(to, secret).status == status for to in pair for _ in range(6))


def penstock(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment(PENSTOCK_ADMIN_KEY="the-operator"))


def test_a_key_is_shown_once_and_good_everywhere_until_it_is_revoked(pair: tuple[Gateway, Gateway], store: Server) -> None:
    secret = create(pair[0], "alice", rpm=6000, models=["deepseek-v3"], metadata={"team": "blue"})
    assert secret.startswith("sk-penstock-")
    until("both know it", lambda: everywhere(pair, secret, 200), 5)
    listed = {row["name"]: row for row in admin(pair[1], "GET", "/admin/keys").json()["keys"]}
    assert listed["alice"]["metadata"] == {"team": "blue"}
    assert listed["alice"]["origin"] == "stored"
    assert listed["in-file"]["origin"] == "file"
    for where in (admin(pair[1], "GET", "/admin/keys").body, b"".join(store.client().hvals("penstock:{default}:keys"))):
        assert secret.encode() not in where
    assert ask(pair[0], secret).headers["x-ratelimit-limit-requests"] == "6000"
    assert admin(pair[1], "DELETE", "/admin/keys/alice").json() == {"revoked": "alice"}
    revoked = time.monotonic()
    while time.monotonic() - revoked < REVOKED_WITHIN_S and not everywhere(pair, secret, 401):
        time.sleep(0.05)
    assert everywhere(pair, secret, 401)
    assert ask(pair[0], secret).body == ask(pair[0], "sk-never-was").body


def test_a_rotated_key_works_on_for_as_long_as_it_is_said(pair: tuple[Gateway, Gateway]) -> None:
    old = create(pair[0], "bob")
    new = admin(pair[0], "POST", "/admin/keys/bob/rotate", {"overlap_s": 600}).json()["key"]
    until("both work", lambda: everywhere(pair, new, 200) and everywhere(pair, old, 200), 5)
    newest = admin(pair[0], "POST", "/admin/keys/bob/rotate", {"overlap_s": 0}).json()["key"]
    until(
        "the last one alone works", lambda: everywhere(pair, newest, 200) and everywhere(pair, new, 401) and everywhere(pair, old, 401), 5
    )


def test_a_key_ends_by_itself(pair: tuple[Gateway, Gateway]) -> None:
    secret = create(pair[0], "carol", expires=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 4)))
    until("it works", lambda: ask(pair[1], secret).status == 200, 3)
    until("it has expired", lambda: everywhere(pair, secret, 401), 8)


def test_what_cannot_be_made_is_refused_with_its_reason(pair: tuple[Gateway, Gateway]) -> None:
    create(pair[0], "dave")
    for content, status, words in (
        ({"name": "dave"}, 409, "There is a key 'dave' already"),
        ({"name": "in-file"}, 409, "There is a key 'in-file' already"),
        ({"name": "x", "rpm": 0}, 400, "rpm: 0 is out of range; accepted: above 0"),
        ({"name": "x", "rmp": 5}, 400, "rmp: unknown key; did you mean 'rpm'?"),
        ({"name": "x", "models": ["nope"]}, 400, "no model is called 'nope'"),
        ({"name": "x", "hash": "sha256:" + "0" * 64}, 400, "'hash' is the gateway's to set"),
        ({"name": "x" * 65}, 400, "beginning with a letter or digit"),
        ({}, 400, "name"),
    ):
        refused = admin(pair[0], "POST", "/admin/keys", content)
        assert refused.status == status, content
        assert words in refused.error()["message"]
    assert admin(pair[0], "DELETE", "/admin/keys/nobody").status == 404
    assert admin(pair[0], "DELETE", "/admin/keys/in-file").error()["code"] == "key_in_file"
    assert admin(pair[0], "POST", "/admin/keys/nobody/rotate", {}).status == 404
    assert admin(pair[0], "POST", "/admin/keys/dave/rotate", {"overlap_s": -1}).status == 400
    with_key = {"authorization": "Bearer in-file"}
    assert raw.call(pair[0].port, "GET", "/admin/keys", headers=with_key).status == 404, "not on the public listener"
    assert pair[0].admin("/admin/keys").status == 401


def test_the_command_does_the_same(pair: tuple[Gateway, Gateway]) -> None:
    where = ["--admin", pair[0].admin_url]
    made = penstock("keys", "create", "erin", "--rpm", "600", "--set", 'metadata={"team":"red"}', *where)
    assert made.returncode == 0, made.stderr
    secret = made.stdout.strip()
    assert "shown once" in made.stderr
    until("it works", lambda: ask(pair[1], secret).status == 200, 5)
    listed = penstock("keys", "list", *where)
    row = next(line for line in listed.stdout.splitlines() if line.startswith("erin "))
    assert "rpm=600" in row
    assert '"team":"red"' in row
    assert secret not in listed.stdout
    rotated = penstock("keys", "rotate", "erin", "--overlap", "0", *where).stdout.strip()
    assert rotated.startswith("sk-penstock-")
    usage = penstock("usage", "--by", "key", *where).stdout
    assert any(line.split()[:1] == ["erin"] for line in usage.splitlines())
    assert penstock("keys", "revoke", "erin", *where).returncode == 0
    refused = penstock("keys", "revoke", "erin", *where)
    assert (refused.returncode, refused.stderr) == (1, "penstock: There is no key 'erin'.\n")
    nobody = penstock("keys", "list", "--admin", "http://127.0.0.1:1")
    assert (nobody.returncode, nobody.stdout) == (1, "")
    assert "no gateway answers at http://127.0.0.1:1" in nobody.stderr


def test_what_happened_to_a_request_is_known_at_every_gateway(pair: tuple[Gateway, Gateway], store: Server) -> None:
    headers = {"authorization": "Bearer in-file", "x-request-id": "asked-at-one"}
    answer = raw.call(pair[0].port, "POST", CHAT, raw.chat("a prompt that stays here"), headers)
    name = answer.json()["id"]
    until("the other knows", lambda: pair[1].admin(f"/admin/requests/{name}", headers=ADMIN).status == 200, 5)
    here, there = (to.admin("/admin/requests/asked-at-one", headers=ADMIN).json() for to in pair)
    assert here["id"] == there["id"] == name
    assert here["phases_ms"] == there["phases_ms"]
    assert b"a prompt that stays here" not in b"".join(store.client().hvals("penstock:{default}:requests:records"))
    assert pair[1].admin("/admin/requests/nobody", headers=ADMIN).status == 404


def test_without_redis_keys_stand_in_the_file(wired: Gateway) -> None:
    assert wired.admin("/admin/keys").json() == {"keys": []}
    refused = wired.admin("/admin/keys", "POST")
    assert (refused.status, refused.error()["code"]) == (409, "no_store")


def test_stored_keys_go_on_working_when_redis_is_gone(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with redis.server(tmp_path / "redis") as store:
        config = {**scripted_sglang.backend(), "redis": {"url": store.url}, "admin": {"key_hash": hashed("the-operator")}}
        with gateway(tmp_path, config) as running:
            running.wait_ready()
            assert ask(running, "none").status == 401, "with Redis keys are required, also before the first is made"
            secret = create(running, "frank")
            until("it works", lambda: ask(running, secret).status == 200, 5)
            store.kill()
            assert ask(running, secret).status == 200
            refused = admin(running, "GET", "/admin/keys")
            assert (refused.status, refused.error()["code"]) == (503, "store_unavailable")
            assert ask(running, secret).status == 200


@contextlib.contextmanager
def alone(engine: Rehearsal, store: Server, folder: Path, **env: str) -> Iterator[Gateway]:
    """A gateway with a Redis of its own, which a test may do anything to."""
    config = {**engine.backend(), "redis": {"url": store.url}, "admin": {"key_hash": hashed("the-operator")}}
    with gateway(folder, config, (), "", **env) as running:
        running.wait_ready()
        yield running


def metric(of: Gateway, name: str) -> float:
    lines = admin(of, "GET", "/metrics").body.decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def write(store: Server, name: str, content: bytes) -> None:
    """As somebody else would: another version, a script, a hand."""
    store.client().hset("penstock:{default}:keys", name, content)
    store.client().incr("penstock:{default}:keys:version")


def test_a_stored_key_that_cannot_be_read_stops_nobody_else(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with redis.server(tmp_path / "redis") as store:
        with alone(scripted_sglang, store, tmp_path / "1") as running:
            refused = admin(running, "POST", "/admin/keys", {"name": "x", "expires": "0001-01-01"})
            assert refused.status == 400
            assert "expires: '0001-01-01' is before the year 1970" in refused.error()["message"]
            before = create(running, "before")
            until("it works", lambda: ask(running, before).status == 200, 5)
            for name, content in (
                ("odd", b'{"name": "odd", "hash": "%s", "expires": "0001-01-01"}' % hashed("odd").encode()),
                ("later", b'{"name": "later", "hash": "%s", "field_of_a_later_version": 1}' % hashed("later").encode()),
                ("nothing", b"\xff\x00"),
            ):
                write(store, name, content)
            after = create(running, "after")
            until("a key made later works", lambda: ask(running, after).status == 200, 5)
            assert admin(running, "DELETE", "/admin/keys/before").status == 200
            until("a key revoked later does not", lambda: ask(running, before).status == 401, 5)
            assert ask(running, "odd").status == 401
            listed = {row["name"]: row for row in admin(running, "GET", "/admin/keys").json()["keys"]}
            assert set(listed) == {"after", "odd", "later", "nothing"}
            assert listed["odd"]["problem"].startswith("expires: '0001-01-01'")
            assert "field_of_a_later_version" in listed["later"]["problem"]
            until("it is counted", lambda: metric(running, 'penstock_stored_keys{state="unreadable"}') == 3, 5)
            assert metric(running, 'penstock_stored_keys{state="usable"}') == 1
            assert running.output().count("the stored key 'odd' cannot be used: expires: '0001-01-01'") == 1, "one line, of one process"
            refused = admin(running, "POST", "/admin/keys/odd/rotate", {})
            assert (refused.status, refused.error()["code"]) == (409, "unusable_key")
        with alone(scripted_sglang, store, tmp_path / "2") as again:
            assert ask(again, after).status == 200, "a gateway that starts with it serves"
            for name in ("odd", "later", "nothing"):
                assert admin(again, "DELETE", f"/admin/keys/{name}").json() == {"revoked": name}
            assert [row["name"] for row in admin(again, "GET", "/admin/keys").json()["keys"]] == ["after"]


def hang(store: Server) -> Callable[[], None]:
    assert store.process is not None
    store.process.send_signal(signal.SIGSTOP)
    return partial(store.process.send_signal, signal.SIGCONT)


def go_away(store: Server) -> Callable[[], None]:
    store.kill()
    return store.start


def speak_rubbish(store: Server) -> Callable[[], None]:
    client, version = store.client(), "penstock:{default}:keys:version"
    client.rename(version, "kept")
    client.set(version, "rubbish")
    return lambda: client.rename("kept", version)


def be_another_type(store: Server) -> Callable[[], None]:
    client, version = store.client(), "penstock:{default}:keys:version"
    client.rename(version, "kept")
    client.lpush(version, "rubbish")
    return lambda: client.rename("kept", version)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [hang, go_away, speak_rubbish, be_another_type])
def test_what_revocation_promises_holds_after_a_sync_that_could_not(
    scripted_sglang: Rehearsal, tmp_path: Path, fault: Callable[[Server], Callable[[], None]]
) -> None:
    """A list that is old is said to be, everywhere an operator looks; and as soon as it can be read, it is."""
    with redis.server(tmp_path / "redis", durable=True) as store, alone(scripted_sglang, store, tmp_path) as running:
        secret = create(running, "alice")
        until("it works", lambda: ask(running, secret).status == 200, 5)
        ready = raw.call(running.port, "GET", "/readyz").json()
        assert ready == {"status": "ready"}
        assert metric(running, "penstock_key_list_age_seconds") < 10
        mend = fault(store)
        store_is_there = fault in (speak_rubbish, be_another_type)
        if store_is_there:  # the key is revoked, and nobody can hear of it
            store.client().hdel("penstock:{default}:keys", "alice")
        until("it is said", lambda: "detail" in raw.call(running.port, "GET", "/readyz").json(), 20, every_s=0.2)
        ready = raw.call(running.port, "GET", "/readyz")
        assert ready.status == 200, "whoever is known is served"
        assert re.fullmatch(r"the list of stored keys is 1\d s old: a key revoked since then still works", ready.json()["detail"])
        assert metric(running, "penstock_key_list_age_seconds") > 10
        until("and in the log, once", lambda: running.output().count("the stored keys were last read 1") == 1, 5)
        assert ask(running, secret).status == 200
        mend()
        if not store_is_there:
            until("it can be revoked", lambda: admin(running, "DELETE", "/admin/keys/alice").status == 200, 10)
        else:
            store.client().incr("penstock:{default}:keys:version")
        until("it is", lambda: ask(running, secret).status == 401, 10)
        assert raw.call(running.port, "GET", "/readyz").json() == {"status": "ready"}
        until("and said", lambda: running.output().count("the stored keys are read again") == 1, 5)
