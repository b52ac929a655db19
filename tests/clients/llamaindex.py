"""LlamaIndex's OpenAILike, over openai-python 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

from tests.clients.ask import BREAKS, PLAYED, WEATHER, Site, Where, get_weather, main, raised


def deeds(site: Site) -> dict[str, Callable[[], Any]]:
    def model(name: str = site.tiny) -> Any:
        return OpenAILike(
            model=name, api_base=site.base_url, api_key=site.key, is_chat_model=True, is_function_calling_model=True, context_window=4096
        )

    tool = FunctionTool.from_defaults(get_weather, fn_schema=Where)

    def called() -> Any:
        said = model().chat_with_tools([tool], user_msg=WEATHER, tool_required=True)
        call = model().get_tool_calls_from_response(said)[0]
        return [call.tool_name, call.tool_kwargs]

    def played() -> Any:
        *_, last = model(site.played).stream_chat_with_tools([tool], user_msg=PLAYED)
        call = model().get_tool_calls_from_response(last)[0]
        return [last.message.content, call.tool_name, call.tool_kwargs]

    return {
        "plain": lambda: model().chat([ChatMessage(role="user", content=WEATHER)]).message.content,
        "stream": lambda: [chunk.delta or "" for chunk in model().stream_chat([ChatMessage(role="user", content=WEATHER)])],
        "tool": called,
        "played": played,
        "structured": lambda: model().as_structured_llm(Where).complete(WEATHER).raw.model_dump(),
        "refused": lambda: raised(lambda: model(site.unknown).complete(WEATHER)),
        "broken": lambda: raised(lambda: list(model(site.played).stream_chat([ChatMessage(role="user", content=BREAKS)]))),
    }


if __name__ == "__main__":
    main(["llama-index-llms-openai-like", "openai"], 'OpenAILike(api_base="http://HOST/v1")', deeds)
