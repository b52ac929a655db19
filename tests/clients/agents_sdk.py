"""OpenAI's agents SDK, over chat and over responses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)

from tests.clients.ask import BREAKS, PLAYED, WEATHER, Site, Where, get_weather, main, raised

set_tracing_disabled(True)  # traces go to OpenAI


def deeds(site: Site) -> dict[str, Callable[[], Any]]:
    client = openai.AsyncOpenAI(base_url=site.base_url, api_key=site.key)

    def agent(model: str = site.tiny, **more: Any) -> Any:
        return Agent(name="helper", model=OpenAIChatCompletionsModel(model=model, openai_client=client), **more)

    def by_responses() -> Any:
        # The scripted host: an answer that is cut off for its length is an error to this client.
        helper = Agent(name="helper", model=OpenAIResponsesModel(model=site.played, openai_client=client))
        return Runner.run_sync(helper, WEATHER).final_output

    async def events(helper: Any, text: str) -> list[Any]:
        running = Runner.run_streamed(helper, text)
        return [event async for event in running.stream_events()] + [running.final_output]

    def streamed(helper: Any, text: str) -> list[Any]:
        return asyncio.get_event_loop().run_until_complete(events(helper, text))

    def called() -> Any:
        helper = agent(tools=[function_tool(get_weather)], model_settings=ModelSettings(tool_choice="required"))
        items = Runner.run_sync(helper, WEATHER).new_items
        call = next(item.raw_item for item in items if item.type == "tool_call_item")
        output = next(item.output for item in items if item.type == "tool_call_output_item")
        return [call.name, call.arguments, output]

    def played() -> Any:
        *_, last = streamed(agent(site.played, tools=[function_tool(get_weather)]), PLAYED)
        return last

    def deltas() -> Any:
        found = streamed(agent(), WEATHER)[:-1]
        return [event.data.delta for event in found if event.type == "raw_response_event" and event.data.type.endswith("text.delta")]

    return {
        "plain": lambda: Runner.run_sync(agent(), WEATHER).final_output,
        "stream": deltas,
        "tool": called,
        "loop": played,
        "structured": lambda: Runner.run_sync(agent(output_type=Where), WEATHER).final_output.model_dump(),
        "responses": by_responses,
        "refused": lambda: raised(lambda: Runner.run_sync(agent(site.unknown), WEATHER)),
        "broken": lambda: raised(lambda: streamed(agent(site.played), BREAKS)),
    }


if __name__ == "__main__":
    main(["openai-agents"], 'OpenAIChatCompletionsModel(openai_client=AsyncOpenAI(base_url="http://HOST/v1"))', deeds)
