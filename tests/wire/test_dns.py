"""Hosts from DNS, from a real name server on loopback: addresses, services with weights and tiers, changes, and a server that is gone."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest

from tests.support import raw
from tests.support.processes import Gateway, Rehearsal, gateway, rehearsal, until

CHAT = "/v1/chat/completions"


class NameServer:
    """`records`: (name, type) -> what stands in the zone; nothing is NXDOMAIN."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, str], list[str]] = {}
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                data, peer = self._socket.recvfrom(4096)
                query = dns.message.from_wire(data)
                question = query.question[0]
                name, kind = question.name.to_text(omit_final_dot=True).lower(), dns.rdatatype.to_text(question.rdtype)
                response = dns.message.make_response(query)
                response.flags |= dns.flags.AA | dns.flags.RA
                found = self.records.get((name, kind))
                if found:
                    response.answer.append(dns.rrset.from_text(question.name, 0, "IN", kind, *found))
                elif not any(known == name for known, _ in self.records):
                    response.set_rcode(dns.rcode.NXDOMAIN)
                self._socket.sendto(response.to_wire(), peer)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def names() -> Iterator[NameServer]:
    server = NameServer()
    yield server
    server.close()


def settings(names: NameServer, **host: Any) -> dict[str, Any]:
    section = {"kind": "sglang_dsv3", "hosts": [host], "dns_server": names.address, "dns_refresh_s": 0.2, "health": {"slow_start_s": 0}}
    return {"models": {"deepseek-v3": {"backend": "d"}}, "backends": {"d": section}}


def port(host: Rehearsal) -> int:
    return int(host.url.rsplit(":", 1)[1])


def rows(running: Gateway) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in running.admin("/admin/hosts").json()["hosts"]}


def test_services_come_with_weights_and_tiers_and_change_without_a_restart(tmp_path: Path, names: NameServer) -> None:
    srv = ("_sglang._tcp.engines.test", "SRV")
    with rehearsal() as one, rehearsal() as two:
        names.records[srv] = [f"0 5 {port(one)} gpu1.engines.test.", f"10 3 {port(two)} gpu2.engines.test."]
        names.records["gpu1.engines.test", "A"] = names.records["gpu2.engines.test", "A"] = ["127.0.0.1"]
        with gateway(tmp_path, settings(names, url="http://_sglang._tcp.engines.test", resolve="srv")) as running:
            running.wait_ready()
            found = rows(running)
            assert {key: (row["weight"], row["priority"]) for key, row in found.items()} == {one.url[7:]: (5, 0), two.url[7:]: (3, 10)}
            assert [raw.call(running.port, "POST", CHAT, raw.chat("hi")).status for _ in range(4)] == [200] * 4
            assert (one.seen()["requests"], two.seen()["requests"]) == (4, 0)
            names.records[srv] = [f"0 1 {port(two)} gpu2.engines.test."]
            until("the first one is gone", lambda: set(rows(running)) == {two.url[7:]})
            assert raw.call(running.port, "POST", CHAT, raw.chat("hi")).status == 200
            assert two.seen()["requests"] == 1


@pytest.mark.slow
def test_a_name_is_all_of_its_addresses_and_stays_what_it_was_while_nobody_answers(tmp_path: Path, names: NameServer) -> None:
    with rehearsal() as one:
        names.records["engines.test", "A"] = ["127.0.0.1", "127.0.0.2"]
        with gateway(tmp_path, settings(names, url=f"http://engines.test:{port(one)}", resolve="a", weight=2)) as running:
            running.wait_ready()
            assert {key: row["weight"] for key, row in rows(running).items()} == {f"127.0.0.{n}:{port(one)}": 2 for n in (1, 2)}
            until("nobody listens on the second", lambda: rows(running)[f"127.0.0.2:{port(one)}"]["state"] == "down")
            names.close()
            until("it is said", lambda: "cannot be resolved, 2 hosts stay" in running.output())
            assert raw.call(running.port, "POST", CHAT, raw.chat("hi")).status == 200


def test_a_name_that_does_not_exist_is_said_so_and_found_when_it_does(tmp_path: Path, names: NameServer) -> None:
    with rehearsal() as one, gateway(tmp_path, settings(names, url=f"http://engines.test:{port(one)}", resolve="a")) as running:

        def said() -> bool:
            answer = raw.call(running.port, "POST", CHAT, raw.chat("hi"))
            return answer.status == 503 and "cannot be resolved" in answer.error()["message"]

        until("it is known", said)
        names.records["engines.test", "A"] = ["127.0.0.1"]
        running.wait_ready()
        assert raw.call(running.port, "POST", CHAT, raw.chat("hi")).status == 200
