"""Clients of Anthropic's family, by their own SDK: keys, models, counts, errors, in front of a scripted SGLang server."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import anthropic
import openai
import pytest

from tests.support import raw
from tests.support.processes import Gateway, Rehearsal, gateway, until

# SHA-256 of `foo`.
KEYS = [{"name": "ours", "hash": "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"}]
USER: list[Any] = [{"role": "user", "content": "hi"}]
NAMES = ["a", "b", "c", "deepseek-v3", "org/deepseek"]


@pytest.fixture(scope="module")
def keyed(scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with a key and five names of models."""
    settings = scripted_sglang.backend()
    settings["models"] |= {name: {"backend": "dsv3"} for name in NAMES[:3]}
    with gateway(tmp_path_factory.mktemp("keyed"), {**settings, "keys": KEYS}) as running:
        running.wait_ready()
        until("the context length is known", lambda: b"max_model_len" in get(running, "/v1/models").body)
        yield running


def get(running: Gateway, path: str, **headers: str) -> raw.Answer:
    return raw.call(running.port, "GET", path, headers={"x-api-key": "foo", **headers})


@pytest.fixture
def client(keyed: Gateway) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=keyed.root, api_key="foo", max_retries=0) as found:
        yield found


def test_models_as_anthropics_sdk_reads_them(client: anthropic.Anthropic) -> None:
    page = client.models.list()
    assert [model.id for model in page.data] == NAMES
    assert (page.has_more, page.first_id, page.last_id) == (False, NAMES[0], NAMES[-1])
    for model in (page.data[-1], client.models.retrieve("org/deepseek")):
        assert (model.id, model.type, model.display_name) == ("org/deepseek", "model", "org/deepseek")
        assert (model.max_input_tokens, model.max_tokens, model.lifecycle) == (16384, 16384, "active")
        assert timedelta(0) <= datetime.now(UTC) - model.created_at < timedelta(hours=1)


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 1000])
def test_its_pages_hold_every_model_once_forwards_and_backwards(client: anthropic.Anthropic, limit: int) -> None:
    assert [model.id for model in client.models.list(limit=limit)] == NAMES
    page = client.models.list(limit=limit, before_id=NAMES[-1])
    back: list[str] = []
    while True:
        back = [model.id for model in page.data] + back
        if not page.has_next_page():
            break
        page = page.get_next_page()
    assert back == NAMES[:-1]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("limit=0", "'limit': expected 1 to 1000, got '0'"),
        ("limit=1001", "expected 1 to 1000"),
        ("limit=ten", "got 'ten'"),
        ("limit=", "got ''"),
        ("after_id=nope", "'after_id': no model is called 'nope'"),
        ("before_id=%0a", "'before_id': no model"),
        ("after_id=a&before_id=b", "exclude each other"),
    ],
)
def test_a_page_that_cannot_be_is_refused_in_one_line(keyed: Gateway, query: str, words: str) -> None:
    answer = get(keyed, f"/v1/models?{query}", **{"anthropic-version": "2023-06-01"})
    assert (answer.status, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert words in answer.json()["error"]["message"]
    assert "\n" not in answer.json()["error"]["message"]
    assert get(keyed, f"/v1/models?{query}").status == 200, "OpenAI's list has no pages"


def test_who_does_not_say_that_it_is_anthropics_gets_openais_shape(keyed: Gateway) -> None:
    listed = get(keyed, "/v1/models").json()
    assert (listed["object"], listed["data"][0]["object"]) == ("list", "model")
    with openai.OpenAI(base_url=keyed.base_url, api_key="foo", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == NAMES


def test_tokens_are_counted_by_the_engine_and_cost_none(keyed: Gateway, client: anthropic.Anthropic) -> None:
    before = keyed.admin("/admin/usage").json()
    counted = client.messages.count_tokens(model="deepseek-v3", messages=USER, system="Be brief.")
    assert counted.input_tokens == 21, "the engine's word"

    def ours(usage: Any) -> tuple[int, int]:
        rows = [row for row in usage["usage"] if row["key"] == "ours"]
        return sum(row["requests"] for row in rows), sum(row["prompt_tokens"] for row in rows)

    requests, prompt = ours(before)
    until("it is counted", lambda: ours(keyed.admin("/admin/usage").json())[0] == requests + 1)
    assert ours(keyed.admin("/admin/usage").json())[1] == prompt


@pytest.mark.parametrize(
    ("work", "error", "kind"),
    [
        (lambda client: client.models.retrieve("nope"), anthropic.NotFoundError, "not_found_error"),
        (lambda client: client.messages.count_tokens(model="nope", messages=USER), anthropic.NotFoundError, "not_found_error"),
        (lambda client: client.messages.count_tokens(model="a", messages="x"), anthropic.BadRequestError, "invalid_request_error"),
        (lambda client: client.messages.batches.list(), anthropic.NotFoundError, "not_found_error"),
        (
            lambda client: client.messages.create(model="a", messages=USER, max_tokens=-1),
            anthropic.BadRequestError,
            "invalid_request_error",
        ),
        (lambda client: client.with_options(api_key="bar").models.list(), anthropic.AuthenticationError, "authentication_error"),
        (
            lambda client: client.with_options(api_key="bar").messages.count_tokens(model="a", messages=USER),
            anthropic.AuthenticationError,
            "authentication_error",
        ),
        (
            lambda client: client.messages.count_tokens(model="a", messages=[{"role": "user", "content": "[[refuse 503]]"}]),
            anthropic.InternalServerError,
            "overloaded_error",
        ),
    ],
)
def test_every_error_is_the_sdks_own(client: anthropic.Anthropic, work: Any, error: Any, kind: str) -> None:
    with pytest.raises(error) as refused:
        work(client)
    body: Any = refused.value.body
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert refused.value.request_id == body["request_id"]


def test_a_bearer_key_is_as_good(keyed: Gateway) -> None:
    with anthropic.Anthropic(base_url=keyed.root, auth_token="foo", api_key=None, max_retries=0) as client:
        assert client.models.list().data
        assert client.messages.create(model="a", messages=USER, max_tokens=5).content


def test_messages_by_the_sdk(client: anthropic.Anthropic) -> None:
    answer: Any = client.messages.create(model="deepseek-v3", messages=USER, max_tokens=5)
    assert answer.content[0].text.startswith("token 0 ")
    with client.messages.stream(model="deepseek-v3", messages=USER, max_tokens=5) as stream:
        assert "".join(stream.text_stream).startswith("token 0 token 1 ")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/nope", "/v1/nothing", "/v1/responses/resp_1", "/livez/x"])
def test_a_refusal_is_in_the_words_of_who_asks(keyed: Gateway, path: str) -> None:
    spoken = raw.call(keyed.port, "GET", path, headers={"anthropic-version": "2023-06-01"})
    assert (spoken.status, spoken.json()["type"]) == (401, "error")
    assert spoken.headers["request-id"]
    assert raw.call(keyed.port, "GET", path).error()["code"] == "missing_api_key"
