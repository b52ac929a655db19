"""Responses that an engine keeps: asked for again, cancelled and continued from, wherever they were made, and by nobody else."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.support import raw
from tests.support.processes import Gateway, Rehearsal, gateway, rehearsal, until

RESPONSES = "/v1/responses"
# SHA-256 of `foo` and of `bar`.
KEYS = [
    {"name": "foo", "hash": "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"},
    {"name": "bar", "hash": "sha256:fcde2b2edba56bf408601fb721fe9b5c338d10ee429ea04fae5511b68fbf8fb9"},
]


def keeps(engine: Rehearsal, value: bool = True) -> None:
    request = urllib.request.Request(f"{engine.url}/rehearsal/keeps", json.dumps(value).encode(), method="POST")
    urllib.request.urlopen(request, timeout=10).close()


def settings(*engines: Rehearsal) -> dict[str, Any]:
    hosts = [{"url": engine.url} for engine in engines]
    return {"models": {"deepseek-v3": {"backend": "dsv3"}}, "backends": {"dsv3": {"kind": "sglang_dsv3", "hosts": hosts}}}


@pytest.fixture(scope="module")
def engines() -> Iterator[list[Rehearsal]]:
    """Three, each of which keeps what it made."""
    with rehearsal() as one, rehearsal() as two, rehearsal() as three:
        for engine in (one, two, three):
            keeps(engine)
        yield [one, two, three]


@pytest.fixture(scope="module")
def behind(engines: list[Rehearsal], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway in front of them, open to all."""
    frugal = {"retry": {"budget_share": 0, "reserve_tokens": 0}}  # asking on costs nothing of it: nobody has worked on the prompt
    with gateway(tmp_path_factory.mktemp("behind"), {**settings(*engines), **frugal}) as running:
        running.wait_all_hosts()
        yield running


@pytest.fixture
def client(behind: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=behind.base_url, api_key="none", max_retries=0) as found:
        yield found


def made_by(engines: list[Rehearsal]) -> list[int]:
    return [engine.seen()["requests"] for engine in engines]


def made_everywhere(client: openai.OpenAI, engines: list[Rehearsal]) -> list[Any]:
    """Responses, as many as it takes until each host has made one: whose turn it is may be chance."""
    before, made = made_by(engines), list[Any]()
    while not all(now > then for now, then in zip(made_by(engines), before, strict=True)):
        assert len(made) < 200
        made.append(client.responses.create(model="deepseek-v3", input=f"number {len(made)}"))
    return made


def test_a_response_is_found_on_whatever_host_it_was_made(client: openai.OpenAI, engines: list[Rehearsal]) -> None:
    made = made_everywhere(client, engines)
    for response in made:
        again = client.responses.retrieve(response.id)
        assert (again.id, again.model, again.output_text) == (response.id, "deepseek-v3", response.output_text)
        assert client.responses.cancel(response.id).status == "cancelled"
        assert client.responses.retrieve(response.id).status == "cancelled", "the one that has it was told"


def test_a_conversation_goes_on_at_the_host_that_keeps_it(client: openai.OpenAI, behind: Gateway, engines: list[Rehearsal]) -> None:
    first = client.responses.create(model="deepseek-v3", input="begin")
    for _ in range(9):  # whoever's turn it is
        assert client.responses.create(model="deepseek-v3", input="go on", previous_response_id=first.id).status == "completed"
        events = list(client.responses.create(model="deepseek-v3", input="go on", previous_response_id=first.id, stream=True))
        assert events[-1].type == "response.completed"
    assert {host["state"] for host in behind.admin("/admin/hosts").json()["hosts"]} == {"ok"}, "who did not have it is well"


def test_what_nobody_keeps_is_a_404_and_nobodys_fault(client: openai.OpenAI, behind: Gateway) -> None:
    gone = client.responses.create(model="deepseek-v3", input="x", store=False).id[:-20] + "0" * 20
    for work in (client.responses.retrieve, client.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="not found") as refused:
            work(gone)
        assert (refused.value.code, refused.value.param) == ("response_not_found", "response_id")
    for _ in range(30):
        with pytest.raises(openai.NotFoundError):
            client.responses.create(model="deepseek-v3", input="x", previous_response_id=gone)
    assert {host["state"] for host in behind.admin("/admin/hosts").json()["hosts"]} == {"ok"}


