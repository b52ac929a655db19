"""The roofline as a picture: tokens a second by batch, both on scales of doubling, in SVG without any library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from backends.sglang_dsv3.engine.plan.display import Plan

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 800, 440, 70, 230, 50, 50


def svg(shown: Plan) -> str:
    """Three curves: weights alone; with this layout's own reading and its cache; and what one request gets."""
    curves = (
        ("weights alone (roof)", "#999", [step.roof_tokens_per_s for step in shown.steps]),
        (f"with {shown.cached_tokens_per_request:,} cached tokens each", "#1f6f8b", [step.tokens_per_s for step in shown.steps]),
        ("of that, for each request", "#c2571a", [step.per_request for step in shown.steps]),
    )
    batches = [step.batch for step in shown.steps]
    low = 2.0 ** math.floor(math.log2(min(min(values) for _, _, values in curves)))
    high = 2.0 ** math.ceil(math.log2(max(max(values) for _, _, values in curves)))
    return "\n".join(_parts(shown, curves, batches, low, high)) + "\n"


def _parts(shown: Plan, curves: Sequence[tuple[str, str, list[float]]], batches: Sequence[int], low: float, high: float) -> Iterator[str]:
    def x(batch: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * math.log2(batch / batches[0]) / math.log2(batches[-1] / batches[0])

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * math.log2(high / value) / math.log2(high / low)

    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12" fill="#333">'
    yield f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>'
    title = escape(f"{shown.model} ({shown.stored}) on {shown.gpus}: tokens/s at best, by batch")
    yield f'<text x="{_LEFT}" y="20" font-size="14">{title}</text>'
    yield f'<text x="{_LEFT}" y="37" fill="#777">computed from published bandwidth and arithmetic; not measured</text>'
    for batch in batches:
        yield f'<path d="M{x(batch):.1f} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="#eee"/>'
        yield f'<text x="{x(batch):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{batch}</text>'
    value = low
    while value <= high:
        yield f'<path d="M{_LEFT} {y(value):.1f}H{_WIDTH - _RIGHT}" stroke="#eee"/>'
        yield f'<text x="{_LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:,.0f}</text>'
        value *= 2
    for name, colour, values in curves:
        points = " ".join(f"{x(batch):.1f},{y(value):.1f}" for batch, value in zip(batches, values, strict=True))
        yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        yield f'<text x="{_WIDTH - _RIGHT + 8}" y="{y(values[-1]) + 4:.1f}" fill="{colour}">{escape(name)}</text>'
    yield f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 12}" text-anchor="middle">requests decoded at once</text>'
    yield "</svg>"
