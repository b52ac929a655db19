"""The JSON schema of a configuration says what the loader says, as far as a schema can; and what looks like a variable of ours is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import yaml

from gateway import config
from gateway.errors import ConfigError
from gateway.serving import registry
from tests.support.processes import ROOT

SCHEMA = registry.schema()
JUDGE = jsonschema.Draft202012Validator(SCHEMA)
EDITOR = "# yaml-language-server: $schema="
EXAMPLES = sorted([*(ROOT / "deploy" / "engine").glob("*.yaml"), *(ROOT / "deploy" / "compose").glob("*.yaml")])
WELL: dict[str, Any] = {"models": {"m": {"backend": "b"}}, "backends": {"b": {"kind": "sglang_dsv3", "hosts": [{"url": "http://h:1"}]}}}


def refused(tree: Any) -> list[str]:
    return [".".join(map(str, error.absolute_path)) for error in JUDGE.iter_errors(tree)]


def test_it_is_a_schema_and_the_file_for_editors_is_this_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert json.loads((ROOT / "deploy" / "penstock.schema.json").read_text()) == SCHEMA
    described = [rule for rule in SCHEMA["$defs"]["Timeouts"]["properties"].values() if rule.get("description")]
    assert len(described) == len(SCHEMA["$defs"]["Timeouts"]["properties"]), "an editor shows what each setting means"


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_every_example_names_it_and_holds_to_it(file: Path) -> None:
    first = file.read_text().splitlines()[0]
    assert first.startswith(EDITOR)
    assert (file.parent / first.removeprefix(EDITOR)).resolve() == ROOT / "deploy" / "penstock.schema.json"
    assert refused(yaml.safe_load(file.read_text())) == []


def test_the_defaults_and_a_whole_configuration_hold_to_it() -> None:
    settings = config.load(None, environment={}).settings
    tree = msgspec.to_builtins(settings)
    for name, found in registry.configured(settings).items():
        whole = {"kind": found.plugin.kind, **msgspec.to_builtins(found.section), "health": msgspec.to_builtins(found.health)}
        tree["backends"][name] = whole
    assert refused(tree) == []


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"lisen": {}}, ""),
        ({"listen": {"port": 70_000}}, "listen.port"),
        ({"listen": {"prot": 1}}, "listen"),
        ({"timeouts": {"connect_s": 0}}, "timeouts.connect_s"),
        ({"log": {"level": "loud"}}, "log.level"),
        ({"keys": [{"name": "a b", "hash": "sha256:" + "0" * 64}]}, "keys.0.name"),
        ({"keys": [{"name": "a", "hash": "the key itself"}]}, "keys.0.hash"),
        ({"backends": {"b": {"kind": "nope"}}}, "backends.b.kind"),
        ({"backends": {"b": {**WELL["backends"]["b"], "hots": []}}}, "backends.b"),
        ({"backends": {"b": {**WELL["backends"]["b"], "health": {"probe_s": "never"}}}}, "backends.b.health.probe_s"),
        ({"backends": {"b": {"kind": "sglang_dsv3", "hosts": [{"url": "http://h:1", "weight": -1}]}}}, "backends.b.hosts.0.weight"),
    ],
)
def test_what_an_editor_marks_the_loader_refuses_too(tmp_path: Path, wrong: dict[str, Any], where: str) -> None:
    assert refused(WELL) == []
    assert where in refused({**WELL, **wrong})
    (tmp_path / "p.yaml").write_text(json.dumps({**WELL, **wrong}))
    with pytest.raises(ConfigError):
        config.load(tmp_path / "p.yaml", environment={}, further=registry.configured)


def test_variables_that_are_not_understood_are_named() -> None:
    given = {
        "PENSTOCK_LISTEN_PORT": "1", "PENSTOCK_TIMEOUTS_CONNECT_S": "1", "PENSTOCK_HOEM": "/x", "PENSTOCK_ZZZ": "1",
        "PENSTOCK_HOME": "/x", "PENSTOCK_ADMIN_KEY": "k", "PENSTOCK__LISTEN__PORT": "1", "PATH": "/bin",
    }  # fmt: skip
    assert list(config.strangers(given)) == [
        "environment PENSTOCK_HOEM: is not understood; did you mean PENSTOCK_HOME?",
        "environment PENSTOCK_LISTEN_PORT: is not understood; did you mean PENSTOCK__LISTEN__PORT?",
        "environment PENSTOCK_TIMEOUTS_CONNECT_S: is not understood; did you mean PENSTOCK__TIMEOUTS__CONNECT_S?",
        "environment PENSTOCK_ZZZ: is not understood",
    ]
    of_kubernetes = {"PENSTOCK_SERVICE_HOST": "", "PENSTOCK_PORT_8000_TCP_ADDR": "", "PENSTOCK_ADMIN_SERVICE_PORT_HTTP": ""}
    assert list(config.strangers({**of_kubernetes, "KUBERNETES_SERVICE_HOST": "10.0.0.1"})) == []
    assert len(list(config.strangers(of_kubernetes))) == 3
