"""The admin API: what it shows, who may use it, and that it is nowhere else."""

from __future__ import annotations

import contextlib
import json
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from gateway.access.keys import hashed
from gateway.admin.api import MAX_BODY
from tests.support import raw, redis
from tests.support.otlp import collector
from tests.support.processes import Gateway, Rehearsal, environment, gateway, until
from tests.wire.test_command import penstock

CHAT = "/v1/chat/completions"
FOO = {"authorization": "Bearer foo"}
BAR = {"authorization": "Bearer bar"}
HASHES = {  # of `foo` and `bar`
    "key_hash": "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae",
    "metrics_key_hash": "sha256:fcde2b2edba56bf408601fb721fe9b5c338d10ee429ea04fae5511b68fbf8fb9",
}


@pytest.fixture(scope="module")
def guarded(scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("guarded"), {**scripted_sglang.backend(), "admin": HASHES, "listen": {"workers": 2}}) as running:
        running.wait_ready()
        yield running


def test_one_scrape_is_the_whole_gateway(guarded: Gateway) -> None:
    for _ in range(20):
        assert raw.call(guarded.port, "POST", CHAT, raw.chat("hi")).status == 200
    assert raw.call(guarded.port, "POST", CHAT, raw.chat("[[tokens 3]]", stream=True)).status == 200
    assert raw.call(guarded.port, "POST", CHAT, raw.chat("[[refuse 503]]")).status == 503
    assert raw.call(guarded.port, "GET", "/nope/1").status == 404
    assert raw.call(guarded.port, "POST", CHAT, {**raw.chat("x"), "model": "nope"}).status == 404
    lines = guarded.admin("/metrics", headers=BAR).body.decode().splitlines()
    route, model = f'route="{CHAT}"', 'model="deepseek-v3"'
    assert f'penstock_requests_total{{{route},{model},status="200",outcome="ok"}} 21' in lines
    assert f'penstock_requests_total{{{route},{model},status="503",outcome="overloaded"}} 1' in lines
    assert 'penstock_requests_total{route="",model="",status="404",outcome="refused"} 1' in lines, "a path nobody knows is no label"
    assert f'penstock_requests_total{{{route},model="",status="404",outcome="refused"}} 1' in lines
    operation = 'gen_ai_operation_name="chat",gen_ai_request_model="deepseek-v3"'
    assert f'gen_ai_server_request_duration_seconds_bucket{{{operation},le="+Inf"}} 22' in lines
    assert f"gen_ai_server_time_to_first_token_seconds_count{{{operation}}} 1" in lines
    assert 'penstock_tokens_total{model="deepseek-v3",kind="completion"} 163' in lines
    assert any(line.startswith("penstock_attempts_total{target=") and 'result="ok"' in line and line.endswith(" 21") for line in lines)
    assert any('result="busy"' in line for line in lines)
    assert 'penstock_workers{generation="1"} 2' in lines
    assert "penstock_open_requests 0" in lines


def test_a_request_is_explained_on_one_screen(guarded: Gateway) -> None:
    asked = raw.call(
        guarded.port, "POST", CHAT, raw.chat("[[tokens 5]] a prompt that stays here", stream=True), {"x-request-id": "my-own-id"}
    )
    public_id = json.loads(asked.body.split(b"\n")[0][6:])["id"]
    by_ours = guarded.admin(f"/admin/requests/{public_id}", headers=FOO)
    found = by_ours.json()
    assert found == guarded.admin("/admin/requests/my-own-id", headers=FOO).json(), "found by either id"
    assert (found["status"], found["outcome"], found["completion_tokens"], found["finish_reasons"]) == (200, "ok", 5, ["stop"])
    assert found["trace_id"] == asked.headers["x-trace-id"]
    assert sum(found["phases_ms"].values()) == pytest.approx(found["ms"], abs=0.1)
    (attempt,) = found["attempts"]
    assert attempt["result"] == "ok"
    assert [host for host, why in attempt["considered"] if "picked" in why] == [attempt["host"]]
    assert "a prompt that stays here" not in by_ours.body.decode()
    shown = guarded.admin(f"/admin/requests/{public_id}?format=text", headers=FOO).body.decode()
    assert len(shown.splitlines()) < 30
    for words in (public_id, "engine: queue and prefill", "attempt 1", "12 prompt and 5 completion tokens, ended by stop"):
        assert words in shown
    unknown = guarded.admin("/admin/requests/chatcmpl-nobody", headers=FOO)
    assert (unknown.status, unknown.error()["code"]) == (404, "unknown_request")
    done = penstock("explain", "my-own-id", "--admin", guarded.admin_url, folder=guarded.log.parent, PENSTOCK_ADMIN_KEY="foo")
    assert done.returncode == 0, done.stderr
    assert public_id in done.stdout


