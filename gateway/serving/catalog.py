"""What `/v1/models` says, to each family of clients in its own shape."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from urllib.parse import parse_qs

from msgspec import UnsetType

from gateway.errors import InvalidRequest, shortened
from gateway.wire.answers import AnthropicModel, AnthropicModels, ModelInfo, ModelList
from gateway.wire.error import Shape

# Models of one page, by Anthropic's API reference.
PAGE, LARGEST_PAGE = 20, 1000


def one(model: ModelInfo, shape: Shape) -> ModelInfo | AnthropicModel:
    """A model."""
    return _anthropic(model) if shape is Shape.ANTHROPIC else model


def several(models: Sequence[ModelInfo], shape: Shape, query: bytes) -> ModelList | AnthropicModels:
    """All of them, or in Anthropic's shape the page that the query asks for; raises InvalidRequest."""
    return _page(models, query) if shape is Shape.ANTHROPIC else ModelList("list", list(models))


def parameter(query: bytes, name: str) -> str | None:
    """The last value of a parameter of a URL's query."""
    values = parse_qs(query.decode("latin-1"), keep_blank_values=True).get(name)
    return values[-1] if values else None


def _page(models: Sequence[ModelInfo], query: bytes) -> AnthropicModels:
    limit = _limit(parameter(query, "limit"))
    after, before = parameter(query, "after_id"), parameter(query, "before_id")
    if after and before:
        raise InvalidRequest("'after_id' and 'before_id' exclude each other: send one of them.", param="before_id", code="invalid_value")
    ids = [model.id for model in models]
    start = _place(ids, "after_id", after) + 1 if after else 0
    end = _place(ids, "before_id", before) if before else len(ids)
    if before:
        start = max(0, end - limit)
    shown = [_anthropic(model) for model in models[start : min(end, start + limit)]]
    more = start > 0 if before else start + limit < end
    return AnthropicModels(shown, more, shown[0].id if shown else None, shown[-1].id if shown else None)


def _limit(text: str | None) -> int:
    if text is None:
        return PAGE
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= LARGEST_PAGE):
        message = f"Invalid value for 'limit': expected 1 to {LARGEST_PAGE}, got '{shortened(text)}'."
        raise InvalidRequest(message, param="limit", code="invalid_value")
    return int(text)


def _place(ids: Sequence[str], name: str, id: str) -> int:
    if id not in ids:
        raise InvalidRequest(f"Invalid value for '{name}': no model is called '{shortened(id)}'.", param=name, code="invalid_value")
    return ids.index(id)


def _anthropic(model: ModelInfo) -> AnthropicModel:
    length = None if isinstance(model.context_length, UnsetType) else model.context_length
    created_at = datetime.fromtimestamp(model.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return AnthropicModel(model.id, "model", model.id, created_at, "active", length, length)
