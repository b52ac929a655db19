"""The examples of the OpenAPI document, which run as they stand, before the real engine."""

from __future__ import annotations

from tests.support import raw
from tests.support.processes import Gateway
from tests.wire.test_examples import examples, kinds


def test_each_is_answered_as_it_stands(served: Gateway) -> None:
    found = list(examples(served))
    assert len(found) > 10
    for path, name, body, operation in found:
        answer = raw.call(served.port, "POST", path, body)
        assert answer.status == 200, f"{path}, {name}: {answer.body!r}"
        if body.get("stream"):
            shown = operation["responses"]["200"]["content"]["text/event-stream"]["example"]
            assert set(kinds(shown)) <= {*kinds(answer.body.decode()), "response.completed"}, path