def test_where_time_went_and_how_hosts_are_is_in_the_metrics(guarded: Gateway, scripted_sglang: Rehearsal) -> None:
    raw.call(guarded.port, "POST", CHAT, raw.chat("[[tokens 20]] [[pace 0.01]]", stream=True))
    host = scripted_sglang.url.removeprefix("http://")
    place = f'backend="dsv3",host="{host}"'

    def lines() -> list[str]:
        return guarded.admin("/metrics", headers=FOO).body.decode().splitlines()

    until("the host was asked", lambda: f"penstock_engine_max_running_requests{{{place}}} 100000" in lines(), 20, 0.2)
    assert f'penstock_host_state{{{place},state="ok"}} 1' in lines()
    assert f"penstock_host_in_flight{{{place}}} 0" in lines()
    assert 'penstock_queue_waiting{backend="dsv3"} 0' in lines()
    for name in (
        "penstock_open_files",
        "penstock_loop_lag_seconds",
        "gen_ai_server_time_per_output_token_seconds_count",
        "penstock_largest_gap_seconds_count",
    ):
        until(name, lambda name=name: any(line.startswith(name) for line in lines()), 5)  # type: ignore[misc]
    spent = {
        phase: next(float(line.rsplit(" ", 1)[1]) for line in lines() if line.startswith(f'penstock_phase_seconds_sum{{phase="{phase}"'))
        for phase in ("queue", "connect", "first_token", "generate", "client")
    }
    assert spent["generate"] >= 0.2


