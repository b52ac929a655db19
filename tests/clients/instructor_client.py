"""instructor, over openai-python 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import instructor
import openai

from tests.clients.ask import WEATHER, Site, Where, main, raised


def deeds(site: Site) -> dict[str, Callable[[], Any]]:
    def asked(mode: Any = instructor.Mode.TOOLS, model: str = site.tiny, kind: Any = Where, **more: Any) -> Any:
        client: Any = instructor.from_openai(openai.OpenAI(base_url=site.base_url, api_key=site.key), mode=mode)
        return client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": WEATHER}], response_model=kind, max_retries=1, **more
        )

    def partial() -> Any:
        *_, last = asked(kind=instructor.Partial[Where], stream=True)
        return ["Where", last.model_dump()]

    return {
        "plain": lambda: asked(kind=None).choices[0].message.content,
        "tool": lambda: ["Where", asked().model_dump()],
        "tool_stream": partial,
        "structured": lambda: asked(instructor.Mode.JSON_SCHEMA).model_dump(),
        "refused": lambda: raised(lambda: asked(model=site.unknown)),
    }


if __name__ == "__main__":
    main(["instructor", "openai"], 'from_openai(OpenAI(base_url="http://HOST/v1"))', deeds)
