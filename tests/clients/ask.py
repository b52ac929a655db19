"""What the programs of this folder share: where to ask, what is asked, and how it is told."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from pydantic import BaseModel

WEATHER = "What is the weather like?"
# The scripted host plays this recorded stream: thoughts, text, and a call of get_weather with Paris.
PLAYED = "[[golden sglang-0.5.23-chat-stream-full]]"
# It dies after three events.
BREAKS = "[[die 3]]"


@dataclass(frozen=True)
class Site:
    """The gateway, and its models: `tiny` is the real engine's, `played` a scripted host's."""

    root: str
    key: str
    tiny: str = "tiny"
    played: str = "played"
    unknown: str = "nobodys"

    @property
    def base_url(self) -> str:
        return f"{self.root}/v1"


class Where(BaseModel):
    """Where somebody is."""

    city: Literal["Paris", "Rome"]


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": SCHEMA}}


def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather in a city."""
    return f"fine in {city}"


def raised(work: Callable[[], Any]) -> str:
    """Which exception comes of it, as `module.Class`, with its status where it has one."""
    try:
        found = work()
    except Exception as error:
        status = getattr(error, "status_code", None)
        return f"{type(error).__module__.partition('.')[0]}.{type(error).__name__}" + (f" {status}" if status else "")
    return f"nothing, but {found!r}"


def main(packages: list[str], base_url: str, deeds: Callable[[Site], dict[str, Callable[[], Any]]]) -> None:
    """Do every deed and print what came of it; `base_url` is how the client is told where to ask."""
    site = Site(**json.load(sys.stdin))
    found: dict[str, Any] = {}
    for name, deed in deeds(site).items():
        try:
            found[name] = deed()
        except Exception:
            found[name] = {"failed": traceback.format_exc()[-2500:]}
    versions = {package: metadata.version(package) for package in packages}
    print("\n" + json.dumps({"versions": versions, "base_url": base_url, "found": found}))
