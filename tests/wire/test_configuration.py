"""Configuration where files and processes are: what can only be known on the machine that will serve."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.support import raw
from tests.support.processes import gateway, until
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
