"""Every fault a host can have, before and after an answer has begun, as JSON and as a stream, and what exactly the client sees.

Faults that a scripted SGLang server has on command, as a process; what it cannot do (refuse, accept and say nothing, break HTTP) is a
socket written by hand. Cells that make no sense are named in VOID.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.support import raw
from tests.support.processes import Gateway, Rehearsal, gateway, rehearsal, until

CHAT = "/v1/chat/completions"
TEXT = "".join(f"token {number} " for number in range(8))
TIMEOUTS = {"connect_s": 0.5, "first_token_s": 0.7, "between_tokens_s": 0.7, "request_s": 2}
OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
JSON_OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{"


def event(content: str, role: bool = False) -> bytes:
    delta = {"role": "assistant", "content": ""} if role else {"content": content}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
    chunk = {"id": "x", "object": "chat.completion.chunk", "created": 7, "model": "m", "choices": [choice]}
    data = b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


BEGUN = OK + event("", role=True) + event("token 0 ")


class Raw:
    """A host written by hand: probes are answered, everything else gets `says` (stream or JSON), and then `ends`."""

    def __init__(self) -> None:
        self.says, self.json_says, self.ends = b"", b"", "close"
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        with contextlib.suppress(OSError), peer:
            got = b""
            while b"\r\n\r\n" not in got:
                part = peer.recv(65536)
                if not part:
                    return
                got += part
            if got.startswith(b"GET"):
                info = b'{"model_path":"rehearsal","weight_version":"default","architectures":["DeepseekV3ForCausalLM"],"loads":[]}'
                peer.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(info) + info)
                return
            while b"}" not in got.partition(b"\r\n\r\n")[2]:
                got += peer.recv(65536)
            peer.sendall(self.says if b'"stream":true' in got.replace(b" ", b"") else self.json_says)
            if self.ends == "half-close":
                peer.shutdown(socket.SHUT_WR)
            if self.ends != "close":
                self._open.append(peer)
                while peer.recv(65536):
                    pass

    def close(self) -> None:
        self._socket.close()


# Faults: what the first host does (a command for the scripted server, or bytes by hand), before the first event and after two.
BEFORE: dict[str, Any] = {
    "refuse the connection": "refused",
    "accept and never answer": (b"", b"", "hold"),
    "200, then die": (OK, JSON_OK, "close"),
    "200, then silence": (OK, JSON_OK, "hold"),
    "stall": "[[stall 0]]",
    "die": "[[die 0]]",
    "error as first event": "[[first-error 500]]",
    "500": "[[refuse 500]]",
    "503 busy": "[[refuse 503]]",
    "busy as first event": "[[first-error 503]]",
    "503 busy with retry-after": (*[b"HTTP/1.1 503 Busy\r\nretry-after: 5\r\ncontent-length: 0\r\n\r\n"] * 2, "close"),
    "slow head": (b"HTTP/1.1 200 O", b"HTTP/1.1 200 O", "hold"),
    "garbage": (b"\x00\xff not HTTP at all\r\n\r\n", b"\x00\xff not HTTP at all\r\n\r\n", "close"),
    "neither JSON nor events": "[[garbage]]",
    "an event without an end": "[[endless]]",
    "a truncated chunk": (OK + b"400\r\ndata: {", JSON_OK, "close"),
    "half-close": (OK, JSON_OK, "half-close"),
    "abort": "[[abort 0]]",
}
AFTER: dict[str, Any] = {
    "die": "[[die 3]]",
    "a clean end": "[[cut 3]]",
    "stall": "[[stall 3]]",
    "false [DONE]": "[[false-done 3]]",
    "abort": "[[abort 3]]",
    "error event": "[[mid-error 3]]",
    "a truncated chunk": (BEGUN + b"400\r\ndata: {", b"", "close"),
    "garbage": (BEGUN + b"zz\r\n\x00\xff", b"", "close"),
    "half-close": (BEGUN, b"", "half-close"),
    "silence": (BEGUN, b"", "hold"),
}
# Void: a JSON answer has no first event that could be an error, and nothing between its first byte and its last that could be told apart:
# it is buffered, so every fault of it is one before the commit point (the rows of BEFORE).
VOID = {("error as first event", False), ("busy as first event", False), ("an event without an end", False)}
# Silence: of a JSON answer nothing comes before it is whole, so a dead engine cannot be told from one that is thinking.
SILENT = ("accept and never answer", "200, then silence", "stall", "slow head")


class Pair:
    """Two hosts behind a gateway: the first one has faults, the second is well; the first is asked first."""

    def __init__(self, running: Gateway, scripted: Rehearsal, well: Rehearsal, by_hand: Raw) -> None:
        self.running = running
        self.scripted = scripted
        self.well = well
        self.by_hand = by_hand


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    by_hand = Raw()
    with rehearsal() as scripted, rehearsal() as well, contextlib.closing(by_hand), socket.create_server(("127.0.0.1", 0)) as nobody:
        refusing = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        nobody.close()
        health = {"max_ejected_share": 0, "slow_start_s": 0, "wedged_s": 60}
        backends, models = {}, {}
        for name, first in (("scripted", scripted.url), ("by_hand", by_hand.url), ("refused", refusing)):
            for mode in ("text", "off"):
                hosts = [{"url": first, "weight": 100_000}, {"url": well.url, "weight": 1}]
                backends[f"{name}-{mode}"] = {"kind": "sglang_dsv3", "hosts": hosts, "health": health}
                models[f"{name}-{mode}"] = {"backend": f"{name}-{mode}", "continuation": mode, "balance": "weighted_round_robin"}
        with gateway(tmp_path_factory.mktemp("pair"), {"models": models, "backends": backends, "timeouts": TIMEOUTS}) as running:
            running.wait_ready()
            until("capacities are known", lambda: all(
                host["capacity"] for host in running.admin("/admin/hosts").json()["hosts"] if host["id"] in (scripted.url[7:], well.url[7:])
            ))  # fmt: skip
            yield Pair(running, scripted, well, by_hand)


def prepare(pair: Pair, fault: Any, mode: str) -> dict[str, Any]:
    """The request that meets a fault at the first host and none at the second."""
    until("nobody is avoided for having been busy", lambda: not any(
        "busy" in host["why"] for host in pair.running.admin("/admin/hosts").json()["hosts"]
    ))  # fmt: skip
    if fault == "refused":
        return {**raw.chat("hi"), "model": f"refused-{mode}"}
    if isinstance(fault, str):
        # Only the first host obeys: the second has been told not to.
        return {**raw.chat(fault), "model": f"scripted-{mode}"}
    pair.by_hand.says, pair.by_hand.json_says, pair.by_hand.ends = fault
    return {**raw.chat("hi"), "model": f"by_hand-{mode}"}


@pytest.fixture(autouse=True, scope="module")
def obedient(pair: Pair) -> None:
    """The second host ignores commands."""
    request = raw.request("POST", "/rehearsal", b'{"deaf": true}')
    with raw.connect(int(pair.well.url.rsplit(":", 1)[1])) as peer:
        peer.sendall(request)
        assert raw.read(peer).status == 200


@pytest.mark.parametrize("stream", [False, True], ids=["JSON", "SSE"])
@pytest.mark.parametrize("name", BEFORE)
def test_before_the_first_event_another_host_answers_unseen(pair: Pair, name: str, stream: bool) -> None:
    if (name, stream) in VOID:
        fault: Any = "[[refuse 500]]"  # what such a fault is for JSON
    else:
        fault = BEFORE[name]
    body = prepare(pair, fault, "text")
    if name in SILENT and not stream:
        answer = raw.call(pair.running.port, "POST", CHAT, body)
        assert (answer.status, answer.error()["code"]) == (504, "engine_timeout")
        return
    before = pair.well.seen()["requests"]
    with openai.OpenAI(base_url=pair.running.base_url, api_key="none", max_retries=0, timeout=20) as client:
        chat: Any = client.chat.completions
        if stream:
            chunks = list(chat.create(**body, stream=True))
            text, finish = "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1].choices[0].finish_reason
        else:
            answer = chat.create(**body)
            text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (text, finish) == (TEXT, "stop")
    assert pair.well.seen()["requests"] == before + 1


@pytest.mark.parametrize("name", AFTER)
def test_after_the_first_event_the_answer_goes_on_elsewhere(pair: Pair, name: str) -> None:
    body = prepare(pair, AFTER[name], "text")
    answer = raw.call(pair.running.port, "POST", CHAT, {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert answer.status == 200
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert answer.body.count(b": continued on another host\n\n") == 1
    chunks = [json.loads(part[6:]) for part in answer.body.split(b"\n\n") if part.startswith(b"data: {")]
    assert "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]) == TEXT
    assert sum("role" in choice["delta"] for chunk in chunks for choice in chunk["choices"]) == 1
    assert len({chunk["created"] for chunk in chunks}) == 1
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    assert [(usage["completion_tokens"], usage["total_tokens"] - usage["prompt_tokens"]) for usage in usages] == [(8, 8)]


@pytest.mark.parametrize("name", AFTER)
def test_with_continuation_off_it_ends_in_an_error_event(pair: Pair, name: str) -> None:
    body = prepare(pair, AFTER[name], "off")
    with openai.OpenAI(base_url=pair.running.base_url, api_key="none", max_retries=0, timeout=20) as client:
        chat: Any = client.chat.completions
        text = ""
        with pytest.raises(openai.APIError) as broken:
            for chunk in chat.create(**body, stream=True):
                text += chunk.choices[0].delta.content or ""
    assert TEXT.startswith(text)
    assert text
    assert "req_" in str(broken.value)


def test_a_client_fault_is_asked_of_one_host_only(pair: Pair) -> None:
    before = pair.well.seen()["requests"]
    answer = raw.call(pair.running.port, "POST", CHAT, prepare(pair, "[[refuse 400]]", "text"))
    assert (answer.status, answer.error()["code"]) == (400, "context_length_exceeded")
    assert pair.well.seen()["requests"] == before


def test_what_moved_is_counted_and_logged(pair: Pair) -> None:
    raw.call(pair.running.port, "POST", CHAT, {**prepare(pair, "[[die 3]]", "text"), "stream": True}, {"x-request-id": "moved"})
    line = until("it is logged", lambda: [found for found in pair.running.requests() if found["request_id"] == "moved"])[0]
    assert (line["attempts"], line["continuations"], line["completion_tokens"]) == (2, 1, 8)
    metrics = pair.running.admin("/metrics").body.decode()
    target = pair.scripted.url[7:]
    assert f'penstock_attempts_total{{target="{target}",result="cut"}}' in metrics
    assert "penstock_continuations_total" in metrics


def hosts(running: Gateway) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in running.admin("/admin/hosts").json()["hosts"]}


def control(host: Rehearsal, **settings: Any) -> None:
    with raw.connect(int(host.url.rsplit(":", 1)[1])) as peer:
        peer.sendall(raw.request("POST", "/rehearsal", json.dumps(settings).encode()))
        assert raw.read(peer).status == 200


@contextlib.contextmanager
def behind(folder: Any, *several: Rehearsal, health: dict[str, Any] | None = None, **settings: Any) -> Iterator[Gateway]:
    section = {"kind": "sglang_dsv3", "hosts": [{"url": host.url} for host in several], "health": {"slow_start_s": 0, **(health or {})}}
    config = {"models": {"deepseek-v3": {"backend": "d"}}, "backends": {"d": section}, **settings}
    with gateway(folder, config) as running:
        running.wait_ready()
        running.wait_all_hosts()
        yield running


def test_different_weights_are_never_joined(tmp_path: Any) -> None:
    with rehearsal() as one, rehearsal() as two:
        control(two, weight_version="other")
        with behind(tmp_path, one, two) as running:
            answers = [raw.call(running.port, "POST", CHAT, raw.chat("[[die 3]]", stream=True)).body for _ in range(4)]
        assert all(b'data: {"error":{' in body and b"[DONE]" not in body for body in answers)


def test_a_host_that_drains_gets_nothing_new_and_is_back_when_it_is(tmp_path: Any) -> None:
    with rehearsal() as one, rehearsal() as two, behind(tmp_path, one, two) as running:
        control(one, ready=503)
        until("it is out", lambda: hosts(running)[one.url[7:]]["state"] == "down")
        before = one.seen()["requests"]
        assert [raw.call(running.port, "POST", CHAT, raw.chat("hi")).status for _ in range(6)] == [200] * 6
        assert one.seen()["requests"] == before
        control(one, ready=200)
        until("it is back", lambda: hosts(running)[one.url[7:]]["state"] == "ok")


def test_the_operator_drains_and_undrains(tmp_path: Any) -> None:
    with rehearsal() as one, rehearsal() as two, behind(tmp_path, one, two) as running:
        target = one.url[7:]
        peers = [raw.connect(running.port) for _ in range(6)]
        for peer in peers:
            peer.sendall(raw.request("POST", CHAT, json.dumps(raw.chat("[[tokens 15]] [[pace 0.1]]", stream=True)).encode()))
        assert all(peer.recv(1024) for peer in peers)
        answer = running.admin(f"/admin/hosts/{target}/drain", "POST")
        assert answer.status == 200
        until("it drains", lambda: hosts(running)[target]["state"] in ("draining", "drained"))
        before = one.seen()["requests"]
        assert [raw.call(running.port, "POST", CHAT, raw.chat("hi")).status for _ in range(6)] == [200] * 6
        assert one.seen()["requests"] == before
        for peer in peers:
            got = b""
            with peer:
                while part := peer.recv(65536):
                    got += part
            assert got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), "its streams finish"
        until("it is drained", lambda: hosts(running)[target]["state"] == "drained")
        assert running.admin("/admin/reload", "POST").status == 200
        until("a reload keeps that", lambda: hosts(running)[target]["state"] == "drained")
        running.admin(f"/admin/hosts/{target}/undrain", "POST")
        until("it is back", lambda: hosts(running)[target]["state"] == "ok")
        missing = running.admin("/admin/hosts/nope:1/drain", "POST")
        assert (missing.status, missing.error()["code"]) == (404, "unknown_host")


def test_full_hosts_make_a_queue_that_is_bounded_and_honest(tmp_path: Any) -> None:
    with rehearsal() as one:
        control(one, max_running_requests=2)
        settings = {"admission": {"max_queue": 2}, "timeouts": {"queue_s": 20}}
        with behind(tmp_path, one, **settings) as running:
            slow = json.dumps(raw.chat("[[tokens 12]] [[pace 0.1]]", stream=True)).encode()
            peers = [raw.connect(running.port) for _ in range(5)]
            for number, peer in enumerate(peers):
                peer.sendall(raw.request("POST", CHAT, slow))
                if number == 1:
                    until("both places are taken", lambda: hosts(running)[one.url[7:]]["in_flight"] == 2)
            bodies = []
            for peer in peers:
                with peer:
                    bodies.append(raw.read(peer))
            assert sorted(body.status for body in bodies) == [200, 200, 200, 200, 503]
            refused = next(body for body in bodies if body.status == 503)
            assert refused.error()["code"] == "engine_overloaded"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert one.seen()["requests"] == 4


def test_a_client_that_leaves_the_queue_is_never_sent(tmp_path: Any) -> None:
    with rehearsal() as one:
        control(one, max_running_requests=1)
        with behind(tmp_path, one) as running, raw.connect(running.port) as first, raw.connect(running.port) as second:
            first.sendall(raw.request("POST", CHAT, json.dumps(raw.chat("[[tokens 8]] [[pace 0.1]]", stream=True)).encode()))
            assert first.recv(1024)
            second.sendall(raw.request("POST", CHAT, json.dumps(raw.chat("hi")).encode()))
            until("it waits", lambda: running.admin("/admin/workers").json()["workers"][0]["open"] == 2)
            second.close()
            until("it is forgotten", lambda: running.admin("/admin/workers").json()["workers"][0]["open"] == 1)
            rest = b""
            while part := first.recv(65536):
                rest += part
            assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            assert raw.call(running.port, "POST", CHAT, raw.chat("hi")).status == 200
            assert one.seen()["requests"] == 2


def test_a_hung_host_is_found_out_by_its_silence(tmp_path: Any) -> None:
    """Its probe still says that it is well; only a generation does not end."""
    health = {"wedged_s": 0.5, "probe_s": 0.2, "ejection_s": 60}
    with rehearsal() as one, rehearsal() as two, behind(tmp_path, one, two, health=health) as running:
        control(one, hung=True)
        peers = [raw.connect(running.port) for _ in range(8)]
        for peer in peers:
            peer.sendall(raw.request("POST", CHAT, json.dumps(raw.chat("[[tokens 40]] [[pace 0.1]]", stream=True)).encode()))
        row = until("it is ejected", lambda: (found := hosts(running)[one.url[7:]])["state"] == "ejected" and found)
        assert "wedged" in row["why"]
        assert one.seen()["generations_probed"] == 1, "rate-capped"
        assert two.seen()["generations_probed"] == 0
        for peer in peers:
            peer.close()


def test_retries_are_bounded_by_the_budget(tmp_path: Any) -> None:
    """Everybody fails: the first retry is free, and then a fifth of the traffic at most."""
    strict = {"health": {"max_ejected_share": 0}, "retry": {"reserve_tokens": 0}}
    with rehearsal() as one, rehearsal() as two, behind(tmp_path, one, two, **strict) as running:
        answers = [raw.call(running.port, "POST", CHAT, raw.chat("[[refuse 500]]")) for _ in range(40)]
        attempts = one.seen()["requests"] + two.seen()["requests"]
        assert {answer.status for answer in answers} == {502}
        assert 41 <= attempts <= 40 * 1.2 + 2
        assert answers[-1].headers["x-should-retry"] == "false"


def test_a_busy_cluster_is_not_hammered(tmp_path: Any) -> None:
    with rehearsal() as one, rehearsal() as two, rehearsal() as three, behind(tmp_path, one, two, three) as running:
        answer = raw.call(running.port, "POST", CHAT, raw.chat("[[refuse 503]]"))
        assert (answer.status, answer.error()["code"]) == (503, "engine_overloaded")
        assert [host.seen()["requests"] for host in (one, two, three)] == [1, 1, 1]
        assert {row["state"] for row in hosts(running).values()} == {"ok"}, "busy is not sick"


def test_a_sick_host_is_ejected_and_proves_itself_again(tmp_path: Any) -> None:
    health = {"min_sample": 3, "ejection_s": 1, "max_ejected_share": 0.5}
    with rehearsal() as one, rehearsal() as two, behind(tmp_path, one, two, health=health) as running:
        control(one, failing=True)
        asked = itertools.count()  # each a conversation of its own, or they would all stay where the first was answered
        for _ in range(40):
            assert raw.call(running.port, "POST", CHAT, raw.chat(f"hi {next(asked)}")).status == 200
        row = hosts(running)[one.url[7:]]
        assert (row["state"], "too many failures" in row["why"]) == ("ejected", True)
        control(one, failing=False)
        until("probation", lambda: hosts(running)[one.url[7:]]["state"] == "probation")

        def back() -> bool:
            raw.call(running.port, "POST", CHAT, raw.chat(f"hi {next(asked)}"))
            return bool(hosts(running)[one.url[7:]]["state"] == "ok")

        until("it has proved itself", back)


def test_priority_tiers(tmp_path: Any) -> None:
    with rehearsal() as main, rehearsal() as spare:
        section = {"kind": "sglang_dsv3", "hosts": [{"url": main.url}, {"url": spare.url, "priority": 1}], "health": {"slow_start_s": 0}}
        with gateway(tmp_path, {"models": {"deepseek-v3": {"backend": "d"}}, "backends": {"d": section}}) as running:
            running.wait_ready()
            for _ in range(6):
                assert raw.call(running.port, "POST", CHAT, raw.chat("hi")).status == 200
            assert spare.seen()["requests"] == 0
            control(main, ready=503)
            until("it is out", lambda: hosts(running)[main.url[7:]]["state"] == "down")
            assert raw.call(running.port, "POST", CHAT, raw.chat("hi")).status == 200
            assert spare.seen()["requests"] == 1


def test_prefixes_stay_with_their_host(tmp_path: Any) -> None:
    with rehearsal() as one, rehearsal() as two:
        config = one.backend()
        config["models"]["deepseek-v3"]["balance"] = "prefix_affinity"
        config["backends"]["dsv3"]["hosts"] = [{"url": one.url}, {"url": two.url}]
        with gateway(tmp_path, config) as running:
            running.wait_all_hosts()
            placed: dict[int, set[str]] = {}
            for number, turn in itertools.product(range(12), range(3)):
                messages = [{"role": "system", "content": f"You are agent {number}."}, {"role": "user", "content": f"hello {number}"}]
                messages += [{"role": "assistant", "content": "hm"}, {"role": "user", "content": f"turn {turn}"}] * turn
                body = {"model": "deepseek-v3", "messages": messages}
                answer = raw.call(running.port, "POST", CHAT, body, {"x-request-id": f"{number}-{turn}"})
                assert answer.status == 200
            until("all are logged", lambda: sum("host" in line for line in running.requests()) == 36)
            lines = [line for line in running.requests() if "host" in line]
            for line in lines:
                placed.setdefault(int(line["request_id"].split("-")[0]), set()).add(line["host"])
            assert all(len(where) == 1 for where in placed.values()), placed
            assert len(set().union(*placed.values())) == 2, "and not all with the same"
