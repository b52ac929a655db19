"""Requests as a list, and the admin API as it changes: what the console is made of, asked without one."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.access.keys import hashed
from gateway.admin import events
from gateway.telemetry import listing
from tests.support import raw
from tests.support.processes import Gateway, Rehearsal, gateway, until
from tests.wire.test_command import penstock

CHAT = "/v1/chat/completions"
LIMITED = {"authorization": "Bearer limited"}
FREE = {"authorization": "Bearer free"}
LOOKER = {"authorization": "Bearer looker"}


@pytest.fixture(scope="module")
def keyed(scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    config = {
        **scripted_sglang.backend(),
        "listen": {"workers": 1},
        "keys": [{"name": "free", "hash": hashed("free")}, {"name": "limited", "hash": hashed("limited"), "rpm": 1}],
        "admin": {"keys": [{"name": "looker", "hash": hashed("looker"), "role": "read"}]},
    }
    with gateway(tmp_path_factory.mktemp("keyed"), config) as running:
        running.wait_ready()
        yield running


def listed(running: Gateway, query: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = running.admin(f"/admin/requests?{query}", headers=LOOKER).json()["requests"]
    return found


def test_requests_are_found_by_how_they_are_or_were(keyed: Gateway) -> None:
    ids = {
        name: json.loads(raw.call(keyed.port, "POST", CHAT, raw.chat(prompt), FREE).body).get("id", "")
        for name, prompt in {
            "quick": "[[tokens 1]]",
            "slow": "[[tokens 20]] [[pace 0.03]]",
            "broken": "[[refuse 500]] a prompt of theirs",
        }.items()
    }
    assert raw.call(keyed.port, "POST", CHAT, raw.chat("hi"), LIMITED).status == 200
    assert raw.call(keyed.port, "POST", CHAT, raw.chat("hi"), LIMITED).status == 429
    assert raw.call(keyed.port, "POST", CHAT, raw.chat("hi"), {"authorization": "Bearer nobody"}).status == 401
    recent = listed(keyed, "last=200")
    assert [row["id"] for row in recent if row["key"] == "free"][::-1][:2] == [ids["quick"], ids["slow"]], "the newest first"
    assert [row["at"] for row in recent] == sorted((row["at"] for row in recent), reverse=True)
    assert listed(keyed, "state=slow&last=1")[0]["id"] == ids["slow"]
    (failed,) = listed(keyed, "state=failed")
    assert (failed["key"], failed["status"], failed["tried"]) == ("free", 502, 1)
    assert failed["verdict"].startswith("failed: ")
    refused = listed(keyed, "state=refused")
    assert {(row["outcome"], row["key"], row["status"]) for row in refused} == {("limited", "limited", 429), ("unauthorized", "", 401)}
    assert any("requests a minute" in row["verdict"] or "rpm" in row["verdict"] for row in refused)
    assert {row["key"] for row in listed(keyed, "key=limited")} == {"limited"}
    assert listed(keyed, "model=nobody") == []
    assert {row["host"] for row in listed(keyed, f"host={failed['host']}")} == {failed["host"]}
    assert "a prompt of theirs" not in json.dumps(recent)
    explained = keyed.admin(f"/admin/requests/{ids['slow']}", headers=LOOKER).json()
    (attempt,) = explained["attempts"]
    assert attempt["began_ms"] < attempt["ended_ms"] <= explained["ms"]
    shown = penstock("requests", "--slow", "--last", "1", "--admin", keyed.admin_url, folder=keyed.log.parent)
    assert ids["slow"] in shown.stdout, shown.stderr


def test_open_requests_say_what_they_wait_for(keyed: Gateway) -> None:
    with raw.connect(keyed.port) as peer:
        body = json.dumps(raw.chat("[[tokens 400]] [[pace 0.1]]", stream=True)).encode()
        peer.sendall(raw.request("POST", CHAT, body, {**FREE, "content-length": str(len(body)), "x-request-id": "it-is-open"}))
        (row,) = until("it is listed", lambda: [row for row in listed(keyed, "state=open") if row["why"] == "engine: generating"])
        assert (row["request_id"], row["key"], row["status"], row["outcome"]) == ("it-is-open", "free", 200, "open")
        assert row["host"]
    until("it has ended", lambda: not listed(keyed, "state=open"))
    until("and is remembered", lambda: any(row["outcome"] == "client_gone" for row in listed(keyed, "last=1")))


@pytest.mark.parametrize(
    ("query", "param", "words"),
    [
        ("state=failled", "state", "did you mean 'failed'?"),
        ("sate=open", "sate", "did you mean 'state'?"),
        ("last=0", "last", f"1 to {listing.MAX_LISTED}"),
        (f"last={listing.MAX_LISTED + 1}", "last", f"1 to {listing.MAX_LISTED}"),
        ("every_s=0", "every_s", "0.2 to 60 seconds"),
        ("every_s=nan", "every_s", "0.2 to 60 seconds"),
    ],
)
def test_what_is_asked_wrongly_is_refused_in_a_line(keyed: Gateway, query: str, param: str, words: str) -> None:
    for path in ("/admin/events",) if param == "every_s" else ("/admin/requests", "/admin/events"):
        answer = keyed.admin(f"{path}?{query}", headers=LOOKER)
        assert (answer.status, answer.error()["param"]) == (400, param)
        assert words in answer.error()["message"]


def test_a_key_says_whose_it_is(keyed: Gateway) -> None:
    assert keyed.admin("/admin/operator", headers=LOOKER).json() == {"name": "looker", "role": "read"}
    assert keyed.admin("/admin/operator").json() == {"name": "local", "role": "all"}


class Stream:
    """An open stream of events."""

    def __init__(self, running: Gateway, query: str = "", headers: dict[str, str] = LOOKER) -> None:
        self.peer = raw.connect(running.admin_port)
        self.peer.sendall(raw.request("GET", f"/admin/events?{query}", headers=headers))
        self._file = self.peer.makefile("rb")
        self.status = int(self._file.readline().split()[1])
        while self._file.readline().strip():
            pass

    def event(self) -> tuple[str, Any]:
        """The next one; an empty name at the end."""
        name = ""
        while line := self._file.readline():
            if line.startswith(b"event: "):
                name = line[7:].strip().decode()
            elif line.startswith(b"data: "):
                return name, json.loads(line[6:])
        return "", None

    def close(self) -> None:
        self._file.close()
        self.peer.close()


def test_events_are_what_a_get_answers_and_come_when_it_changes(keyed: Gateway) -> None:
    stream = Stream(keyed, "every_s=0.2&state=failed")
    try:
        first = dict(stream.event() for _ in range(6))
        assert set(first) == {"ready", "workers", "hosts", "keys", "usage", "requests"}
        assert first["ready"] == {"status": "ready"}
        assert first["keys"] == keyed.admin("/admin/keys", headers=LOOKER).json()
        assert all(row["outcome"] not in ("ok", "limited") for row in first["requests"]["requests"])
        host = first["hosts"]["hosts"][0]["id"]
        assert keyed.admin(f"/admin/hosts/{host}/drain", "POST").status == 200
        try:
            latest = first
            while latest["hosts"]["hosts"][0]["state"] != "drained" or "error" not in latest["ready"]:
                name, found = stream.event()
                assert name not in ("", "keys", "usage"), "what has not changed is not said again"
                latest[name] = found
            assert latest["ready"]["error"]["code"] == "engine_unavailable", "an error is what the GET would answer, too"
        finally:
            keyed.admin(f"/admin/hosts/{host}/undrain", "POST")
    finally:
        stream.close()


def test_a_stream_wants_a_key_and_there_are_only_so_many(keyed: Gateway) -> None:
    assert keyed.admin("/admin/events", "POST").status == 405
    refused = Stream(keyed, headers={"authorization": "Bearer free"})
    assert refused.status == 401
    refused.close()
    streams = [Stream(keyed, "every_s=60") for _ in range(events.MAX_STREAMS)]
    try:
        assert {stream.status for stream in streams} == {200}
        full = keyed.admin("/admin/events", headers=LOOKER)
        assert (full.status, full.error()["code"]) == (503, "too_many_streams")
    finally:
        for stream in streams:
            stream.close()
    until("there is room again", lambda: _opens(keyed))


def _opens(running: Gateway) -> bool:
    stream = Stream(running)
    stream.close()
    return stream.status == 200


def test_a_stream_ends_when_its_key_is_taken_away(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    config = {**scripted_sglang.backend(), "admin": {"keys": [{"name": "looker", "hash": hashed("looker"), "role": "read"}]}}
    with gateway(tmp_path, config) as running:
        running.wait_ready()
        stream = Stream(running, "every_s=0.2")
        assert stream.event()[0]
        written = (tmp_path / "penstock.yaml").read_text()
        (tmp_path / "penstock.yaml").write_text(written.replace(hashed("looker"), hashed("another")))
        assert running.admin("/admin/reload", "POST").status == 200
        deadline = time.monotonic() + 30
        while stream.event()[0]:
            assert time.monotonic() < deadline, "it goes on"
        stream.close()
        # And a stream that is open keeps nobody from stopping, which the gateway's end asserts.
        left = Stream(running, "every_s=60", headers={"authorization": f"Bearer {running.admin_key()}"})
        assert left.event()[0]
    assert left.peer.recv(1 << 20) is not None
    left.close()


def test_a_client_that_is_gone_leaves_no_stream(keyed: Gateway) -> None:
    for _ in range(events.MAX_STREAMS + 4):
        stream = Stream(keyed, "every_s=0.2")
        assert stream.status == 200 or until("one has ended", lambda: _opens(keyed))
        stream.peer.shutdown(socket.SHUT_RDWR)
        stream.close()
