"""Configuration: layers, origins, and every refusal with its path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway import config
from gateway.errors import ConfigError
from gateway.serving import registry

HASH = "sha256:" + "0" * 64


def load(tmp_path: Path, text: str, env: dict[str, str] | None = None, **overrides: Any) -> config.Loaded:
    file = tmp_path / "penstock.yaml"
    file.write_text(text)
    return config.load(file, env or {}, overrides)


def test_without_anything_the_tiny_model_is_served_on_loopback() -> None:
    settings = config.load(environment={}).settings
    assert settings.listen.host == "127.0.0.1"
    assert list(settings.models) == ["deepseek-v3-tiny"]
    assert settings.backends["dsv3"]["hosts"] == [{"launch": "local"}]
    registry.configured(settings)


def test_later_layers_win_and_every_value_knows_where_it_came_from(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        "listen: {port: 1, workers: 2}\nlog: {level: debug}",
        {"PENSTOCK__LISTEN__PORT": "2", "PENSTOCK__TIMEOUTS__CONNECT_S": "1.5", "OTHER": "x"},
        **{"listen.port": 3},
    )
    assert (loaded.settings.listen.port, loaded.settings.listen.workers) == (3, 2)
    assert loaded.settings.timeouts.connect_s == 1.5
    assert loaded.origins["listen.port"] == "command line"
    assert loaded.origins["timeouts.connect_s"] == "environment PENSTOCK__TIMEOUTS__CONNECT_S"
    assert loaded.origins["log.level"].startswith("file ")
    assert "listen.host" not in loaded.origins


def test_json_is_yaml(tmp_path: Path) -> None:
    assert load(tmp_path, '{"listen": {"port": 9}}').settings.listen.port == 9


@pytest.mark.parametrize(
    ("text", "path", "words"),
    [
        ("lisen: {}", "lisen", "did you mean 'listen'"),
        ("listen: {prot: 1}", "listen.prot", "did you mean 'port'"),
        ("listen: {port: eighty}", "listen.port", "expected `int`"),
        ("listen: {port: 70000}", "listen.port", "0 (any free one) to 65535"),
        ("listen: {workers: 0}", "listen.workers", "1 to 64"),
        ("listen: {host: 0.0.0.0}", "listen.host", "without keys"),
        ("keys: [{name: a, hash: secret}]", "keys.0.hash", "64 hex digits"),
        (f"keys: [{{name: a, hash: '{HASH}'}}, {{name: a, hash: '{HASH}'}}]", "keys.1.name", "used twice"),
        (f"keys: [{{name: a, hash: '{HASH}', rmp: 1}}]", "keys.0.rmp", "unknown key"),
        ("timeouts: {connect_s: 0}", "timeouts.connect_s", "above 0"),
        ("security: {body_limit_mb: 0}", "security.body_limit_mb", "1 to 1024"),
        ("security: {body_memory_mb: 31}", "security.body_memory_mb", "32 (security.body_limit_mb) to"),
        ("security: {strict_parameters: maybe}", "security.strict_parameters", "expected `bool`"),
        ("timeouts: {keepalive_s: 0}", "timeouts.keepalive_s", "above 0"),
        ("listen: {tls: {cert_file: a}}", "listen.tls", "key_file"),
        ("backends: {dsv3: {kind: sglang_dsv3, hosts: [{url: 'https://x'}], client_key_file: k}}", "backends.dsv3", "give both or none"),
        ("log: {format: xml}", "log.format", "auto, json, text"),
        ("models: {}", "models", "no model"),
        ("models: {a: {backend: x}}", "models.a.backend", "no backend is called 'x'"),
        ("models: {a: {backend: dsv3, aliases: [b]}, b: {backend: dsv3}}", "models.b", "already taken by models.a"),
        ("backends: {x: {kind: scripted}}", "models", "name the models that x serves"),
        ("backends: {dsv3: {kind: sglang}}", "backends.dsv3.kind", "did you mean 'sglang_dsv3'"),
        ("backends: {dsv3: {kind: sglang_dsv3, hosts: [{url: 'ftp://x'}]}}", "backends.dsv3.hosts", "http://HOST:PORT"),
        ("backends: {dsv3: {kind: sglang_dsv3, hosts: [{url: 'http://x', weight: 0}]}}", "backends.dsv3.hosts", "above 0"),
        ("backends: {dsv3: {kind: sglang_dsv3, hosts: [{}]}}", "backends.dsv3.hosts", "either `url` or `launch: local`"),
        ("backends: {dsv3: {kind: sglang_dsv3, hosts: [{url: 'http://x'}, {url: 'http://x/'}]}}", "backends.dsv3", "listed twice"),
        ("backends: {dsv3: {kind: sglang_dsv3, hosts: [{ulr: 'http://x'}]}}", "backends.dsv3.hosts.0.ulr", "did you mean 'url'"),
        ("backends: {dsv3: {kind: sglang_dsv3, hosts: []}}", "backends.dsv3", "at least one"),
        ("backends: {dsv3: {kind: sglang_dsv3, hosts: [{url: 'http://x', max_in_flight: 0}]}}", "backends.dsv3.hosts", "at least 1"),
        ("backends: {dsv3: {kind: sglang_dsv3, hosts: [{url: 'https://x', resolve: a}]}}", "backends.dsv3.hosts", "http:// URL"),
        ("backends: {dsv3: {kind: sglang_dsv3, hosts: [{url: 'unix://x'}]}}", "backends.dsv3.hosts", "unix:///PATH"),
        ("backends: {dsv3: {kind: sglang_dsv3, hosts: [{url: 'http://x'}], proxy: x}}", "backends.dsv3", "http://HOST:PORT"),
        ("backends: {dsv3: {kind: sglang_dsv3, hosts: [{url: 'http://x'}], dns_server: x}}", "backends.dsv3", "ADDRESS:PORT"),
        ("backends: {dsv3: {kind: scripted, health: {probe_s: 0}}}", "backends.dsv3.health", "above 0"),
        ("backends: {dsv3: {kind: scripted, health: {all_sick: pray}}}", "backends.dsv3.health.all_sick", "pray"),
        ("backends: {dsv3: {kind: scripted, health: {prob_s: 1}}}", "backends.dsv3.health.prob_s", "did you mean 'probe_s'"),
        ("models: {a: {backend: dsv3, balance: fair}}", "models", "fair"),
        ("retry: {budget_share: 2}", "retry.budget_share", "0 to 1"),
        ("retry: {max_continuations: 99}", "retry.max_continuations", "0 to 10"),
        ("admission: {max_queue: -1}", "admission.max_queue", "0 to 100000"),
        ("listen: {admin: here}", "listen.admin", "HOST:PORT"),
        ("listen: {admin: '127.0.0.1:8000'}", "listen.admin", "must differ"),
        ("admin: {key_hash: secret}", "admin.key_hash", "64 hex digits"),
        ("listen: {port: 1}\nlisten: {port: 2}", "line 2", "written twice"),
        ("a: [", "line", "not valid YAML"),
        ("- a", "penstock.yaml", "must be a mapping"),
    ],
)
def test_what_is_wrong_is_named_with_its_path(tmp_path: Path, text: str, path: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        registry.configured(load(tmp_path, text).settings)
    assert path in refused.value.path
    assert words.lower() in str(refused.value).lower()


def test_keys_open_other_addresses(tmp_path: Path) -> None:
    assert load(tmp_path, f"listen: {{host: 0.0.0.0}}\nkeys: [{{name: a, hash: '{HASH}'}}]").settings.listen.host == "0.0.0.0"


@pytest.mark.parametrize(("host", "loopback"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("10.0.0.1", False), ("x", False)])
def test_loopback(host: str, loopback: bool) -> None:
    assert config.is_loopback(host) is loopback


def test_secrets_are_masked() -> None:
    leaves = dict(config.leaves({"keys": [{"name": "a", "hash": HASH}], "x": {"api_key": "k", "keyboard": "q"}}))
    shown = {path: config.masked(path, value) for path, value in leaves.items()}
    assert shown == {"keys.0.name": "a", "keys.0.hash": "********", "x.api_key": "********", "x.keyboard": "q"}


def test_settings_survive_their_way_to_a_worker() -> None:
    settings = config.load(environment={}).settings
    assert msgspec.convert(msgspec.json.decode(msgspec.json.encode(settings)), config.Settings) == settings