def test_one_that_was_made_but_is_kept_no_more_takes_nobody_out(client: openai.OpenAI, behind: Gateway, engines: list[Rehearsal]) -> None:
    """The id is sound, and every host says that it does not know it: a client that asks on and on harms nobody."""
    for engine in engines:
        keeps(engine, False)
    made = client.responses.create(model="deepseek-v3", input="x").id
    for engine in engines:
        keeps(engine)
    for _ in range(30):
        with pytest.raises(openai.NotFoundError) as refused:
            client.responses.create(model="deepseek-v3", input="x", previous_response_id=made)
        assert refused.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made)
    assert {host["state"] for host in behind.admin("/admin/hosts").json()["hosts"]} == {"ok"}
    assert client.responses.create(model="deepseek-v3", input="x").status == "completed"


def test_a_response_of_another_key_does_not_exist(engines: list[Rehearsal], folder: Any) -> None:
    with gateway(folder, {**settings(*engines), "keys": KEYS}) as running:
        running.wait_all_hosts()
        with (
            openai.OpenAI(base_url=running.base_url, api_key="foo", max_retries=0) as foo,
            openai.OpenAI(base_url=running.base_url, api_key="bar", max_retries=0) as bar,
        ):
            made = foo.responses.create(model="deepseek-v3", input="mine").id
            assert foo.responses.retrieve(made).id == made
            theirs = bar.responses.create(model="deepseek-v3", input="theirs").id
            tries = [made, made[:-16] + theirs[-16:], made[:-16], made.upper(), f"{made}/../{made}", f"../{made}"]
            for id in tries:
                with pytest.raises(openai.NotFoundError):
                    bar.responses.retrieve(id)
                with pytest.raises(openai.NotFoundError):
                    bar.responses.cancel(id)
                with pytest.raises(openai.NotFoundError):
                    bar.responses.create(model="deepseek-v3", input="and?", previous_response_id=id)
            assert foo.responses.retrieve(made).status == "completed", "nobody has cancelled it"
            with pytest.raises(openai.BadRequestError, match="'background' is not served where use is counted"):
                foo.responses.create(model="deepseek-v3", input="x", background=True)


def test_without_a_store_it_says_so(scripted_sglang: Rehearsal, wired: Gateway) -> None:
    with openai.OpenAI(base_url=wired.base_url, api_key="none", max_retries=0) as client:
        made = client.responses.create(model="deepseek-v3", input="x").id
        with pytest.raises(openai.NotFoundError, match="no engine here runs with --enable-response-store"):
            client.responses.retrieve(made)
        with pytest.raises(openai.BadRequestError, match="Response store is disabled") as refused:
            client.responses.create(model="deepseek-v3", input="x", previous_response_id=made)
        assert refused.value.param == "previous_response_id"


def test_while_a_host_cannot_be_asked_nobody_says_that_it_does_not_exist(engines: list[Rehearsal], folder: Any) -> None:
    with rehearsal() as dying, gateway(folder, settings(engines[0], dying)) as running:
        running.wait_all_hosts()
        keeps(dying)
        with openai.OpenAI(base_url=running.base_url, api_key="none", max_retries=0) as client:
            made = [response.id for response in made_everywhere(client, [engines[0], dying])]
            assert all(client.responses.retrieve(id).id == id for id in made)
            dying.process.kill()
            until("it is gone", lambda: dying.process.poll() is not None)
            found = [raw.call(running.port, "GET", f"{RESPONSES}/{id}") for id in made]
            assert sorted({answer.status for answer in found}) == [200, 503]
            assert all(answer.headers["retry-after"] for answer in found if answer.status == 503)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("DELETE", f"{RESPONSES}/resp_1", 405, "method_not_supported"),
        ("GET", f"{RESPONSES}/resp_1/cancel", 405, "method_not_supported"),
        ("GET", f"{RESPONSES}/resp_1/input_items", 404, "unknown_url"),
        ("GET", f"{RESPONSES}/resp_1?stream=true", 400, "unsupported_parameter"),
        ("GET", f"{RESPONSES}/resp_1", 404, "response_not_found"),
        ("HEAD", f"{RESPONSES}/resp_1", 404, ""),
        ("POST", f"{RESPONSES}/resp_1/cancel", 404, "response_not_found"),
    ],
)
def test_what_else_of_the_family_there_is_and_is_not(behind: Gateway, method: str, path: str, status: int, code: str) -> None:
    answer = raw.call(behind.port, method, path)
    assert answer.status == status
    assert not code or answer.error()["code"] == code


def test_input_tokens_are_counted_where_an_engine_can(behind: Gateway, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no backend here serves it"):
        client.responses.input_tokens.count(model="deepseek-v3", input="x")
