"""LangChain's three clients that speak one of our families; which one is told as the argument."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from langchain_anthropic import ChatAnthropic
from langchain_deepseek import ChatDeepSeek
from langchain_openai import ChatOpenAI

from tests.clients.ask import BREAKS, PLAYED, WEATHER, Site, Where, get_weather, main, raised

CLIENTS: dict[str, tuple[str, Callable[[Site, str], Any]]] = {
    "langchain-openai": (
        'ChatOpenAI(base_url="http://HOST/v1")',
        lambda site, model: ChatOpenAI(base_url=site.base_url, api_key=site.key, model=model),  # type: ignore[arg-type]
    ),
    "langchain-deepseek": (
        'ChatDeepSeek(base_url="http://HOST/v1")',
        lambda site, model: ChatDeepSeek(base_url=site.base_url, api_key=site.key, model=model),
    ),
    "langchain-anthropic": (
        'ChatAnthropic(base_url="http://HOST")',
        lambda site, model: ChatAnthropic(base_url=site.root, api_key=site.key, model=model, max_tokens=120),
    ),
}


def deeds_of(name: str) -> Callable[[Site], dict[str, Callable[[], Any]]]:
    def deeds(site: Site) -> dict[str, Callable[[], Any]]:
        def model(which: str = site.tiny) -> Any:
            return CLIENTS[name][1](site, which)

        def called() -> Any:
            call = model().bind_tools([get_weather], tool_choice="any").invoke(WEATHER).tool_calls[0]
            return [call["name"], call["args"]]

        def together(chunks: Any) -> Any:
            first, *rest = chunks
            for chunk in rest:
                first += chunk
            return first

        def streamed_call() -> Any:
            call = together(model().bind_tools([get_weather], tool_choice="any").stream(WEATHER)).tool_calls[0]
            return [call["name"], call["args"]]

        def played() -> Any:
            said = together(model(site.played).bind_tools([get_weather]).stream(PLAYED))
            thoughts = said.additional_kwargs.get("reasoning_content")
            return [said.text, said.tool_calls[0]["name"], said.tool_calls[0]["args"], *([thoughts] if thoughts else [])]

        found = {
            "plain": lambda: model().invoke(WEATHER).text,
            "stream": lambda: [chunk.text for chunk in model().stream(WEATHER)],
            "tool": called,
            "tool_stream": streamed_call,
            "played": played,
            "structured": lambda: model().with_structured_output(Where).invoke(WEATHER).model_dump(),
            "refused": lambda: raised(lambda: model(site.unknown).invoke(WEATHER)),
            "broken": lambda: raised(lambda: list(model(site.played).stream(BREAKS))),
        }
        if name == "langchain-anthropic":  # no stream of that family is recorded with a call
            del found["played"]
        return found

    return deeds


if __name__ == "__main__":
    main([sys.argv[1]], CLIENTS[sys.argv[1]][0], deeds_of(sys.argv[1]))
