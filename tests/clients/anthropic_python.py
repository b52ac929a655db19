"""Anthropic's SDK."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anthropic

from tests.clients.ask import BREAKS, SCHEMA, WEATHER, Site, main, raised


def deeds(site: Site) -> dict[str, Callable[[], Any]]:
    client = anthropic.Anthropic(base_url=site.root, api_key=site.key)
    messages: Any = client.messages
    tools = [{"name": "get_weather", "description": "The weather.", "input_schema": SCHEMA}]

    def asked(text: str = WEATHER, model: str = site.tiny, **more: Any) -> Any:
        return {"model": model, "max_tokens": 120, "messages": [{"role": "user", "content": text}], **more}

    def streamed(text: str = WEATHER, model: str = site.tiny) -> Any:
        with messages.stream(**asked(text, model)) as stream:
            return list(stream.text_stream)

    def called() -> Any:
        call = messages.create(**asked(tools=tools, tool_choice={"type": "any"})).content[0]
        return [call.name, call.input]

    def streamed_call() -> Any:
        with messages.stream(**asked(tools=tools, tool_choice={"type": "any"})) as stream:
            call = stream.get_final_message().content[0]
        return [call.name, call.input]

    return {
        "plain": lambda: messages.create(**asked()).content[0].text,
        "stream": streamed,
        "tool": called,
        "tool_stream": streamed_call,
        "refused": lambda: raised(lambda: messages.create(**asked(model=site.unknown))),
        "broken": lambda: raised(lambda: streamed(BREAKS, site.played)),
    }


if __name__ == "__main__":
    main(["anthropic"], 'Anthropic(base_url="http://HOST")', deeds)
