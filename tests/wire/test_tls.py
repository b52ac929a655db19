"""The public listener with a certificate of its own: real handshakes, certificates that are replaced under load, clients that need one."""

from __future__ import annotations

import json
import signal
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support import raw
from tests.support.processes import Gateway, Rehearsal, gateway, until

CHAT = "/v1/chat/completions"


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that vouches for itself, and its key."""
    crt, key = folder / f"{name}.crt", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", crt],
        check=True, capture_output=True,
    )  # fmt: skip
    return crt, key


def trusting(*certificates: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for found in certificates:
        context.load_verify_locations(found)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


def connect(running: Gateway, context: ssl.SSLContext) -> ssl.SSLSocket:
    return context.wrap_socket(raw.connect(running.port), server_hostname="127.0.0.1")


def subject(peer: ssl.SSLSocket) -> str:
    found: Any = peer.getpeercert()
    return str(found["subject"][0][0][1])


def ask(running: Gateway, context: ssl.SSLContext, path: str = "/readyz") -> int:
    try:
        with connect(running, context) as peer:
            peer.sendall(raw.request("GET", path))
            return raw.read(peer).status
    except (OSError, IndexError):  # with TLS 1.3 a refusal comes after the client's side of the handshake
        return 0


@pytest.fixture
def secure(folder: Path, scripted_sglang: Rehearsal) -> Iterator[tuple[Gateway, ssl.SSLContext]]:
    crt, key = certificate(folder, "first")
    tls = {"cert_file": str(folder / "live.crt"), "key_file": str(folder / "live.key")}
    (folder / "live.crt").write_bytes(crt.read_bytes())
    (folder / "live.key").write_bytes(key.read_bytes())
    certificate(folder, "second")
    context = trusting(crt, folder / "second.crt")
    with gateway(folder, {**scripted_sglang.backend(), "listen": {"tls": tls}}) as running:
        until("it is ready", lambda: ask(running, context) == 200)
        yield running, context


def test_clients_are_served_over_tls(secure: tuple[Gateway, ssl.SSLContext], folder: Path) -> None:
    running, context = secure
    assert running.root.startswith("https://")
    with connect(running, context) as peer:
        assert peer.version() in ("TLSv1.3", "TLSv1.2")
        assert peer.selected_alpn_protocol() == "http/1.1"
        for stream in (False, True):
            peer.sendall(raw.request("POST", CHAT, json.dumps(raw.chat("hi", stream=stream)).encode(), {"connection": "keep-alive"}))
            ending, got = (b"0\r\n\r\n", b"") if stream else (b'"}}', b"")
            while not got.endswith(ending):
                part = peer.recv(65536)
                assert part, got
                got += part
            assert got.startswith(b"HTTP/1.1 200 ")
    curl = ["curl", "-sS", "--cacert", str(folder / "first.crt"), f"{running.base_url}/models", "-w", "%{http_version}"]
    assert subprocess.run(curl, capture_output=True, text=True, check=True, timeout=30).stdout.endswith("1.1")
    with (
        openai.DefaultHttpxClient(verify=context) as http,
        openai.OpenAI(base_url=running.base_url, api_key="x", http_client=http) as client,
    ):
        body: Any = raw.chat("[[tokens 3]]")
        assert client.chat.completions.create(**body).choices[0].finish_reason == "stop"
        assert list(client.chat.completions.create(**body, stream=True))[-1].choices[0].finish_reason == "stop"


def test_a_refusal_reaches_a_client_in_the_middle_of_its_upload(secure: tuple[Gateway, ssl.SSLContext]) -> None:
    running, context = secure
    with connect(running, context) as peer:
        peer.sendall(b"POST /nope HTTP/1.1\r\nhost: x\r\ncontent-length: 5000000\r\n\r\n")
        for _ in range(50):
            peer.sendall(b" " * 100_000)
        assert raw.rest(peer).startswith(b"HTTP/1.1 404 ")


def test_a_client_that_leaves_is_noticed(secure: tuple[Gateway, ssl.SSLContext], scripted_sglang: Rehearsal) -> None:
    running, context = secure
    with connect(running, context) as peer:
        peer.sendall(raw.request("POST", CHAT, json.dumps(raw.chat("[[stall 2]]", stream=True)).encode()))
        assert peer.recv(1024).startswith(b"HTTP/1.1 200 ")
        rid = json.loads(scripted_sglang.seen()["last_body"])["rid"]
    until("its generation is aborted", lambda: rid in scripted_sglang.seen()["aborted"])


def test_a_certificate_is_read_again_at_a_reload_and_streams_go_on(secure: tuple[Gateway, ssl.SSLContext], folder: Path) -> None:
    running, context = secure
    with connect(running, context) as old:
        old.sendall(raw.request("POST", CHAT, json.dumps(raw.chat("[[tokens 60]] [[pace 0.1]]", stream=True)).encode()))
        assert subject(old) == "first"
        assert old.recv(1024).startswith(b"HTTP/1.1 200 ")
        for suffix in ("crt", "key"):
            (folder / f"live.{suffix}").write_bytes((folder / f"second.{suffix}").read_bytes())
        running.process.send_signal(signal.SIGHUP)
        until("the second generation serves", lambda: "generation 2 serves" in running.output())
        with connect(running, context) as new:
            assert subject(new) == "second"
        assert raw.rest(old).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_who_speaks_no_tls_is_closed_and_leaves_no_traceback(secure: tuple[Gateway, ssl.SSLContext]) -> None:
    running, context = secure
    with raw.connect(running.port) as peer:
        peer.sendall(raw.request("GET", "/v1/models"))
        assert not raw.rest(peer).startswith(b"HTTP/1.1 200 ")
    with pytest.raises(ssl.SSLError), raw.connect(running.port) as peer:
        ssl.create_default_context().wrap_socket(peer, server_hostname="127.0.0.1")
    assert ask(running, context) == 200
    assert "Traceback" not in running.output()


def test_a_handshake_that_does_not_come_is_given_up(folder: Path, scripted_sglang: Rehearsal) -> None:
    crt, key = certificate(folder, "first")
    settings = {"listen": {"tls": {"cert_file": str(crt), "key_file": str(key)}}, "timeouts": {"head_s": 1}}
    with gateway(folder, {**scripted_sglang.backend(), **settings}) as running, raw.connect(running.port) as peer:
        assert raw.rest(peer) == b""


def test_clients_may_have_to_show_a_certificate(folder: Path, scripted_sglang: Rehearsal) -> None:
    crt, key = certificate(folder, "server")
    own_crt, own_key = certificate(folder, "client")
    tls = {"cert_file": str(crt), "key_file": str(key), "client_ca_file": str(own_crt)}
    with gateway(folder, {**scripted_sglang.backend(), "listen": {"tls": tls}}) as running:
        known = trusting(crt)
        known.load_cert_chain(own_crt, own_key)
        until("it is ready", lambda: ask(running, known) == 200)
        assert ask(running, trusting(crt)) == 0
        foreign_crt, foreign_key = certificate(folder, "foreign")
        foreign = trusting(crt)
        foreign.load_cert_chain(foreign_crt, foreign_key)
        assert ask(running, foreign) == 0
        assert ask(running, known, "/v1/models") == 200
