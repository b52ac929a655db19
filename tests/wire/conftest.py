"""Fixtures of tests that need a Redis in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import redis
from tests.support.redis import Server


@pytest.fixture(scope="module", params=["debian", "oldest"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Each of the two versions of Redis that are promised."""
    binary = redis.DEBIAN if request.param == "debian" else redis.oldest()
    with redis.server(tmp_path_factory.mktemp("redis"), binary) as running:
        if request.param == "oldest":
            assert running.client().info("server")["redis_version"].startswith("6.2.")
        yield running
