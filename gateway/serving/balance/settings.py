"""What an operator may set about the health of hosts."""

from __future__ import annotations

from typing import Literal

import msgspec


class Health(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`backends.NAME.health`; times in seconds, shares between 0 and 1.

    A breaker opens when, of at least `min_sample` outcomes within `window_s`, `failure_ratio` were the target's fault; at most
    `max_ejected_share` of the pool's weight is ever ejected. `all_sick`: with nobody eligible, ask the sick ones or fail at once.
    A target that streams nothing for `wedged_s` while others do is asked to prove itself. One that comes back gets its full share after
    `slow_start_s`.
    """

    probe_s: float = 1.0
    min_sample: int = 5
    failure_ratio: float = 0.5
    window_s: float = 10.0
    ejection_s: float = 5.0
    max_ejection_s: float = 300.0
    max_ejected_share: float = 0.5
    all_sick: Literal["try_all", "fail_fast"] = "try_all"
    wedged_s: float = 10.0
    slow_start_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("probe_s", "window_s", "ejection_s", "max_ejection_s", "wedged_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0")
        for name in ("failure_ratio", "max_ejected_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1")
        if self.min_sample < 1 or self.slow_start_s < 0:
            raise ValueError("min_sample must be at least 1, slow_start_s at least 0")
