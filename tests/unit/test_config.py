"""Configuration: layers, origins, and every refusal with its path."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway import config
from gateway.access.keys import Caller
from gateway.errors import ConfigError
from gateway.serving import registry

HASH = "sha256:" + "0" * 64
EMPTY = "sha256:" + hashlib.sha256(b"").hexdigest()


def load(tmp_path: Path, text: str, env: dict[str, str] | None = None, **overrides: Any) -> config.Loaded:
    file = tmp_path / "penstock.yaml"
    file.write_text(text)
    return config.load(file, env or {}, overrides, registry.configured)


def refusals(tmp_path: Path, text: str, env: dict[str, str] | None = None, **overrides: Any) -> list[str]:
    """Every line of a refusal, the file by its name alone."""
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, text, env, **overrides)
    return str(refused.value).replace(f"{tmp_path}/", "").splitlines()


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
    assert loaded.origins["log.level"] == f"file {tmp_path}/penstock.yaml:2"
    assert "listen.host" not in loaded.origins


def test_json_is_yaml(tmp_path: Path) -> None:
    assert load(tmp_path, '{"listen": {"port": 9}}').settings.listen.port == 9


DSV3 = "backends: {dsv3: {kind: sglang_dsv3, hosts: "


@pytest.mark.parametrize(
    ("text", "path", "words"),
    [
        ("lisen: {}", "lisen", "did you mean 'listen'"),
        ("listen: {prot: 1}", "listen.prot", "did you mean 'port'"),
        ("listen: {port: eighty}", "listen.port", "expected `int`, got `str`"),
        ("listen: []", "listen", "expected `mapping`, got `list`"),
        ("listen:", "listen", "expected `mapping`, got `nothing`"),
        ("listen: {port: 70000}", "listen.port", "70000 is out of range; accepted: 0 (any free one) to 65535"),
        ("listen: {workers: 0}", "listen.workers", "0 is out of range; accepted: 1 to 64"),
        ("listen: {host: 0.0.0.0}", "listen.host", "without keys"),
        ("listen: {host: 'a b'}", "listen.host", "'a b' is no address and no host name"),
        ("listen: {host: ''}", "listen.host", "no host name"),
        ("keys: [{name: a, hash: secret}]", "keys.0.hash", "64 hex digits"),
        (f"keys: [{{name: a, hash: '{HASH}', rmp: 1}}]", "keys.0.rmp", "did you mean 'rpm'"),
        (f"keys: [{{name: a b, hash: '{HASH}'}}]", "keys.0.name", "beginning with a letter or digit"),
        (f"keys: [{{hash: '{HASH}'}}]", "keys.0", "`name` is missing"),
        (f"keys: [{{name: a, hash: '{HASH}'}}, {{name: a, hash: '{HASH}'}}]", "keys.1.name", "used twice"),
        (f"keys: [{{name: a, hash: '{HASH}', rpm: 0}}]", "keys.0.rpm", "above 0 (leave it out for no limit)"),
        (f"keys: [{{name: a, hash: '{HASH}', expires: soon}}]", "keys.0.expires", "is no date and time; accepted: an ISO 8601"),
        (f"keys: [{{name: a, hash: '{HASH}', priority: 10}}]", "keys.0.priority", "0 (first) to 9"),
        (f"keys: [{{name: a, hash: '{HASH}', models: [deepseek-v3]}}]", "keys.0.models", "did you mean 'deepseek-v3-tiny'"),
        (f"keys: [{{name: a, hash: '{HASH}', per_model: {{x: {{rpm: 1}}}}}}]", "keys.0.per_model", "no model is called 'x'"),
        (f"keys: [{{name: a, hash: '{HASH}', budget: {{amount: 1}}}}]", "keys.0.budget", "no model has a price"),
        (f"keys: [{{name: a, hash: '{EMPTY}'}}]", "keys.0.hash", "hash of an empty key"),
        (f"admin: {{key_hash: '{EMPTY}'}}", "admin.key_hash", "hash of an empty key"),
        (f"admin: {{metrics_key_hash: '{EMPTY}'}}", "admin.metrics_key_hash", "hash of an empty key"),
        ("limits: {timezone: Mars/Olympus}", "limits.timezone", "is no time zone; accepted: one like UTC"),
        ("timeouts: {connect_s: 0}", "timeouts.connect_s", "above 0, up to 86400"),
        ("timeouts: {connect_s: .nan}", "timeouts.connect_s", "no finite number"),
        ("security: {body_limit_mb: 0}", "security.body_limit_mb", "1 to 1024"),
        ("security: {body_memory_mb: 31}", "security.body_memory_mb", "accepted: 32 (security.body_limit_mb) or more"),
        ("security: {strict_parameters: maybe}", "security.strict_parameters", "expected `bool`"),
        ("security: {trusted_proxies: [10.0.0.0/8, here]}", "security.trusted_proxies.1", "'here' is no address"),
        ("security: {cors: {origins: [app.example]}}", "security.cors.origins.0", "an origin like https://app.example"),
        ("timeouts: {keepalive_s: 0}", "timeouts.keepalive_s", "above 0"),
        ("listen: {tls: {cert_file: a}}", "listen.tls", "`key_file` is missing"),
        ("log: {format: xml}", "log.format", "'xml' is not accepted; one of: auto, json, text"),
        ("log: {level: warn}", "log.level", "did you mean 'warning'?"),
        ("models: {}", "models", "no model"),
        ("models: {a: {backend: x}}", "models.a.backend", "no backend is called 'x'"),
        ("models: {a: {backend: dsv3, aliases: [b]}, b: {backend: dsv3}}", "models.b", "already taken by models.a"),
        ("models: {a: {backend: dsv3, price: {prompt: -1}}}", "models.a.price.prompt", "-1 is out of range"),
        ("models: {'': {backend: dsv3}}", "models.", "is empty; accepted: 1 to 256 long"),
        ("models: {a: {backend: dsv3, balance: fair}}", "models.a.balance", "one of: affinity, two_choices"),
        ("backends: {dsv3: {kind: sglang}}", "backends.dsv3.kind", "did you mean 'sglang_dsv3'"),
        ("backends: {'../x': {kind: scripted}}", "backends.../x", "up to 64 letters"),
        (DSV3 + "[{url: 'ftp://x'}]}}", "backends.dsv3.hosts.0.url", "accepted: http://HOST:PORT"),
        (DSV3 + "[{url: 'http://x', weight: 0}]}}", "backends.dsv3.hosts.0.weight", "above 0"),
        (DSV3 + "[{}]}}", "backends.dsv3.hosts.0", "either `url` or `launch: local`"),
        (DSV3 + "[{url: 'http://x'}, {url: 'http://x/'}]}}", "backends.dsv3.hosts.1.url", "listed twice"),
        (DSV3 + "[{ulr: 'http://x'}]}}", "backends.dsv3.hosts.0.ulr", "did you mean 'url'"),
        (DSV3 + "[]}}", "backends.dsv3.hosts", "holds 0; accepted: at least one"),
        (DSV3 + "[{url: 'http://x', max_in_flight: 0}]}}", "backends.dsv3.hosts.0.max_in_flight", "1 or more"),
        (DSV3 + "[{url: 'https://x', resolve: a}]}}", "backends.dsv3.hosts.0.resolve", "http:// URL"),
        (DSV3 + "[{url: 'unix://x'}]}}", "backends.dsv3.hosts.0.url", "unix:///PATH"),
        (DSV3 + "[{url: 'http://x'}], proxy: x}}", "backends.dsv3.proxy", "http://HOST:PORT"),
        (DSV3 + "[{url: 'http://x'}], dns_server: x}}", "backends.dsv3.dns_server", "ADDRESS:PORT"),
        (DSV3 + "[{url: 'http://x'}], dns_server: 'x:53'}}", "backends.dsv3.dns_server", "begins with no address"),
        (DSV3 + "[{url: 'https://x'}], client_key_file: k}}", "backends.dsv3.client_cert_file", "give both or none"),
        (DSV3 + "[{url: 'http://x'}], endpoints: [/v1/chat]}}", "backends.dsv3.endpoints.0", "one of: /v1/chat/completions"),
        ("backends: {dsv3: {kind: scripted, health: {probe_s: 0}}}", "backends.dsv3.health.probe_s", "above 0"),
        ("backends: {dsv3: {kind: scripted, health: {all_sick: pray}}}", "backends.dsv3.health.all_sick", "pray"),
        ("backends: {dsv3: {kind: scripted, health: {prob_s: 1}}}", "backends.dsv3.health.prob_s", "did you mean 'probe_s'"),
        ("backends: {dsv3: {kind: scripted, health: 0}}", "backends.dsv3.health", "expected `mapping`"),
        ("retry: {budget_share: 2}", "retry.budget_share", "0 to 1"),
        ("retry: {max_continuations: 99}", "retry.max_continuations", "0 to 10"),
        ("admission: {max_queue: -1}", "admission.max_queue", "0 to 100000"),
        ("listen: {admin: here}", "listen.admin", "HOST:PORT"),
        ("listen: {admin: on}", "listen.admin", "HOST:PORT"),
        ("listen: {admin: '127.0.0.1:65536'}", "listen.admin", "has no port from 0 to 65535"),
        ("listen: {admin: '127.0.0.1:8000'}", "listen.admin", "must differ"),
        ("admin: {key_hash: secret}", "admin.key_hash", "64 hex digits"),
        ("redis: {url: 'http://h'}", "redis.url", "must begin with redis://"),
        ("redis: {url: 'redis://h:70000'}", "redis.url", "has no port from 1 to 65535"),
        ("redis: {url: 'redis://h/x'}", "redis.url", "must name its database by a number"),
        ("redis: {url: 'redis://h?db=x'}", "redis.url", "must name its database by a number"),
        ("redis: {url: 'redis://h?protocol=3'}", "redis.url", "an option in its query that is none of client_name, db"),
        ("redis: {url: 'redis://h?ssl_cert_reqs=none'}", "redis.url", "an option in its query that is none of"),
        ("redis: {url: 'redis://h/1', cluster: true}", "redis.url", "a Redis Cluster has only 0"),
        ("redis: {url: 'redis://h', cluster: true, sentinels: ['h:1']}", "redis.sentinels", "use one of the two"),
        ("redis: {url: 'redis://h', sentinels: [h]}", "redis.sentinels.0", "is no HOST:PORT"),
        ("tracing: {otlp_endpoint: 'jaeger:4317'}", "tracing.otlp_endpoint", "a URL like http://jaeger:4317"),
        ("listen: {port: 1, port: 2}", "listen.port", "is written twice"),
        ("a: [", "", "not valid YAML"),
        ("- a", "", "must be a mapping"),
        ("listen: !!python/object:os.system {}", "listen", "has a tag that is not accepted"),
        ("listen: {host: !x y}", "listen.host", "a text that begins with '!' needs quotes"),
        ('listen: {host: "a\\0b"}', "listen.host", "holds a control character (\\x00)"),
        ('listen: {host: "a\\ud800b"}', "listen.host", "holds a control character (\\ud800)"),
        ("listen: {port: 123456789012345678901234567890}", "listen.port", "more than 64 bits"),
        ("listen: {port: 0x_}", "listen.port", "is no int"),
        ("listen: {[a]: b}", "listen", "has a key that is no text"),
        ("listen: &a {tls: *a}", "", "an alias stands inside of what it stands for"),
        ("listen: {<<: 1}", "listen", "merges (`<<`) what is no mapping"),
        ("[" * 2000, "", "is nested more than 50 deep"),
    ],
)
def test_what_is_wrong_is_named_with_its_path_and_its_line(tmp_path: Path, text: str, path: str, words: str) -> None:
    (line,) = refusals(tmp_path, f"# a comment\n{text}")
    assert re.match(r"penstock\.yaml(:\d+)?: ", line)
    assert line.partition(": ")[2].startswith(f"{path}: " if path else "")
    assert words in line


@pytest.mark.parametrize(
    "url",
    [
        "http://10.0.0.1:300000", "http://10.0.0.1:abc", "http://10.0.0.1:", "http://10.0.0.1:0", "http://10.0.0.1:-1", ":abc", "http://",
        "",
        "http://10.0.0.1:30000 ", " http://10.0.0.1:30000", "http://10.0.0.1:30000\t", "http://10.0.0.1:30000\n", "http://[::1",
        "http://::1:80", "http://[h]:80", "http://a b", "http://müller", "http://-h", "http://h..i", "http://h/v1", "http://h?x", "http://h#x",
        "http://user:pw@h", "http://user@h", "HTTP://h", "http:/h", "//h", "h:1", "unix://", "unix:///", "unix://h/p",
        "unix:///" + "p" * 200,
        "http://" + "a" * 64, "http://" + "a." * 200 + "a",
    ],
)  # fmt: skip
def test_a_url_that_could_not_be_used_is_refused_before_it_is(tmp_path: Path, url: str) -> None:
    text = msgspec.json.encode({"backends": {"dsv3": {"kind": "sglang_dsv3", "hosts": [{"url": url}]}}}).decode()
    (line,) = refusals(tmp_path, text)
    assert line.startswith("penstock.yaml:1: backends.dsv3.hosts.0.url: '")
    assert line.endswith("accepted: http://HOST:PORT, https://HOST:PORT or unix:///PATH")
    assert "pw" not in line


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1:30000", "https://h.example.", "http://[::1]:80", "http://_sglang._tcp.h/", "unix:///run/a"]
)
def test_a_url_that_can_be_used_is_accepted(tmp_path: Path, url: str) -> None:
    load(tmp_path, msgspec.json.encode({"backends": {"dsv3": {"kind": "sglang_dsv3", "hosts": [{"url": url}]}}}).decode())


def test_all_that_is_wrong_is_said_at_once_each_with_its_line(tmp_path: Path) -> None:
    text = """
