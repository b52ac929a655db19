"""Who is next while all hosts are full, with real clients: keys and their weights, classes and their floors, clients' own deadlines.

What is asserted is an order or a count; the paces only make sure that there is something to wait for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from gateway.access.keys import hashed
from tests.support import raw, redis
from tests.support.processes import Gateway, Rehearsal, gateway, until
from tests.wire.test_command import penstock

CHAT = "/v1/chat/completions"
KEYS: list[dict[str, Any]] = [
    {"name": "heavy"}, {"name": "light"}, {"name": "thrice", "weight": 3},
    {"name": "ann", "team": "blue"}, {"name": "ben", "team": "blue"}, {"name": "low", "priority": 5},
]  # fmt: skip
# Answers may reach their clients in another order than they were made in, by so many places.
SLACK = 2


@contextlib.contextmanager
def running(engine: Rehearsal, folder: Path, places: int, **more: Any) -> Iterator[Gateway]:
    config = {**engine.backend(), "teams": [{"name": "blue"}], "keys": [{**key, "hash": hashed(key["name"])} for key in KEYS], **more}
    config["backends"]["dsv3"]["hosts"][0]["max_in_flight"] = places
    with gateway(folder, config) as one:
        one.wait_all_hosts()
        yield one


def waiting(one: Gateway) -> int:
    return int(counted(one, "penstock_queue_waiting{"))


def counted(one: Gateway, begins: str) -> float:
    return sum(float(line.split()[-1]) for line in one.admin("/metrics").body.decode().splitlines() if line.startswith(begins))


def client(one: Gateway, key: str, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=one.base_url, api_key=key, **{"max_retries": 0, "timeout": 120, **options})


async def finished(one: Gateway, keys: list[str]) -> list[str]:
    """The keys of requests in the order of their answers: all of them wait before the first is called, and there is one place."""
    order: list[str] = []
    clients = {key: client(one, key) for key in keys}

    async def ask(key: str) -> None:
        await clients[key].chat.completions.create(
            model="deepseek-v3", messages=[{"role": "user", "content": "[[tokens 4]] [[pace 0.01]]"}]
        )
        order.append(key)

    with occupied(one):
        tasks = [asyncio.create_task(ask(key)) for key in keys]
        async with asyncio.timeout(60):
            while await asyncio.to_thread(waiting, one) < len(keys):
                await asyncio.sleep(0.05)
    await asyncio.gather(*tasks)
    for each in clients.values():
        await each.close()
    return order


@contextlib.contextmanager
def occupied(one: Gateway) -> Iterator[None]:
    """The only place is taken until the end."""
    with raw.connect(one.port) as peer:
        body = json.dumps(raw.chat("[[tokens 9000]] [[pace 0.05]]", stream=True)).encode()
        peer.sendall(raw.request("POST", CHAT, body, {"authorization": "Bearer heavy"}))
        assert peer.recv(1024)
        yield


def test_a_key_that_sends_sixty_does_not_delay_one_that_sends_two(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with running(scripted_sglang, tmp_path, 1) as one:
        order = asyncio.run(finished(one, ["heavy"] * 60 + ["light"] * 2))
    assert [place for place, key in enumerate(order) if key == "light"][-1] <= 3 + SLACK, order


def test_weights_and_teams_share_the_places(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with running(scripted_sglang, tmp_path, 1) as one:
        order = asyncio.run(finished(one, ["light", "thrice", "ann", "ben"] * 20))
    # While all of them wait: 1 for the key, 3 for the one of weight 3, 1 for the team of two.
    some = order[:30]
    for key, share in (("thrice", 18), ("light", 6), ("ann", 3), ("ben", 3)):
        assert abs(some.count(key) - share) <= SLACK, order


@pytest.mark.parametrize("floor", [0.1, 0.0])
def test_a_lower_class_gets_its_floor_and_nothing_without_one(scripted_sglang: Rehearsal, tmp_path: Path, floor: float) -> None:
    with running(scripted_sglang, tmp_path, 1, admission={"floor": floor}) as one:
        order = asyncio.run(finished(one, ["low"] * 4 + ["light"] * 60))
    places = [place for place, key in enumerate(order) if key == "low"]
    for place, wanted in zip(places, [9, 19, 29, 39] if floor else [60, 61, 62, 63], strict=True):
        assert abs(place - wanted) <= SLACK, order


def test_a_client_that_cannot_be_served_in_time_is_told_before_it_gives_up(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    ask = {"model": "deepseek-v3", "messages": [{"role": "user", "content": "hi"}]}
    with running(scripted_sglang, tmp_path, 1) as one, openai.OpenAI(base_url=one.base_url, api_key="light", max_retries=0) as sdk:
        create: Any = sdk.chat.completions.create
        with occupied(one):
            # Not APITimeoutError: there is an answer, with a reason and a time to come again.
            with pytest.raises(openai.InternalServerError) as told:
                create(**ask, timeout=2, extra_headers={"x-request-id": "hurried"})
            assert (told.value.status_code, told.value.code) == (503, "engine_overloaded")
            assert re.search(
                r"Every engine was full for 1\.\d s, and its client waits 2 s \(x-stainless-read-timeout\)\.", told.value.message
            )
            assert 1 <= int(told.value.response.headers["retry-after"]) <= 60
            assert "x-should-retry" not in told.value.response.headers
            with pytest.raises(openai.InternalServerError, match=r"its client waits 0\.8 s \(x-request-timeout-ms\)"):
                create(**ask, extra_headers={"x-request-timeout-ms": "800"})
        until("it is counted", lambda: counted(one, 'penstock_shed_total{model="deepseek-v3",reason="client_deadline"}') == 2)
        found = one.admin("/admin/requests/hurried").json()
        assert found["waited"] == {
            "class": 0,
            "client_waits_s": 2.0,
            "by": "x-stainless-read-timeout",
            "ignored": [],
            "shed": "client_deadline",
        }
        assert "and its client waits 2 s" in found["verdict"]
        lines = one.admin("/admin/requests/hurried?format=text").body.decode()
        assert "waited for a place in class 0; shed: client_deadline\n      its client waits 2 s (x-stainless-read-timeout)\n" in lines
        (line,) = [line for line in one.requests() if line["request_id"] == "hurried"]
        assert line["outcome"] == "overloaded"
        assert "its client waits 2 s (x-stainless-read-timeout)" in json.dumps(line)
        assert create(**ask, timeout=2).choices[0].message.content


def test_the_sdk_comes_again_when_it_was_told_to(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with running(scripted_sglang, tmp_path, 1) as one, openai.OpenAI(base_url=one.base_url, api_key="light", max_retries=9) as sdk:
        with raw.connect(one.port) as peer:
            body = json.dumps(raw.chat("[[tokens 40]] [[pace 0.05]]", stream=True)).encode()
            peer.sendall(raw.request("POST", CHAT, body, {"authorization": "Bearer heavy"}))
            assert peer.recv(1024)
            answer = sdk.with_options(timeout=1).chat.completions.create(model="deepseek-v3", messages=[{"role": "user", "content": "hi"}])
        assert answer.choices[0].message.content
        assert counted(one, 'penstock_shed_total{model="deepseek-v3",reason="client_deadline"}') >= 1


def test_of_one_key_whoever_waits_for_less_is_first(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    async def work(one: Gateway) -> list[str]:
        order: list[str] = []

        async def ask(name: str, timeout: float) -> None:
            async with client(one, "light", timeout=timeout) as sdk:
                await sdk.chat.completions.create(model="deepseek-v3", messages=[{"role": "user", "content": "[[tokens 4]] [[pace 0.05]]"}])
                order.append(name)

        with occupied(one):
            tasks = []
            for number, (name, timeout) in enumerate((("patient", 600.0), ("hurried", 25.0), ("most", 20.0)), 1):
                tasks.append(asyncio.create_task(ask(name, timeout)))
                while await asyncio.to_thread(waiting, one) < number:
                    await asyncio.sleep(0.01)
        await asyncio.gather(*tasks)
        return order

    with running(scripted_sglang, tmp_path, 1) as one:
        assert asyncio.run(work(one)) == ["most", "hurried", "patient"]


def test_a_deadline_that_is_none_is_ignored_and_counted(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    async def work(one: Gateway) -> None:
        head = {"x-request-timeout-ms": "soon", "x-request-id": "odd"}
        async with client(one, "light") as sdk:
            with occupied(one):
                task = asyncio.create_task(
                    sdk.chat.completions.create(model="deepseek-v3", messages=[{"role": "user", "content": "hi"}], extra_headers=head)
                )
                while not await asyncio.to_thread(waiting, one):
                    await asyncio.sleep(0.01)
            assert (await task).choices[0].message.content

    with running(scripted_sglang, tmp_path, 1) as one:
        asyncio.run(work(one))
        until("it is counted", lambda: counted(one, 'penstock_deadlines_ignored_total{header="x-request-timeout-ms"}') == 1)
        assert one.admin("/admin/requests/odd").json()["waited"]["ignored"] == ["x-request-timeout-ms"]


def test_a_key_that_is_made_has_a_weight_too(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with redis.server(tmp_path / "redis") as store, running(scripted_sglang, tmp_path / "run", 1, redis={"url": store.url}) as one:

        def keys(*arguments: str) -> subprocess.CompletedProcess[str]:
            return penstock("keys", *arguments, "--admin", one.admin_url, folder=tmp_path)

        assert keys("create", "stored", "--weight", "2").returncode == 0
        assert "weight             2.0\n" in keys("show", "stored").stdout
        changed = keys("edit", "stored", "--weight", "3")
        assert changed.stdout == "penstock: 'stored' is changed: weight=3.0\n"
        refused = keys("edit", "stored", "--weight", "0")
        assert refused.returncode == 1
        assert "weight" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
        # It counts as one of the file does.
        secret = keys("rotate", "stored").stdout.strip()
        order = asyncio.run(finished(one, ["light", secret] * 12))
        assert abs(order[:12].count(secret) - 9) <= SLACK, order