def test_openmetrics_is_whole_and_has_traces_as_examples(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with collector() as sink, gateway(tmp_path, {**scripted_sglang.backend(), "tracing": {"otlp_endpoint": sink.endpoint}}) as running:
        running.wait_ready()
        trace = raw.call(running.port, "POST", CHAT, raw.chat("hi")).headers["x-trace-id"]
        accept = {"accept": "application/openmetrics-text; version=1.0.0"}
        answer = running.admin("/metrics", headers=accept)
        assert answer.headers["content-type"].startswith("application/openmetrics-text")
        text = answer.body.decode()
        assert text.endswith("# EOF\n")
        assert "# TYPE penstock_requests counter" in text
        assert f'# {{trace_id="{trace}"}}' in text
        families: list[Any] = list(text_string_to_metric_families(text))  # type: ignore[no-untyped-call]
        assert {family.name for family in families} >= {
            "penstock_requests",
            "gen_ai_server_request_duration_seconds",
            "penstock_phase_seconds",
        }
        example = next(sample.exemplar for family in families for sample in family.samples if sample.exemplar)
        assert example.labels == {"trace_id": trace}


def test_no_client_can_make_a_series(guarded: Gateway) -> None:
    for number in range(30):
        raw.call(guarded.port, "POST", CHAT, {**raw.chat("x", user=f"evil-{number}"), "model": f"evil-{number}"})
        raw.call(guarded.port, "GET", f"/evil-{number}")
    assert "evil-" not in guarded.admin("/metrics", headers=FOO).body.decode()


def test_buckets_are_cumulative_and_typed(guarded: Gateway) -> None:
    raw.call(guarded.port, "POST", CHAT, raw.chat("hi"))
    text = guarded.admin("/metrics", headers=FOO)
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = text.body.decode().splitlines()
    assert "# TYPE gen_ai_server_request_duration_seconds histogram" in lines
    counts = [int(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("gen_ai_server_request_duration_seconds_bucket")]
    assert counts == sorted(counts)
    assert counts[-1] > 0


@pytest.mark.parametrize(
    ("method", "path", "headers", "expected"),
    [
        ("GET", "/metrics", {}, 401),
        ("GET", "/metrics", BAR, 200),
        ("GET", "/metrics", FOO, 200),
        ("GET", "/admin/workers", BAR, 401),
        ("POST", "/admin/reload", BAR, 401),
        ("POST", "/admin/reload", {}, 401),
        ("GET", "/admin/workers", FOO, 200),
        ("GET", "/admin/config", FOO, 200),
        ("DELETE", "/admin/workers", FOO, 405),
        ("GET", "/admin/nope", FOO, 404),
        ("GET", "/admin/nope", {}, 401),
        ("GET", "/livez", {}, 200),
        ("GET", "/readyz", {}, 200),
    ],
)
def test_who_may_pass(guarded: Gateway, method: str, path: str, headers: dict[str, str], expected: int) -> None:
    answer = guarded.admin(path, method, headers=headers)
    assert answer.status == expected
    assert answer.headers["x-request-id"]
    if expected >= 400:
        answer.error()


def made_key(running: Gateway) -> dict[str, str]:
    return {"authorization": f"Bearer {running.admin_key()}"}


def ask(running: Gateway, method: str, path: str, headers: dict[str, str] | None = None) -> raw.Answer:
    """With these headers and no key."""
    return raw.call(running.admin_port, method, path, headers={"content-type": "", **(headers or {})})


def test_there_is_always_a_key_and_it_is_asked_for(wired: Gateway) -> None:
    tried: list[tuple[str, str, dict[str, str]]] = [
        ("GET", "/admin/workers", {}),
        ("GET", "/admin/config", {}),
        ("POST", "/admin/reload", {}),
        ("DELETE", "/admin/keys/x", {}),
        ("GET", "/admin/workers", {"authorization": "Bearer sk-penstock-guess"}),
        ("GET", "/admin/workers", {"authorization": f"Basic {wired.admin_key()}"}),
    ]
    for method, path, headers in tried:
        answer = ask(wired, method, path, {"content-type": "application/json", **headers})
        assert (answer.status, answer.error()["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert ask(wired, "GET", "/admin/workers", made_key(wired)).status == 200


def test_the_key_is_made_once_kept_for_us_alone_and_said(tmp_path: Path, scripted_sglang: Rehearsal) -> None:
    """By several gateways at once with one home, too."""
    home = tmp_path / "home"
    with contextlib.ExitStack() as stack:
        three = [
            stack.enter_context(gateway(tmp_path / str(number), scripted_sglang.backend(), PENSTOCK_HOME=str(home))) for number in range(3)
        ]
        for running in three:
            running.wait_ready()
            assert ask(running, "GET", "/admin/workers", made_key(three[0])).status == 200
            assert f"the admin key is in {home}/state/admin.key" in running.output()
            assert running.admin_key() not in running.output()
    file = home / "state" / "admin.key"
    assert (stat.S_IMODE(file.stat().st_mode), stat.S_IMODE(file.parent.stat().st_mode)) == (0o600, 0o700)
    assert [path.name for path in file.parent.glob("admin.*")] == ["admin.key"]
    before = file.read_text()
    with gateway(tmp_path / "again", scripted_sglang.backend(), PENSTOCK_HOME=str(home)) as again:
        again.wait_ready()
        assert again.admin_key() == before.strip() == three[0].admin_key()
        file.unlink()
        assert again.admin("/admin/workers", headers={"authorization": f"Bearer {before.strip()}"}).status == 200
        assert again.admin("/admin/reload", "POST", {"authorization": f"Bearer {before.strip()}"}).status == 200
        assert again.admin("/admin/workers", headers={"authorization": f"Bearer {before.strip()}"}).status == 401, "deleted and reloaded"
        assert again.admin("/admin/workers").status == 200
        assert file.read_text() != before


def test_a_key_that_cannot_be_kept_stops_nobody_but_the_operator(tmp_path: Path, scripted_sglang: Rehearsal) -> None:
    home = tmp_path / "home"
    (home / "state").mkdir(parents=True)
    (home / "state" / "admin.key").write_text("short\n")
    with gateway(tmp_path / "run", scripted_sglang.backend(), PENSTOCK_HOME=str(home)) as running:
        running.wait_ready()
        assert raw.call(running.port, "POST", CHAT, raw.chat("hi")).status == 200
        refused = ask(running, "GET", "/admin/workers", {"authorization": "Bearer short"})
        assert (refused.status, refused.error()["code"]) == (503, "no_admin_key")
        assert f"{home}/state/admin.key holds no key: delete it" in running.output()
        assert ask(running, "GET", "/metrics").status == 200
        (home / "state" / "admin.key").unlink()
        assert ask(running, "GET", "/admin/workers", {"authorization": "Bearer short"}).status == 401
        assert running.admin("/admin/workers").status == 200, "mended without a restart"


@pytest.mark.parametrize("whose", ["wired", "guarded"])
def test_a_page_of_another_origin_is_refused_whatever_it_carries(whose: str, request: pytest.FixtureRequest) -> None:
    running: Gateway = request.getfixturevalue(whose)
    key = FOO if whose == "guarded" else made_key(running)
    for page in (
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:3000", "sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site"},
    ):
        for method, path in (
            ("GET", "/metrics"), ("GET", "/livez"), ("GET", "/admin/workers"), ("POST", "/admin/reload"), ("OPTIONS", "/admin/reload"),
        ):  # fmt: skip
            answer = ask(running, method, path, {"content-type": "application/json", **page, **key})
            assert (answer.status, answer.error()["code"]) == (403, "cross_site")
            assert not [name for name in answer.headers if name.startswith("access-control")]
    ours = {"host": f"localhost:{running.admin_port}", "origin": f"http://localhost:{running.admin_port}", "sec-fetch-site": "same-origin"}
    assert ask(running, "GET", "/admin/workers", {**ours, **key}).status == 200
    assert ask(running, "GET", "/admin/workers", {"sec-fetch-site": "none", **key}).status == 200


def test_what_changes_something_must_say_that_it_is_json(wired: Gateway) -> None:
    key = made_key(wired)
    for kind in ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonp",
                 "text/plain; application/json"):  # fmt: skip
        for method, path in (("POST", "/admin/reload"), ("POST", "/admin/keys"), ("DELETE", "/admin/keys/x"), ("PUT", "/admin/hosts")):
            answer = ask(wired, method, path, {"content-type": kind, **key})
            assert (answer.status, answer.error()["code"]) == (415, "unsupported_media_type")
    for kind in ("application/json", "Application/JSON; charset=utf-8"):
        assert ask(wired, "POST", "/admin/hosts/nope:1/drain", {"content-type": kind, **key}).status == 404


def test_what_the_operator_sends_is_bounded_too(wired: Gateway) -> None:
    for size, status in ((MAX_BODY, 404), (MAX_BODY + 1, 413)):
        answer = wired.admin("/admin/hosts/nope:1/drain", "POST", content={"x": "y" * (size - 9)})
        assert answer.status == status
    assert answer.error()["message"] == "The request body is larger than the limit of 64 kB."


def test_what_is_read_without_a_key_is_read_under_our_own_name(wired: Gateway) -> None:
    """`/metrics` on loopback: a name that was made to point here (DNS rebinding) is not ours."""
    strangers = ("evil.example", "evil.example:9464", "127.0.0.1.evil.example", "", "[127.0.0.1]:9464", "localhost.", "0x7f000001")
    for host in strangers:
        answer = ask(wired, "GET", "/metrics", {"host": host})
        assert (answer.status, answer.error()["code"]) == (403, "unknown_host"), host
    for host in ("localhost:9464", "localhost:1", "LOCALHOST", "127.0.0.1", "127.0.0.9:80", "[::1]:9464"):
        assert ask(wired, "GET", "/metrics", {"host": host}).status == 200, host
    assert ask(wired, "GET", "/admin/workers", {"host": "gateway.example", **made_key(wired)}).status == 200, "who has the key is no page"
    assert ask(wired, "POST", "/metrics", {"content-type": "application/json"}).status == 401


def test_beyond_loopback_everything_wants_a_key(tmp_path: Path, scripted_sglang: Rehearsal) -> None:
    with gateway(tmp_path, scripted_sglang.backend(), PENSTOCK__LISTEN__ADMIN="0.0.0.0:0") as running:
        running.wait_ready()
        assert ask(running, "GET", "/metrics").status == 401
        assert ask(running, "GET", "/admin/workers").status == 401
        assert ask(running, "GET", "/livez").status == 200
        assert ask(running, "GET", "/metrics", made_key(running)).status == 200


def test_a_key_for_metrics_alone_closes_them_to_others(tmp_path: Path, scripted_sglang: Rehearsal) -> None:
    admin = {"metrics_key_hash": HASHES["metrics_key_hash"]}
    with gateway(tmp_path, {**scripted_sglang.backend(), "admin": admin}) as running:
        running.wait_ready()
        assert ask(running, "GET", "/metrics").status == 401
        assert ask(running, "GET", "/metrics", BAR).status == 200
        assert ask(running, "GET", "/metrics", made_key(running)).status == 200
        assert ask(running, "GET", "/admin/workers", BAR).status == 401


OPERATORS = {"ann": "all", "kim": "keys", "rob": "read"}


@pytest.fixture(scope="module")
def staffed(scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway of several operators, in a home of its own."""
    keys = [{"name": name, "hash": hashed(f"the key of {name}"), "role": role} for name, role in OPERATORS.items()]
    folder = tmp_path_factory.mktemp("staffed")
    with gateway(folder / "run", {**scripted_sglang.backend(), "admin": {"keys": keys}}, PENSTOCK_HOME=str(folder)) as running:
        running.wait_ready()
        yield running


def of(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer the key of {name}", "content-type": "application/json"}


@pytest.mark.parametrize(
    ("method", "path", "may"),
    [
        ("GET", "/admin/hosts", "ann kim rob"),
        ("GET", "/metrics", "ann kim rob"),
        ("GET", "/admin/audit", "ann kim rob"),
        ("POST", "/admin/keys", "ann kim"),
        ("DELETE", "/admin/keys/x", "ann kim"),
        ("POST", "/admin/keys/x/rotate", "ann kim"),
        ("POST", "/admin/hosts/nope:1/drain", "ann"),
        ("PUT", "/admin/hosts", "ann"),
    ],
)
def test_an_operators_role_says_what_the_key_may(staffed: Gateway, method: str, path: str, may: str) -> None:
    for name in OPERATORS:
        answer = ask(staffed, method, path, of(name))
        refused = answer.status == 403 and answer.error()["code"] == "insufficient_role"
        assert refused is (name not in may.split()), (name, answer.body)
    assert ask(staffed, method, path, {"content-type": "application/json"}).status == 401
    assert ask(staffed, method, path, {"content-type": "application/json", **made_key(staffed)}).status != 403, "the machine's own may all"


def test_who_changed_what_is_kept(staffed: Gateway, scripted_sglang: Rehearsal) -> None:
    host = scripted_sglang.url.removeprefix("http://")
    assert ask(staffed, "POST", f"/admin/hosts/{host}/drain", {**of("ann"), "x-request-id": "draining"}).status == 200
    assert ask(staffed, "POST", f"/admin/hosts/{host}/undrain", of("rob")).status == 403
    assert ask(staffed, "POST", f"/admin/hosts/{host}/undrain", made_key(staffed) | {"content-type": "application/json"}).status == 200
    file = staffed.log.parent / "penstock.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "admission": {"max_queue": 7}}))
    assert ask(staffed, "POST", "/admin/reload", of("ann")).status == 200
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "lisen": 1}))
    assert ask(staffed, "POST", "/admin/reload", of("ann")).status == 400
    refused, reloaded, undrained, drained = ask(staffed, "GET", "/admin/audit?last=4", of("rob")).json()["audit"]
    assert (drained["who"], drained["client"], drained["request_id"], drained["status"]) == ("ann", "127.0.0.1", "draining", 200)
    assert drained["what"] == f"POST /admin/hosts/{host}/drain"
    assert (drained["before"], drained["after"]) == ({"state": "ok"}, {"state": "drained"})
    assert (undrained["who"], undrained["after"]) == ("local", {"state": "ok"})
    assert (reloaded["before"], reloaded["after"]) == ({"admission.max_queue": 1000}, {"admission.max_queue": 7})
    assert (refused["who"], refused["status"], refused["before"], refused["after"]) == ("ann", 400, {}, {})
    kept = staffed.log.parent.parent / "state" / "audit.jsonl"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert json.loads(kept.read_text().splitlines()[-1])["what"] == "POST /admin/reload"
    assert f"POST /admin/hosts/{host}/undrain by rob from 127.0.0.1: 403" in staffed.output()
    shown = penstock("audit", "--last", "4", "--admin", staffed.admin_url, folder=file.parent, PENSTOCK_ADMIN_KEY="the key of rob")
    assert shown.returncode == 0, shown.stderr
    assert any(line.split()[1:3] == ["ann", "127.0.0.1"] and '{"state":"drained"}' in line for line in shown.stdout.splitlines())
    for last in ("0", "1001", "x", "-1"):
        assert ask(staffed, "GET", f"/admin/audit?last={last}", of("rob")).status == 400


def test_keys_are_in_the_audit_and_their_secrets_are_not(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with redis.server(tmp_path / "redis") as store, gateway(
        tmp_path / "run", {**scripted_sglang.backend(), "redis": {"url": store.url}}, PENSTOCK_HOME=str(tmp_path)
    ) as running:  # fmt: skip
        running.wait_ready()
        secret = running.admin("/admin/keys", "POST", content={"name": "carl", "rpm": 60}).json()["key"]
        running.admin("/admin/keys/carl/rotate", "POST", content={"overlap_s": 60})
        running.admin("/admin/keys/carl", "DELETE")
        revoked, rotated, made = running.admin("/admin/audit").json()["audit"]
        assert (made.get("before"), made["after"]["name"], made["after"]["rpm"]) == (None, "carl", 60)
        assert list(rotated["after"]) == ["old_until"]
        assert (revoked["before"]["name"], revoked.get("after")) == ("carl", None)
        text = (tmp_path / "state" / "audit.jsonl").read_text()
        assert secret not in text
        assert hashed(secret).removeprefix("sha256:") not in text


def test_the_public_listener_has_no_admin_api(wired: Gateway) -> None:
    for path in ("/metrics", "/admin/workers", "/admin/config"):
        assert raw.call(wired.port, "GET", path).status == 404
    assert raw.call(wired.port, "POST", "/admin/reload").status == 404


def test_the_configuration_is_shown_with_origins_and_without_secrets(guarded: Gateway) -> None:
    answer = guarded.admin("/admin/config", headers=FOO)
    rows = {row["key"]: row for row in answer.json()["values"]}
    assert rows["admin.key_hash"]["value"] == "********"
    assert rows["listen.workers"]["value"] == 2
    assert rows["listen.workers"]["origin"].startswith("file ")
    assert HASHES["key_hash"][7:] not in answer.body.decode()


def test_every_use_is_logged(wired: Gateway) -> None:
    wired.admin("/admin/workers", headers={"user-agent": "op"})
    until("it is", lambda: any(
        json.loads(line).get("audit") and "GET /admin/workers by local from 127.0.0.1: 200" in line
        for line in wired.output().splitlines() if line.startswith("{")
    ))  # fmt: skip


def test_no_flood_hides_what_an_operator_changed(staffed: Gateway) -> None:
    for _ in range(30):
        assert ask(staffed, "POST", "/admin/hosts/flood:1/drain").status == 401
        assert ask(staffed, "GET", "/admin/config", of("rob")).status == 200
    for _ in range(30):
        assert ask(staffed, "POST", "/admin/hosts/nope:1/undrain", of("ann")).status == 404
    until("every one is logged", lambda: staffed.output().count("POST /admin/hosts/nope:1/undrain by ann from 127.0.0.1: 404") == 30)
    assert staffed.output().count("POST /admin/hosts/flood:1/drain by nobody") < 30
    assert (
        len([row for row in ask(staffed, "GET", "/admin/audit?last=1000", of("rob")).json()["audit"] if "nope:1/undrain" in row["what"]])
        == 30
    )


def test_an_address_that_is_none_is_refused(tmp_path: Path) -> None:
    done = penstock("check", folder=tmp_path, PENSTOCK__LISTEN__ADMIN="here")
    assert done.returncode == 2
    assert "listen.admin: 'here' is no HOST:PORT; accepted: HOST:PORT, or off" in done.stderr


def test_a_command_finds_the_key_by_itself(tmp_path: Path, scripted_sglang: Rehearsal) -> None:
    home = tmp_path / "home"
    with gateway(tmp_path / "run", scripted_sglang.backend(), PENSTOCK_HOME=str(home)) as running:
        running.wait_ready()
        raw.call(running.port, "POST", CHAT, raw.chat("hi"), {"x-request-id": "mine"})

        def explain(*more: str, **env: str) -> Any:
            return penstock("explain", "mine", *more, folder=tmp_path, **{"PENSTOCK_HOME": str(home), **env})

        where = ("--admin", running.admin_url)
        configured = {"PENSTOCK__LISTEN__ADMIN": running.admin_url.removeprefix("http://")}
        assert "attempt 1" in explain(*where).stdout
        assert "attempt 1" in explain(**configured).stdout, "at the configuration's address"
        assert "attempt 1" in explain(*where, http_proxy="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9").stdout, "through no proxy"
        wrong = explain(*where, PENSTOCK_ADMIN_KEY="sk-penstock-wrong")
        assert (wrong.returncode, wrong.stdout) == (1, "")
        assert f"the admin key in PENSTOCK_ADMIN_KEY is not that of the gateway at {running.admin_url}" in wrong.stderr
        nowhere = explain(*where, PENSTOCK_HOME=str(tmp_path / "elsewhere"))
        assert (
            f"wants its admin key: it is not in {tmp_path}/elsewhere/state/admin.key (PENSTOCK_HOME says where to look)" in nowhere.stderr
        )


@contextlib.contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler], tuple[int, dict[str, str], bytes]]) -> Iterator[int]:
    """Something else where a gateway's admin API is thought to be; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, content = answer(self)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def test_the_key_of_this_machine_goes_to_no_other(tmp_path: Path) -> None:
    """Nor where a redirect points."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "admin.key").write_text("sk-penstock-of-this-machine\n")
    (tmp_path / "hosts").write_text("127.0.0.1 gateway.example\n")
    seen: list[tuple[str, str | None]] = []

    def redirect(asked: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        seen.append((asked.path, asked.headers.get("authorization")))
        return 302, {"location": "/elsewhere"}, b""

    with answering(redirect) as port:
        for host in ("127.0.0.1", "gateway.example"):
            command = f"mount --bind {tmp_path}/hosts /etc/hosts && {sys.executable} -m gateway keys list --admin http://{host}:{port}"
            alone = ["unshare", "--mount", "sh", "-c", command]
            env = environment(PENSTOCK_HOME=str(tmp_path))
            done = subprocess.run(alone, env=env, capture_output=True, text=True, timeout=60, cwd=tmp_path)
            assert (done.returncode, "302" in done.stderr) == (1, True), done.stderr
    assert seen == [("/admin/keys", "Bearer sk-penstock-of-this-machine"), ("/admin/keys", None)]


# What a terminal would obey: a title, a cleared screen, a colour in one character, a turned direction, a line that looks like another.
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\nforged"


def is_safe(done: subprocess.CompletedProcess[str]) -> bool:
    return all(line.isprintable() and not line.startswith("forged") for line in (done.stdout + done.stderr).split("\n"))


def test_a_clients_words_do_not_drive_the_operators_terminal(wired: Gateway, tmp_path: Path) -> None:
    asked = raw.call(wired.port, "POST", CHAT, {**raw.chat("x"), "model": f"gpt{ESCAPES}"}, {"x-request-id": "escapes"})
    assert asked.status == 404
    for more in ((), ("--json",)):
        done = penstock("explain", "escapes", *more, "--admin", wired.admin_url, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "owned" in done.stdout, "it is shown"
        assert is_safe(done), repr(done.stdout)
    assert json.loads(done.stdout)["model"] == f"gpt{ESCAPES}", "as JSON it means the same"
    by_hand = wired.admin("/admin/requests/escapes?format=text").body.decode()
    assert all(line.isprintable() and not line.startswith("forged") for line in by_hand.split("\n"))
    done = penstock("explain", f"nobody{ESCAPES}", "--admin", wired.admin_url, folder=tmp_path)
    assert (done.returncode, is_safe(done), "owned" in done.stderr) == (1, True, True), repr(done.stderr)


@pytest.mark.parametrize(
    "words",
    ["keys list", "keys list --json", "keys show NAME", "usage", "usage --csv", "explain x", "hosts", "hosts --json"],
)
def test_nor_do_a_gateways(tmp_path: Path, words: str) -> None:
    command = [ESCAPES if word == "NAME" else word for word in words.split()]
    counts = dict.fromkeys(
        (
            "requests",
            "limited",
            "prompt_tokens",
            "cached_tokens",
            "generated_tokens",
            "delivered_tokens",
            "wasted_client_tokens",
            "wasted_host_tokens",
            "cost",
        ),
        0,
    )
    of_hosts = dict.fromkeys(("id", "backend", "state", "why"), ESCAPES)
    rows: dict[str, Any] = {
        "/admin/keys": {"keys": [{"name": ESCAPES, "origin": ESCAPES, "metadata": {ESCAPES: ESCAPES}}]},
        "/admin/hosts": {"hosts": [{"weight": 1, "priority": 0, "in_flight": 0, "capacity": None, **of_hosts}]},
        "/admin/usage": {"to": "2026-11-28", "usage": [{"day": ESCAPES, "key": ESCAPES, "model": ESCAPES, **counts}]},
    }

    def hostile(asked: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        path, _, query = asked.path.partition("?")
        text = "csv" in query or path not in rows
        return 200, {}, ESCAPES.replace("\n", " ").encode() if text else json.dumps(rows[path], ensure_ascii=False).encode()

    with answering(hostile) as port:
        done = penstock(*command, "--admin", f"http://127.0.0.1:{port}", folder=tmp_path)
    assert (done.returncode, "owned" in done.stdout, is_safe(done)) == (0, True, True), repr(done.stdout + done.stderr)


def test_it_can_be_off(tmp_path: Path, scripted_sglang: Rehearsal) -> None:
    with gateway(tmp_path, scripted_sglang.backend(), PENSTOCK__LISTEN__ADMIN="off") as running:
        running.wait_ready()
        assert "metrics and /admin on" not in running.output()
