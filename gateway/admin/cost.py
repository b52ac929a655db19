"""What a million tokens cost on one's own GPUs, and what the same had cost at an API's list price: sums that an operator can check."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

_MILLION = 1_000_000


class Prices(NamedTuple):
    """What GPUs cost for a while, and an API's list prices for a million tokens; None where nobody says."""

    gpus: int
    hours: float
    gpu_price: float
    list_price: float | None
    list_prompt_price: float | None

    @property
    def spent(self) -> float:
        """For all GPUs, whether they were busy or not."""
        return self.gpus * self.hours * self.gpu_price


def lines(rows: Sequence[Mapping[str, Any]], prices: Prices) -> Iterator[str]:
    """For people: each figure with where it is from."""
    delivered = sum(int(row["delivered_tokens"]) for row in rows)
    prompt = sum(int(row["prompt_tokens"]) for row in rows)
    wasted = sum(int(row["wasted_client_tokens"]) + int(row["wasted_host_tokens"]) for row in rows)
    yield f"measured (the ledger): {delivered:,} tokens delivered, {prompt:,} of prompts, {wasted:,} wasted"
    yield f"as asked: {prices.gpus:,} GPUs for {prices.hours:g} hours at {prices.gpu_price:g} each: {prices.spent:,.2f}"
    if not delivered:
        yield "computed: no token was delivered, so there is no price of one"
        return
    each = prices.spent / delivered * _MILLION
    yield f"computed: {each:,.2f} for a million tokens delivered, their prompts included"
    if prices.list_price is None:
        return
    bill = (delivered * prices.list_price + prompt * (prices.list_prompt_price or 0.0)) / _MILLION
    listed = f"{prices.list_price:g} for a million tokens"
    if prices.list_prompt_price is not None:
        listed += f" and {prices.list_prompt_price:g} for a million of prompts"
    if not bill:
        yield f"computed: at {listed} the same costs nothing"
        return
    share = prices.spent / bill - 1
    word = f"{-share:.0%} less" if share < 0 else f"{share:.0%} more" if share < 10 else f"{share + 1:,.0f} times as much"
    yield f"computed: at {listed} the same costs {bill:,.2f}; these GPUs cost {word}"
