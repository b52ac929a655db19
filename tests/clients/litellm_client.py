"""LiteLLM, as a library."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would be fetched from GitHub

import litellm

from tests.clients.ask import BREAKS, PLAYED, TOOL, WEATHER, Site, Where, main, raised


def deeds(site: Site) -> dict[str, Callable[[], Any]]:
    def asked(text: str = WEATHER, model: str = site.tiny, **more: Any) -> Any:
        return litellm.completion(
            model=f"openai/{model}", api_base=site.base_url, api_key=site.key, messages=[{"role": "user", "content": text}], **more
        )

    def called() -> Any:
        call = asked(tools=[TOOL], tool_choice="required").choices[0].message.tool_calls[0].function
        return [call.name, call.arguments]

    def played() -> Any:
        chunks = list(asked(PLAYED, site.played, stream=True, tools=[TOOL]))
        whole: Any = litellm.stream_chunk_builder(chunks)
        message = whole.choices[0].message
        return [message.content, message.tool_calls[0].function.name, message.tool_calls[0].function.arguments, message.reasoning_content]

    return {
        "plain": lambda: asked().choices[0].message.content,
        "stream": lambda: [chunk.choices[0].delta.content or "" for chunk in asked(stream=True)],
        "tool": called,
        "played": played,
        "structured": lambda: Where.model_validate_json(asked(response_format=Where).choices[0].message.content).model_dump(),
        "refused": lambda: raised(lambda: asked(model=site.unknown)),
        "broken": lambda: raised(lambda: list(asked(BREAKS, site.played, stream=True))),
    }


if __name__ == "__main__":
    main(["litellm"], 'completion(model="openai/MODEL", api_base="http://HOST/v1")', deeds)
