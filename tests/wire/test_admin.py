"""The operator's door: what it shows, who may pass, and that it is nowhere else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.support import raw
from tests.support.otlp import collector
from tests.support.processes import Gateway, Rehearsal, gateway, until
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
    assert f'penstock_requests_total{{{route},{model},status="200",outcome=""}} 21' in lines
    assert f'penstock_requests_total{{{route},{model},status="503",outcome="engine_overloaded"}} 1' in lines
    assert 'penstock_requests_total{route="",model="",status="404",outcome="unknown_url"} 1' in lines, "a path nobody knows is no label"
    assert f'penstock_requests_total{{{route},model="",status="404",outcome="model_not_found"}} 1' in lines
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
    done = penstock("explain", "my-own-id", "--admin", guarded.door, folder=guarded.log.parent, PENSTOCK_ADMIN_KEY="foo")
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


def test_without_a_key_a_web_page_is_kept_out_by_its_host(wired: Gateway) -> None:
    assert wired.admin("/admin/workers").status == 200
    for host in ("evil.example", "evil.example:9464", "127.0.0.1.evil.example", ""):
        answer = wired.admin("/admin/workers", headers={"host": host})
        assert (answer.status, answer.error()["code"]) == (403, "unknown_host")
    assert wired.admin("/admin/workers", headers={"host": "localhost:9464"}).status == 200
    assert wired.admin("/admin/workers", headers={"host": "[::1]:9464"}).status == 200


def test_the_public_listener_has_no_such_door(wired: Gateway) -> None:
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


def test_every_use_of_the_door_is_logged(wired: Gateway) -> None:
    wired.admin("/admin/workers", headers={"user-agent": "op"})
    until("it is", lambda: any(
        json.loads(line).get("audit") and "GET /admin/workers from 127.0.0.1: 200" in line
        for line in wired.output().splitlines() if line.startswith("{")
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("listen", "words"),
    [
        ({"admin": "0.0.0.0:0"}, "listen.admin: without admin.key_hash the admin listener opens on loopback only"),
        ({"admin": "here"}, "listen.admin: 'here' is no HOST:PORT; accepted: HOST:PORT, or off"),
    ],
)
def test_a_door_that_would_stand_open_is_refused(tmp_path: Path, listen: dict[str, str], words: str) -> None:
    from tests.wire.test_command import penstock

    done = penstock("check", folder=tmp_path, PENSTOCK__LISTEN__ADMIN=listen["admin"])
    assert done.returncode == 2
    assert words in done.stderr


def test_it_can_be_off(tmp_path: Path, scripted_sglang: Rehearsal) -> None:
    with gateway(tmp_path, scripted_sglang.backend(), PENSTOCK__LISTEN__ADMIN="off") as running:
        running.wait_ready()
        assert "metrics and /admin on" not in running.output()
