"""The examples of the OpenAPI document run as they stand: each is sent to the gateway that serves it, and answered."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.access.keys import hashed
from gateway.plugin import Endpoint
from tests.support import raw
from tests.support.processes import Gateway, Rehearsal, gateway


def examples(running: Gateway) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Path, name, body, and the operation, of every request example in the served document."""
    document = raw.call(running.port, "GET", "/openapi.json").json()
    for path, item in document["paths"].items():
        asked = item.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        for name, example in asked.get("examples", {}).items():
            yield path, name, example["value"], item["post"]


@pytest.fixture(scope="module", params=[False, True], ids=["lenient", "strict"])
def everything(request: pytest.FixtureRequest, scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with a model for every endpoint that the scripted engine speaks, under names of its own."""
    hosts = [{"url": scripted_sglang.url}]
    config = {
        "models": {"our/large": {"backend": "large", "aliases": ["gpt-4o"]}, "our/small": {"backend": "small"}},
        "backends": {
            "large": {"kind": "sglang_dsv3", "hosts": hosts},
            "small": {"kind": "sglang_dsv3", "hosts": hosts, "endpoints": ["/v1/embeddings", "/v1/rerank"]},
        },
        "security": {"strict_parameters": request.param},
    }
    scripted_sglang.behave()
    with gateway(tmp_path_factory.mktemp("examples"), config) as running:
        running.wait_all_hosts()
        yield running


def test_each_is_answered_as_it_stands(everything: Gateway) -> None:
    found = list(examples(everything))
    served = {endpoint.value for endpoint in Endpoint} - {Endpoint.INPUT_TOKENS.value}  # which no backend here serves
    assert {path for path, *_ in found} == served
    for path, name, body, operation in found:
        assert body["model"] == ("our/small" if path in (Endpoint.EMBEDDINGS, Endpoint.RERANK) else "our/large")
        answer = raw.call(everything.port, "POST", path, body)
        assert answer.status == 200, f"{path}, {name}: {answer.body!r}"
        assert not body.get("stream") or b"DONE" in answer.body or b"message_stop" in answer.body or b"response.completed" in answer.body
        kind = answer.headers["content-type"].partition(";")[0]
        assert kind == ("text/event-stream" if body.get("stream") else "application/json")
        assert kind in operation["responses"]["200"]["content"]
        first = next(iter(operation["requestBody"]["content"]["application/json"]["examples"]))
        assert (name != first) or not body.get("stream"), "the page begins with the plain one"


def test_no_example_names_what_some_key_must_not_know(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    """Who reads them shows no key."""
    config = scripted_sglang.backend()
    config["models"] = {name: {"backend": "dsv3"} for name in ("secret", "common", "other")}
    config["keys"] = [
        {"name": "all", "hash": hashed("all")},
        {"name": "some", "hash": hashed("some"), "models": ["other", "common"]},
        {"name": "one", "hash": hashed("one"), "models": ["common"]},
    ]
    with gateway(tmp_path, config) as running:
        running.wait_all_hosts()
        assert {body["model"] for _, _, body, _ in examples(running)} == {"common"}
        assert b"secret" not in raw.call(running.port, "GET", "/openapi.json").body
        for path, _, body, _ in examples(running):
            assert raw.call(running.port, "POST", path, body, {"authorization": "Bearer one"}).status == 200
    config["keys"].append({"name": "none", "hash": hashed("none"), "models": ["other"]})
    with gateway(tmp_path / "none", config) as running:
        assert list(examples(running)) == []


def kinds(stream: str) -> list[str]:
    """What each event of a stream is, one after the other."""
    found = []
    for event in stream.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in event.splitlines())
        data = json.loads(lines["data"]) if lines["data"] != "[DONE]" else {"object": "[DONE]"}
        assert lines.get("event", data.get("type")) == data.get("type")
        found.append(data.get("type") or data["object"])
    return found


def test_an_example_of_a_stream_is_made_of_what_a_stream_is_made_of(everything: Gateway) -> None:
    streamed = [found for found in examples(everything) if found[2].get("stream")]
    assert {path for path, *_ in streamed} == {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
    for path, _, body, operation in streamed:
        real = kinds(raw.call(everything.port, "POST", path, body).body.decode())
        shown = kinds(operation["responses"]["200"]["content"]["text/event-stream"]["example"])
        assert set(shown) <= set(real)
        assert (shown[0], shown[-1]) == (real[0], real[-1])


def test_the_page_shows_them(everything: Gateway, tmp_path: Path) -> None:
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000", "--dump-dom",
        f"{everything.root}/docs#/generate/chat",
    ]  # fmt: skip
    page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "our/large" in page
    assert "An answer in one piece" in page
    for tag in ("generate", "count", "embed and rank", "models", "account", "health"):
        assert f'data-tag="{tag}"' in page
