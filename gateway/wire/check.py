"""What a type or a range cannot say of one setting, beside it: `Annotated[str, Check(time_zone, "a time zone like UTC")]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Check(NamedTuple):
    """`test` raises ValueError with what is wrong, in words that follow the value; `accepted` says what would be right, or nothing where
    the words already do. `quote`: whether a refusal may show the value (which is masked in any case)."""

    test: Callable[[Any], object]
    accepted: str = ""
    quote: bool = True