listen: {prot: 1, workers: 65}
timeouts:
  connect_s: 0
  connect_s: -1
models:
  a: {backend: nowhere}
  b: {backend: dsv3, aliases: [a], balance: fair}
redis: {url: "redis://h:x"}
backends:
  dsv3:
    kind: sglang_dsv3
    hosts:
      - url: http://10.0.0.1:300000
        wieght: 3
      - url: http://10.0.0.2
    engine: {gpus: [1, 1], port: 0, agent: here}
    proxy: nowhere
  other: {kind: scripted, targets: none, health: {window_s: 0}}
"""
    env = {"PENSTOCK__LOG__LEVEL": "loud", "PENSTOCK__LISTEN__HOST": "[", "PENSTOCK____X": "1"}
    urls = "http://HOST:PORT, https://HOST:PORT or unix:///PATH"
    assert refusals(tmp_path, text, env, **{"admission.max_queue": -1}) == [
        "penstock.yaml:2: listen.prot: unknown key; did you mean 'port'?",
        "penstock.yaml:2: listen.workers: 65 is out of range; accepted: 1 to 64",
        "penstock.yaml:5: timeouts.connect_s: is written twice",
        "penstock.yaml:8: models.b.balance: 'fair' is not accepted; one of: affinity, two_choices, weighted_round_robin, prefix_affinity",
        "penstock.yaml:9: redis.url: has no port from 1 to 65535; accepted: redis://HOST:PORT/DB, rediss://HOST:PORT/DB or unix:///PATH",
        f"penstock.yaml:14: backends.dsv3.hosts.0.url: 'http://10.0.0.1:300000' has no port from 1 to 65535; accepted: {urls}",
        "penstock.yaml:15: backends.dsv3.hosts.0.wieght: unknown key; did you mean 'weight'?",
        "penstock.yaml:17: backends.dsv3.engine.port: 0 is out of range; accepted: 1 to 65535",
        "penstock.yaml:17: backends.dsv3.engine.agent: 'here' is no HOST:PORT; accepted: HOST:PORT",
        "penstock.yaml:18: backends.dsv3.proxy: is no URL; accepted: http://HOST:PORT or https://HOST:PORT",
        "penstock.yaml:19: backends.other.health.window_s: 0 is out of range; accepted: above 0, up to 86400",
        "penstock.yaml:19: backends.other.targets: expected `int`, got `str`",
        "environment PENSTOCK__LISTEN__HOST: listen.host: not valid YAML: expected the node content, but found '<stream end>'",
        "environment PENSTOCK____X: names no setting; accepted: PENSTOCK__SECTION__KEY",
        "environment PENSTOCK__LOG__LEVEL: log.level: 'loud' is not accepted; one of: debug, info, warning, error",
        "command line: admission.max_queue: -1 is out of range; accepted: 0 to 100000",
    ]


def test_a_struct_says_all_that_is_wrong_between_its_fields(tmp_path: Path) -> None:
    assert refusals(tmp_path, f"{DSV3}[{{launch: local}}], engine: {{gpus: [1, 1], nnodes: 2, node_rank: 2}}}}}}") == [
        "penstock.yaml:1: backends.dsv3.engine.gpus: must be different indices from 0 on, are [1, 1]",
        "penstock.yaml:1: backends.dsv3.engine.node_rank: must be 0 to 1 with nnodes 2, is 2",
        "penstock.yaml:1: backends.dsv3.engine.dist_init_addr: is missing: several nodes need it, HOST:PORT of node 0, the same on each",
    ]


def test_models_are_named_where_backends_are(tmp_path: Path) -> None:
    assert refusals(tmp_path, "backends: {x: {kind: scripted}}") == ["models: is missing: name the models that x serves"]


def test_more_refusals_than_anybody_reads_are_counted(tmp_path: Path) -> None:
    lines = refusals(tmp_path, "\n".join(f"x{number}: 1" for number in range(500)))
    assert len(lines) == 101
    assert lines[-1] == "... and 400 more"


def test_what_a_refusal_quotes_is_short_and_on_one_line(tmp_path: Path) -> None:
    lines = refusals(tmp_path, msgspec.json.encode({"log": {"level": "x\n" * 5000}, "yz" * 500: 1}).decode())
    assert len(lines) == 2
    assert all(len(line) < 2100 and line.isprintable() for line in lines)


def test_yaml_that_unfolds_is_bounded(tmp_path: Path) -> None:
    """A million values out of a few lines, as a list and as merged mappings."""
    several = ", ".join
    lists = "\n".join(f"l{n}: &l{n} [{several([f'*l{n - 1}'] * 10)}]" if n else "l0: &l0 [x]" for n in range(7))
    assert "more than 100000 values, aliases unfolded" in refusals(tmp_path, lists)[-1]
    merges = "\n".join(f"m{n}: &m{n} {{<<: [{several([f'*m{n - 1}'] * 10)}]}}" if n else "m0: &m0 {x: 1}" for n in range(30))
    assert "unknown key" in refusals(tmp_path, merges)[0]


def test_anchors_and_merges_are_yaml(tmp_path: Path) -> None:
    text = """
