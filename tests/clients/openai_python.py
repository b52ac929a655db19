"""openai-python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai

from tests.clients.ask import BREAKS, PLAYED, TOOL, WEATHER, Site, Where, main, raised


def deeds(site: Site) -> dict[str, Callable[[], Any]]:
    client = openai.OpenAI(base_url=site.base_url, api_key=site.key)
    chat: Any = client.chat.completions

    def asked(text: str = WEATHER, model: str = site.tiny, **more: Any) -> Any:
        return chat.create(model=model, messages=[{"role": "user", "content": text}], **more)

    def called() -> Any:
        call = asked(tools=[TOOL], tool_choice="required").choices[0].message.tool_calls[0].function
        return [call.name, call.arguments]

    def played() -> Any:
        with chat.stream(model=site.played, messages=[{"role": "user", "content": PLAYED}], tools=[TOOL]) as stream:
            message = stream.get_final_completion().choices[0].message
        return [message.content, message.tool_calls[0].function.name, message.tool_calls[0].function.arguments]

    def structured() -> Any:
        messages = [{"role": "user", "content": WEATHER}]
        return chat.parse(model=site.tiny, messages=messages, response_format=Where).choices[0].message.parsed.model_dump()

    return {
        "plain": lambda: asked().choices[0].message.content,
        "stream": lambda: [chunk.choices[0].delta.content or "" for chunk in asked(stream=True)],
        "tool": called,
        "played": played,
        "structured": structured,
        "responses": lambda: client.responses.create(model=site.tiny, input=WEATHER).output_text,
        "refused": lambda: raised(lambda: asked(model=site.unknown)),
        "broken": lambda: raised(lambda: list(asked(BREAKS, site.played, stream=True))),
    }


if __name__ == "__main__":
    main(["openai"], 'OpenAI(base_url="http://HOST/v1")', deeds)
