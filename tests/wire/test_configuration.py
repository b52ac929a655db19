"""Configuration where files and processes are: what can only be known on the machine that will serve."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.support import raw
from tests.support.processes import Gateway, gateway, until
from tests.wire.test_command import penstock


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate of one's own and its key."""
    crt, key = folder / f"{name}.crt", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=h",
         "-keyout", key, "-out", crt],
        check=True, capture_output=True,
    )  # fmt: skip
    return crt, key


def encrypted(folder: Path, key: Path) -> Path:
    locked = folder / "locked.key"
    subprocess.run(["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:x", "-out", locked], check=True, capture_output=True)
    return locked


def checked(folder: Path, tls: dict[str, str]) -> subprocess.CompletedProcess[str]:
    (folder / "p.yaml").write_text(
        json.dumps({"listen": {"tls": tls}, "models": {"m": {"backend": "b"}}, "backends": {"b": {"kind": "scripted"}}})
    )
    return penstock("check", "-c", "p.yaml", folder=folder)


def test_a_listeners_certificate_is_tried_when_the_configuration_is_checked(tmp_path: Path) -> None:
    crt, key = certificate(tmp_path, "a")
    done = checked(tmp_path, {"cert_file": str(crt), "key_file": str(key), "client_ca_file": str(crt)})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("wrong", ["other key", "no file", "folder", "no certificate", "locked key", "no authority"])
def test_a_certificate_that_would_not_serve_is_refused_with_its_path(tmp_path: Path, wrong: str) -> None:
    crt, key = certificate(tmp_path, "a")
    tls = {"cert_file": str(crt), "key_file": str(key)}
    change, path, words = {
        "other key": ({"key_file": str(certificate(tmp_path, "b")[1])}, "listen.tls: ", "KEY_VALUES_MISMATCH"),
        "no file": ({"key_file": str(tmp_path / "none")}, "listen.tls.key_file: ", "No such file"),
        "folder": ({"cert_file": str(tmp_path)}, "listen.tls.cert_file: ", "Is a directory"),
        "no certificate": ({"cert_file": str(key)}, "listen.tls: ", "no PEM certificate"),
        "locked key": ({"key_file": str(encrypted(tmp_path, key))}, "listen.tls: ", "unencrypted key"),
        "no authority": ({"client_ca_file": str(key)}, "listen.tls.client_ca_file: ", "holds no PEM certificate"),
    }[wrong]
    done = checked(tmp_path, {**tls, **change})
    assert done.returncode == 2
    assert path in done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


SCRIPTED = {"models": {"m": {"backend": "s"}}, "backends": {"s": {"kind": "scripted"}}}
WRONG = """\
models:
  m: {backend: s, default_max_tokens: 0}
backends:
  s:
    kind: scripted
    health: {probe_s: never}
  d: {kind: sglang_dsv3, hosts: [{url: "http://10.0.0.1:300000"}]}
log: {levle: info}
"""
URLS = "http://HOST:PORT, https://HOST:PORT or unix:///PATH"
REFUSALS = [
    "penstock.yaml:2: models.m.default_max_tokens: 0 is out of range; accepted: 1 or more",
    "penstock.yaml:6: backends.s.health.probe_s: expected `float`, got `str`",
    f"penstock.yaml:7: backends.d.hosts.0.url: 'http://10.0.0.1:300000' has no port from 1 to 65535; accepted: {URLS}",
    "penstock.yaml:8: log.levle: unknown key; did you mean 'level'?",
]
FILES = """\
listen: {tls: {cert_file: none.crt, key_file: none.key}}
models: {m: {backend: s}, n: {backend: d, tokenizer: none.json}}
redis: {url: "redis://127.0.0.1:9", password_file: none.password}
backends:
  s: {kind: scripted}
  d: {kind: sglang_dsv3, hosts: [{url: "http://127.0.0.1:9"}], api_key_file: none.key, ca_file: none.pem}
"""
FILE_REFUSALS = [
    "penstock.yaml:1: listen.tls.cert_file: ",
    "penstock.yaml:1: listen.tls.key_file: ",
    "penstock.yaml:2: models.n.tokenizer: ",
    "penstock.yaml:3: redis.password_file: ",
    "penstock.yaml:6: backends.d.api_key_file: ",
    "penstock.yaml:6: backends.d.ca_file: ",
]