models:
  a: &base {backend: dsv3, balance: prefix_affinity, limits: {rpm: 5}}
  b: {<<: *base, balance: two_choices}
  c: {<<: [*base, {continuation: off}]}
"""
    models = load(tmp_path, text.replace("off", "'off'")).settings.models
    assert [models[name].balance for name in "abc"] == ["prefix_affinity", "two_choices", "prefix_affinity"]
    assert (models["b"].limits.rpm, models["c"].continuation) == (5, "off")


def test_keys_and_dates_are_text_whatever_they_look_like(tmp_path: Path) -> None:
    text = f"""
models: {{404: {{backend: dsv3}}, on: {{backend: dsv3}}, 1.5: {{backend: dsv3}}}}
keys: [{{name: a, hash: '{HASH}', expires: 2027-01-31, metadata: {{since: 2026-01-01T10:00:00Z}}}}]
"""
    settings = load(tmp_path, text).settings
    assert list(settings.models) == ["404", "on", "1.5"]
    assert (settings.keys[0].expires, settings.keys[0].metadata) == ("2027-01-31", {"since": "2026-01-01T10:00:00Z"})
    assert Caller(settings.keys[0], settings).expires_at == 1801353600.0  # date -u -d 2027-01-31 +%s


@pytest.mark.parametrize("text", ["1970-01-01", "9999-12-31T23:59:59-23:59", "20270131", "2027-W01", "2027-01-31 18:00+05:30"])
def test_a_date_that_is_accepted_can_be_used(tmp_path: Path, text: str) -> None:
    settings = load(tmp_path, f"keys: [{{name: a, hash: '{HASH}', expires: '{text}'}}]").settings
    assert isinstance(Caller(settings.keys[0], settings).expires_at, float)


def test_a_variable_changes_the_default_backend_and_leaves_the_rest_of_it(tmp_path: Path) -> None:
    env = {"PENSTOCK__BACKENDS__DSV3__ENGINE__CONTEXT_LENGTH": "8192"}
    section = config.load(environment=env, further=registry.configured).settings.backends["dsv3"]
    assert section == {"kind": "sglang_dsv3", "hosts": [{"launch": "local"}], "engine": {"context_length": 8192}}
    assert list(
        config.load(environment={"PENSTOCK__BACKENDS__X__KIND": "scripted", "PENSTOCK__MODELS__M__BACKEND": "x"}).settings.backends
    ) == ["x"]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"listen: \x00", b"#" * ((1 << 20) + 1)])
def test_a_file_that_is_no_text_or_too_large_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        config.load(tmp_path / "p.yaml", {})
    assert str(refused.value).startswith(f"{tmp_path}/p.yaml: ")
    assert "\n" not in str(refused.value)


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
