"""Fixtures shared by all tests. Engines are started once per session, each only when a test asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import Gateway, Rehearsal, gateway, rehearsal


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--form", choices=("pure Python", "compiled"), default="pure Python", help="the form of the gateway that is tested")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test's folder (unit, wire, engine, chaos, conformance) is its marker; what takes the whole machine or patience says so itself."""
    for item in items:
        item.add_marker(item.path.relative_to(Path(__file__).parent).parts[0])
    if config.getoption("--form") == "compiled":
        left_out = [item for item in items if item.get_closest_marker("pure")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def form(request: pytest.FixtureRequest) -> str:
    """The form that this run is to test."""
    found: str = request.config.getoption("--form")
    return found


@pytest.fixture(scope="session")
def scripted_sglang() -> Iterator[Rehearsal]:
    """A scripted SGLang server."""
    with rehearsal() as running:
        yield running


@pytest.fixture(scope="session")
def wired(scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway in front of it, with no engine."""
    with gateway(tmp_path_factory.mktemp("wired"), scripted_sglang.backend()) as running:
        running.wait_ready()
        yield running


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """`penstock serve` without any configuration: the real engine with the tiny checkpoint."""
    with gateway(tmp_path_factory.mktemp("served")) as running:
        running.wait_ready()
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path
