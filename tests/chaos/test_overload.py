"""Overload, as clients meet it: what they are told, that they may come again, and that their coming again is no storm."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support import raw
from tests.support.processes import Gateway, Rehearsal, gateway, rehearsal, until

CHAT = "/v1/chat/completions"
BUSY = "[[refuse 503]]"


def configuration(*urls: str, **settings: Any) -> dict[str, Any]:
    section = {"kind": "sglang_dsv3", "hosts": [{"url": url} for url in urls], "health": {"slow_start_s": 0, "max_ejected_share": 0}}
    return {"models": {"deepseek-v3": {"backend": "d"}}, "backends": {"d": section}, **settings}


@pytest.fixture
def three() -> Iterator[list[Rehearsal]]:
    with rehearsal() as one, rehearsal() as two, rehearsal() as three:
        yield [one, two, three]


def overloaded(answer: raw.Answer) -> None:
    assert (answer.status, answer.error()["code"]) == (503, "engine_overloaded")
    assert 2 <= int(answer.headers["retry-after"]) <= 60
    assert "x-should-retry" not in answer.headers


def test_any_host_that_was_only_busy_makes_it_an_overload(tmp_path: Path) -> None:
    """Whichever is asked first: one is busy, one refuses connections, one breaks."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        refusing = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    with rehearsal() as busy, rehearsal() as broken:
        broken.behave(deaf=True, failing=True)
        for number, urls in enumerate(([busy.url, refusing], [refusing, busy.url], [busy.url, broken.url], [broken.url, busy.url])):
            config = configuration(*urls)
            config["backends"]["d"]["hosts"][0]["weight"] = 100_000
            config["models"]["deepseek-v3"]["balance"] = "weighted_round_robin"
            with gateway(tmp_path / str(number), config) as running:
                running.wait_ready()
                overloaded(raw.call(running.port, "POST", CHAT, raw.chat(BUSY)))
                line = until("it is logged", lambda running=running: running.requests())[0]  # type: ignore[misc]
                assert (line["outcome"], line["level"]) == ("overloaded", "error")
                assert line["cause"]


def test_where_none_was_busy_an_sdk_is_told_not_to_come_again(tmp_path: Path, three: list[Rehearsal]) -> None:
    with gateway(tmp_path, configuration(*(host.url for host in three))) as running:
        running.wait_all_hosts()
        answer = raw.call(running.port, "POST", CHAT, raw.chat("[[refuse 500]]"))
        assert (answer.status, answer.headers["x-should-retry"]) == (502, "false")


def test_an_sdk_comes_again_and_is_served_when_there_is_room(tmp_path: Path, three: list[Rehearsal]) -> None:
    with gateway(tmp_path, configuration(*(host.url for host in three))) as running:
        running.wait_all_hosts()
        with openai.OpenAI(base_url=running.base_url, api_key="none", timeout=30) as client:
            request: Any = raw.chat(f"{BUSY} [[times 1]]")
            assert client.chat.completions.create(**request).choices[0].message.content
        until("both are logged", lambda: len(running.requests()) == 2)
        assert [line["outcome"] for line in running.requests()] == ["overloaded", "ok"]


def test_sdks_that_come_again_are_no_storm(tmp_path: Path, three: list[Rehearsal]) -> None:
    """20 clients at once, each of which asks three times: without the budget every one of these is asked of every host."""
    with gateway(tmp_path, configuration(*(host.url for host in three), retry={"reserve_tokens": 0})) as running:
        running.wait_all_hosts()

        def ask(number: int) -> str:
            with openai.OpenAI(base_url=running.base_url, api_key="none", timeout=60) as client:
                request: Any = raw.chat(f"{BUSY} {number:04}")
                with pytest.raises(openai.InternalServerError) as refused:
                    client.chat.completions.create(**request)
                return str(refused.value.code)

        with ThreadPoolExecutor(20) as clients:
            assert set(clients.map(ask, range(20))) == {"engine_overloaded"}
        until("all are logged", lambda: len(running.requests()) == 60)
        attempts = sum(host.seen()["requests"] for host in three)
        assert 60 < attempts <= 60 * 1.2 + 4, "a fifth more, and one that is always free in each stretch of ten seconds"


def test_all_hosts_drained_is_said_as_that(tmp_path: Path, three: list[Rehearsal]) -> None:
    with gateway(tmp_path, configuration(*(host.url for host in three))) as running:
        running.wait_all_hosts()
        drain(running, *three)
        answer = raw.call(running.port, "POST", CHAT, raw.chat("hi"))
        assert (answer.status, answer.error()["code"]) == (503, "engine_unavailable")
        assert answer.error()["message"].startswith("All hosts are drained by the operator.")
        for ready in (raw.call(running.port, "GET", "/readyz"), running.admin("/readyz")):
            assert ready.status == 503
            assert "drained by the operator" in ready.error()["message"]
        assert running.admin(f"/admin/hosts/{three[0].url[7:]}/undrain", "POST").status == 200
        until("it is served again", lambda: raw.call(running.port, "POST", CHAT, raw.chat("hi")).status == 200)


def drain(running: Gateway, *hosts: Rehearsal) -> None:
    for host in hosts:
        assert running.admin(f"/admin/hosts/{host.url[7:]}/drain", "POST").status == 200
    until("they are", lambda: all(row["state"] == "drained" for row in running.admin("/admin/hosts").json()["hosts"]))
