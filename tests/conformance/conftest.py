"""What all clients are pointed at."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.processes import Gateway, Rehearsal, gateway

# SHA-256 of `foo`.
KEYS = [{"name": "ours", "hash": "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"}]


@pytest.fixture(scope="session")
def reached(scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One model is an engine's whose calls of tools are JSON, so that a model that knows nothing writes them; the other is scripted."""
    engine = {"tool_call_parser": "pythonic"}
    config = {
        "models": {"tiny": {"backend": "engine", "default_max_tokens": 120}, "played": {"backend": "scripted"}},
        "backends": {
            "engine": {"kind": "sglang_dsv3", "hosts": [{"launch": "local"}], "engine": engine},
            "scripted": {"kind": "sglang_dsv3", "hosts": [{"url": scripted_sglang.url}]},
        },
        "keys": KEYS,
    }
    with gateway(tmp_path_factory.mktemp("reached"), config) as running:
        running.wait_ready()
        running.wait_all_hosts()
        yield running