@pytest.mark.parametrize("command", ["check", "serve"])
def test_all_that_is_wrong_is_said_before_anything_starts(tmp_path: Path, command: str) -> None:
    (tmp_path / "penstock.yaml").write_text(WRONG)
    done = penstock(command, "-c", "penstock.yaml", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [f"penstock: {line}" for line in REFUSALS]
    (tmp_path / "penstock.yaml").write_text(FILES)
    done = penstock(command, "-c", "penstock.yaml", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert len(lines) == len(FILE_REFUSALS), done.stderr
    assert all(line.startswith(f"penstock: {begin}") for line, begin in zip(lines, FILE_REFUSALS, strict=True)), done.stderr


def test_a_reload_says_all_that_is_wrong_and_the_gateway_serves_on(tmp_path: Path) -> None:
    with gateway(tmp_path, SCRIPTED) as running:
        moved = json.dumps({**SCRIPTED, "timeouts": {"client_s": 7}, "redis": {"url": "redis://127.0.0.1:9"}})
        expected = [
            "penstock.yaml:1: timeouts.client_s: cannot change from 120.0 to 7.0 while the gateway runs: restart it",
            "penstock.yaml:1: redis: cannot change while the gateway runs: restart it",
        ]
        for text, lines in ((WRONG, REFUSALS), (moved, expected)):
            (tmp_path / "penstock.yaml").write_text(text)
            answer = running.admin("/admin/reload", "POST")
            assert answer.status == 400
            assert answer.json()["problem"].replace(f"{tmp_path}/", "").splitlines() == lines
            wait_for_line(running, tmp_path, "; ".join(lines))
        body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
        assert raw.call(running.port, "POST", "/v1/chat/completions", body).status == 200


def wait_for_line(running: Gateway, folder: Path, words: str) -> None:
    """Until the log says it."""

    def said() -> bool:
        lines = [json.loads(line) for line in running.output().splitlines() if line.startswith("{")]
        return any(words in line["message"].replace(f"{folder}/", "") for line in lines)

    until("the log has all of it", said)


def modes(folder: Path) -> dict[str, str]:
    """Who may do what with a folder and everything in it."""
    return {path.name: f"{path.stat().st_mode & 0o777:o}" for path in (folder, *folder.rglob("*"))}


def test_state_is_for_our_own_eyes_also_where_an_earlier_version_left_it_open(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "state").mkdir(parents=True, mode=0o755)
    (home / "state" / "usage.json").write_text("{}")
    (home / "state").chmod(0o755)
    (home / "state" / "usage.json").chmod(0o644)
    config = {
        "models": {"m": {"backend": "s"}, "tiny": {"backend": "d"}},
        "backends": {"s": {"kind": "scripted"}, "d": {"kind": "sglang_dsv3", "hosts": [{"launch": "local"}]}},
    }
    with gateway(tmp_path / "run", config, PENSTOCK_HOME=str(home)) as running:
        until("the supervisor has begun its log", lambda: (home / "state" / "d-local-0.log").exists())
        body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
        assert raw.call(running.port, "POST", "/v1/chat/completions", json.dumps(body).encode()).status == 200
    assert json.loads((home / "state" / "usage.json").read_text()) != {}
    assert modes(home / "state") == {"state": "700", "usage.json": "600", "usage.lock": "600", "d-local-0.log": "600"}


def test_a_ledger_elsewhere_is_private_and_the_folder_of_others_stays_as_it_is(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o755)
    config = {"models": {"m": {"backend": "s"}}, "backends": {"s": {"kind": "scripted"}}}
    for place in (shared, tmp_path / "new"):
        with gateway(
            tmp_path / "run", {**config, "limits": {"ledger_file": str(place / "l.json")}}, PENSTOCK_HOME=str(tmp_path)
        ) as running:
            body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
            assert raw.call(running.port, "POST", "/v1/chat/completions", json.dumps(body).encode()).status == 200
    assert modes(shared) == {"shared": "755", "l.json": "600", "l.lock": "600"}
    assert modes(tmp_path / "new") == {"new": "700", "l.json": "600", "l.lock": "600"}
