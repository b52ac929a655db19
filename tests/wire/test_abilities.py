"""What `/v1/models` says of models whose hosts differ: the least, as far as they have told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.support import raw
from tests.support.processes import Gateway, Rehearsal, gateway, rehearsal, until

ALL = {
    "tool_call_parser": "deepseekv3",
    "reasoning_parser": "deepseek-r1",
    "has_image_understanding": True,
    "has_audio_understanding": True,
}


@pytest.fixture
def engines() -> Iterator[tuple[Rehearsal, Rehearsal]]:
    """One that can do more and holds less, one that holds more and can do less."""
    with rehearsal() as able, rehearsal() as wide:
        able.behave(info=ALL, max_model_len=8192)
        wide.behave(info={**ALL, "reasoning_parser": None, "has_audio_understanding": False}, max_model_len=32768)
        yield able, wide


@pytest.fixture
def behind(engines: tuple[Rehearsal, Rehearsal], folder: Any) -> Iterator[Gateway]:
    able, wide = ({"kind": "sglang_dsv3", "hosts": [{"url": engine.url}]} for engine in engines)
    both = {"kind": "sglang_dsv3", "hosts": [{"url": engine.url} for engine in engines]}
    models = {name: {"backend": name} for name in ("able", "wide", "both", "script")}
    backends = {"able": able, "wide": wide, "both": both, "script": {"kind": "scripted"}}
    with gateway(folder, {"models": models, "backends": backends}) as running:
        yield running


def shown(running: Gateway) -> dict[str, dict[str, Any]]:
    return {model["id"]: model for model in raw.call(running.port, "GET", "/v1/models").json()["data"]}


def test_a_model_whose_hosts_differ_shows_the_least(behind: Gateway, engines: tuple[Rehearsal, Rehearsal]) -> None:
    both = {"tools": True, "reasoning": False, "vision": True, "audio": False}
    until("all is known", lambda: shown(behind)["both"].get("capabilities") == both and shown(behind)["wide"].get("max_model_len"))
    models = shown(behind)
    assert [models[name]["context_length"] for name in ("able", "wide", "both")] == [8192, 32768, 8192]
    assert [models[name]["max_model_len"] for name in ("able", "wide", "both")] == [8192, 32768, 8192]
    assert models["able"]["capabilities"] == dict.fromkeys(("tools", "reasoning", "vision", "audio"), True)
    assert models["wide"]["capabilities"] == both
    assert set(models["script"]) == {"id", "object", "created", "owned_by"}, "of a backend that tells nothing nothing is said"
    with openai.OpenAI(base_url=behind.base_url, api_key="none", max_retries=0) as client:
        found: Any = client.models.retrieve("both")
        assert (found.context_length, found.capabilities) == (8192, both)
    with anthropic.Anthropic(base_url=behind.root, api_key="none", max_retries=0) as claude:
        assert [claude.models.retrieve(name).max_input_tokens for name in ("able", "wide", "both", "script")] == [8192, 32768, 8192, None]
    able, wide = engines
    able.process.kill()  # a host that is down comes back, so what it can do still counts
    until(
        "one is down",
        lambda: [host["state"] for host in behind.admin("/admin/hosts").json()["hosts"] if host["backend"] == "able"] != ["ok"],
    )
    assert shown(behind)["both"]["context_length"] == 8192
    wide.behave(max_model_len=4096)
    until("its other half was started anew with less", lambda: shown(behind)["both"]["context_length"] == 4096)


def test_an_engine_that_tells_only_some_of_it_is_not_said_to_lack_the_rest(folder: Any) -> None:
    """An older one, whose `/model_info` does not know of parsers, and whose model has no length."""
    with rehearsal() as old, gateway(folder, old.backend()) as running:
        old.behave(info={"has_image_understanding": True}, max_model_len=None)
        until("it is known", lambda: shown(running)["deepseek-v3"].get("capabilities") == {"vision": True})
        until("its length is not", lambda: "context_length" not in shown(running)["deepseek-v3"])
