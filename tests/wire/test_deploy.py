"""What an operator is given to deploy: rules that a real promtool has tested, a real Prometheus that scrapes, dashboards that ask for what
there is, and a compose file whose every part is there. No Docker daemon is at hand: the images themselves are not built."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway import config
from gateway.access.keys import hashed
from tests.support import raw, redis
from tests.support.processes import ROOT, Gateway, Rehearsal, environment, fetch, gateway, until

DEPLOY = ROOT / "deploy"
COMPOSE = ROOT / "compose.yaml"
CHAT = "/v1/chat/completions"


def test_the_rules_are_right_and_fire_when_they_should() -> None:
    for command in (["check", "rules", "rules.yml"], ["test", "rules", "rules.test.yml"]):
        done = subprocess.run(["promtool", *command], cwd=DEPLOY / "prometheus", capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
    tested = yaml.safe_load((DEPLOY / "prometheus" / "rules.test.yml").read_text())
    named = {case["alertname"] for test in tested["tests"] for case in test["alert_rule_test"] if case["exp_alerts"]}
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())["groups"][0]["rules"]
    assert named == {rule["alert"] for rule in rules}, "each of them is seen to fire"
    assert all(rule["annotations"]["runbook"] and rule["labels"]["severity"] for rule in rules)


def test_rules_and_dashboards_ask_for_series_that_there_are(tmp_path: Path) -> None:
    from scripts import dashboards

    assert dashboards.unknown("sum(rate(penstock_nonsense_total[5m]))") == {"penstock_nonsense_total"}
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())["groups"][0]["rules"]
    assert {rule["alert"]: dashboards.unknown(rule["expr"]) for rule in rules if dashboards.unknown(rule["expr"])} == {}
    queries: list[dict[str, str]] = []
    for path in (DEPLOY / "grafana" / "dashboards").glob("*.json"):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                assert dashboards.unknown(target["expr"]) == set(), panel["title"]
                queries.append({"record": f"query:{len(queries)}", "expr": _plain(target["expr"])})
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": queries}]}))
    done = subprocess.run(["promtool", "check", "rules", str(tmp_path / "queries.yml")], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr


def _plain(expr: str) -> str:
    return expr.replace("$__rate_interval", "5m").replace("$model", ".*").replace("$host", ".*")


@pytest.fixture(scope="module")
def watched(scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, str]]:
    """A gateway with two workers, and a Prometheus that scrapes it with the metrics key and has the rules."""
    folder = tmp_path_factory.mktemp("watched")
    admin = {"key_hash": hashed("operator"), "metrics_key_hash": hashed("metrics")}
    with gateway(folder, {**scripted_sglang.backend(), "admin": admin, "listen": {"workers": 2}}) as running:
        running.wait_ready()
        made = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
        made["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        made["rule_files"] = [str(DEPLOY / "prometheus" / "rules.yml")]
        job = made["scrape_configs"][0]
        job["authorization"]["credentials_file"] = str(folder / "metrics.key")
        job["static_configs"] = [{"targets": [running.admin_url.removeprefix("http://")]}]
        (folder / "metrics.key").write_text("metrics")
        (folder / "prometheus.yml").write_text(yaml.safe_dump(made))
        port = redis.free_port()
        command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
                   f"--web.listen-address=127.0.0.1:{port}", "--enable-feature=exemplar-storage"]  # fmt: skip
        with (folder / "prometheus.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            until("Prometheus is ready", lambda: _answers(port), 30, 0.1)
            yield running, f"http://127.0.0.1:{port}/api/v1"
        finally:
            process.terminate()
            process.wait(20)


def _answers(port: int) -> bool:
    try:
        return b"Ready" in fetch(f"http://127.0.0.1:{port}/-/ready")
    except OSError:
        return False


def ask(api: str, query: str) -> list[Any]:
    found: list[Any] = json.loads(fetch(f"{api}/query?query={urllib.parse.quote(query)}"))["data"]["result"]
    return found


def test_a_real_prometheus_scrapes_both_workers_and_evaluates_the_rules(watched: tuple[Gateway, str]) -> None:
    running, api = watched
    for _ in range(40):
        assert raw.call(running.port, "POST", CHAT, raw.chat("hi")).status == 200
    raw.call(running.port, "POST", CHAT, raw.chat("[[tokens 5]]", stream=True))
    until("it was scraped", lambda: ask(api, 'sum(penstock_requests_total{status="200"}) >= 41'), 20, 0.2)
    assert ask(api, 'up{job="penstock"}')[0]["value"][1] == "1"
    assert ask(api, 'penstock_workers{generation="1"}')[0]["value"][1] == "2"
    assert ask(api, "histogram_quantile(0.99, sum by (le) (gen_ai_server_request_duration_seconds_bucket))")
    rules = until("the rules are evaluated", lambda: _evaluated(api), 20, 0.2)
    assert {rule["name"] for rule in rules} >= {"GpuUnderused", "FirstTokenSlow", "LimitStoreDown", "GatewayGone"}
    assert {rule["health"] for rule in rules} == {"ok"}
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []


def _evaluated(api: str) -> list[Any]:
    rules: list[Any] = json.loads(fetch(f"{api}/rules"))["data"]["groups"][0]["rules"]
    return rules if all(rule["health"] != "unknown" for rule in rules) else []


def test_every_series_of_the_dashboards_is_really_there(watched: tuple[Gateway, str]) -> None:
    """But for those that need a GPU, Redis, a limit, a collector, a failure, a bad answer or a cache: of those the name is known."""
    running, api = watched
    raw.call(running.port, "POST", CHAT, raw.chat("[[tokens 5]]", stream=True))
    until("it was scraped", lambda: ask(api, "gen_ai_server_time_to_first_token_seconds_count"), 20, 0.2)
    until("and judged", lambda: ask(api, "penstock_sentinel_finish_reasons_total"), 60, 0.2)
    text = (DEPLOY / "grafana" / "dashboards" / "service.json").read_text() + (DEPLOY / "grafana" / "dashboards" / "host.json").read_text()
    asked = set(re.findall(r"\b(?:penstock|gen_ai_server)_\w+", text)) - {"gen_ai_request_model"}
    elsewhere = re.compile(
        r"gpu|store|limited|spans|retries|continuations|reasked|left_out|host_changes|prefix_tokens|memory_used|swap|disk|batching"
    )
    absent = {name for name in asked if not elsewhere.search(name) and not ask(api, name)}
    assert absent == set()


# Compose


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return found


def test_every_service_is_pinned_confined_and_watched(compose: dict[str, Any]) -> None:
    assert {"gateway", "engine", "redis", "jaeger", "prometheus", "grafana", "host-a", "host-b", "host-c"} <= set(compose["services"])
    for name, service in compose["services"].items():
        image, _, tag = service["image"].rpartition(":")
        assert image, name
        assert re.match(r"^v?\d+\.\d+", tag), f"{name}: {service['image']} says no version"
        assert service["read_only"] is True, name
        assert service["user"] not in ("0", "root"), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["healthcheck"]["test"], name
        for port in service.get("ports", ()):
            assert re.match(r"^127\.0\.0\.1:\d+:\d+$", port), f"{name}: {port} is open to the world"
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            assert source in compose["volumes"] or (ROOT / source).exists(), f"{name}: {source} is not there"
        for secret in service.get("secrets", ()):
            assert secret in compose["secrets"]
        for other in service.get("depends_on", ()):
            assert other in compose["services"], f"{name} waits for {other}"
    published = [port.split(":")[1] for service in compose["services"].values() for port in service.get("ports", ())]
    assert len(published) == len(set(published))


def test_its_configurations_are_accepted_and_meet(compose: dict[str, Any], tmp_path: Path) -> None:
    keys = subprocess.run(
        ["bash", "-c", f"cp {DEPLOY}/compose/keys.sh {tmp_path} && {tmp_path}/keys.sh"], capture_output=True, text=True, timeout=30
    )
    assert keys.returncode == 0, keys.stderr
    made = dict(line.split("=", 1) for line in (tmp_path / "keys.env").read_text().splitlines())
    shown = [line.rsplit(" ", 1)[1] for line in keys.stdout.splitlines()]
    assert not any(secret in (tmp_path / "keys.env").read_text() for secret in shown), "what is kept are hashes"
    assert hashed(shown[0]) == made["PENSTOCK__ADMIN__KEY_HASH"]
    assert hashed((tmp_path / "metrics.key").read_text()) == made["PENSTOCK__ADMIN__METRICS_KEY_HASH"]
    hosts = set()
    for name in ("penstock.yaml", "rehearsal.yaml"):
        settings = config.load(DEPLOY / "compose" / name, made).settings
        for section in settings.backends.values():
            hosts |= {urllib.parse.urlsplit(host["url"]).hostname for host in section["hosts"]}
    addresses = (
        [settings.redis.url, settings.tracing.otlp_endpoint]
        if (settings := config.load(DEPLOY / "compose" / "penstock.yaml", made).settings)
        else []
    )
    hosts |= {urllib.parse.urlsplit(str(address)).hostname for address in addresses}
    targets = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"][0]["targets"]
    hosts |= {target.split(":")[0] for target in targets}
    assert hosts <= set(compose["services"]), "every address is a service's name"
    weights = [host["weight"] for host in yaml.safe_load((DEPLOY / "compose" / "rehearsal.yaml").read_text())["backends"]["dsv3"]["hosts"]]
    assert weights == [5, 3, 2]


def test_the_dockerfile_runs_nothing_but_our_own_scripts(compose: dict[str, Any]) -> None:
    text = (ROOT / "Dockerfile").read_text()
    runs = re.findall(r"^RUN (.*)$", text, re.MULTILINE)
    assert all(run.startswith(("/src/scripts/install.sh", "apt-get", "useradd")) for run in runs), runs
    assert {service["build"]["target"] for service in compose["services"].values() if "build" in service} <= set(
        re.findall(r" AS (\w+)", text)
    )
    assert text.count("\nUSER penstock") == 2
    assert "latest" not in text


def test_images_do_not_run_as_root() -> None:
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    for stage in stages:
        name = re.findall(r" AS (\w+)", stage)[0]
        users = re.findall(r"^USER (.+)$", stage, re.MULTILINE)
        assert users[-1:] == (["penstock"] if name != "base" else []), name
        if users:  # nothing is installed or owned differently behind it
            assert "RUN" not in stage.rpartition("\nUSER ")[2]
    assert re.search(r"useradd --system --uid 10001 .* penstock$", stages[0], re.MULTILINE)


def test_a_pod_is_confined() -> None:
    for manifest in yaml.safe_load_all((DEPLOY / "kubernetes" / "penstock.yaml").read_text()):
        pod = manifest["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            confined = container["securityContext"]
            assert confined["readOnlyRootFilesystem"] is True
            assert confined["allowPrivilegeEscalation"] is False
            assert confined["capabilities"] == {"drop": ["ALL"]}
            writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
            assert writable == {"/opt/penstock/state", "/tmp"}, "all that the gateway writes to"
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes


@pytest.mark.parametrize("name", ["penstock", "penstock-engine"])
def test_units_are_confined(name: str) -> None:
    """By systemd's own judgement: 0 is all that there is, 10 nothing."""
    unit = DEPLOY / "systemd" / f"{name}.service"
    done = subprocess.run(["systemd-analyze", "security", "--offline=true", unit], capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) <= 3.0, done.stdout
    assert done.stderr == "", "a setting that it does not know, or cannot read"


@pytest.mark.slow
@pytest.mark.timeout(1200)  # it compiles, which takes what the machine has left
def test_what_the_dockerfile_runs_works_in_a_clean_folder(tmp_path: Path, scripted_sglang: Rehearsal) -> None:
    clean = {name: value for name, value in environment().items() if name not in ("PENSTOCK_HOME", "PYTHONPATH", "VIRTUAL_ENV")}
    # Two minutes of compiling that `make test` has just done with the same sources and tools; with other ones it is done here.
    clean["PENSTOCK_COMPILED"] = str(ROOT / "build" / "compiled")
    done = subprocess.run(
        [ROOT / "scripts" / "install.sh", tmp_path / "opt"], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=1000
    )
    assert done.returncode == 0, done.stderr[-2000:]
    python = str(tmp_path / "opt" / "venv" / "bin" / "python")
    with gateway(tmp_path / "run", scripted_sglang.backend(), python=python, PENSTOCK_HOME=str(tmp_path / "opt")) as running:
        running.wait_ready()
        assert raw.call(running.port, "POST", CHAT, raw.chat("hi")).status == 200
