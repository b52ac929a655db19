"""pydantic-ai."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.ask import BREAKS, PLAYED, WEATHER, Site, Where, get_weather, main, raised


def deeds(site: Site) -> dict[str, Callable[[], Any]]:
    provider = OpenAIProvider(base_url=site.base_url, api_key=site.key)

    def agent(model: str = site.tiny, **more: Any) -> Any:
        return Agent(OpenAIChatModel(model, provider=provider), **more)

    def streamed(helper: Any, text: str) -> list[str]:
        return list(helper.run_stream_sync(text).stream_text(delta=True, debounce_by=None))

    async def hear(_: Any, events: Any) -> None:
        async for _event in events:
            pass

    def loop() -> Any:
        """Who listens to events has the model's answers streamed."""
        return agent(site.played, tools=[get_weather]).run_sync(PLAYED, event_stream_handler=hear).output

    return {
        "plain": lambda: agent().run_sync(WEATHER).output,
        "stream": lambda: streamed(agent(), WEATHER),
        # What is to come out is asked for as a call of a tool.
        "tool": lambda: ["final_result", agent(output_type=Where).run_sync(WEATHER).output.model_dump()],
        "loop": loop,
        "structured": lambda: agent(output_type=NativeOutput(Where)).run_sync(WEATHER).output.model_dump(),
        "refused": lambda: raised(lambda: agent(site.unknown).run_sync(WEATHER)),
        "broken": lambda: raised(lambda: streamed(agent(site.played), BREAKS)),
    }


if __name__ == "__main__":
    main(["pydantic-ai-slim"], 'OpenAIProvider(base_url="http://HOST/v1")', deeds)
