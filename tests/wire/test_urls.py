"""Clients whose base_url has `/v1` once too often, or not at all."""

from __future__ import annotations

import openai
import pytest

from tests.support import raw
from tests.support.processes import Gateway


@pytest.mark.parametrize("suffix", ["", "/", "/v1/v1", "/openai"])
def test_the_sdk_is_told_where_the_api_is(wired: Gateway, suffix: str) -> None:
    client = openai.OpenAI(base_url=wired.root + suffix, api_key="x", max_retries=0)
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="deepseek-v3", messages=[{"role": "user", "content": "hi"}])
    assert f"set base_url to {wired.root}/v1." in str(refused.value)


def test_a_doubled_slash_is_no_other_path(wired: Gateway) -> None:
    for path in ("//v1/chat/completions", "/v1//chat/completions", "/v1/chat/completions/"):
        assert raw.call(wired.port, "POST", path, raw.chat("hi")).status == 200
