"""openai-python's own tests of the endpoints we have, from its source distribution, over a gateway in front of the real engine."""

from __future__ import annotations

import os
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.conformance import tables
from tests.support.engine import engine_url
from tests.support.processes import ROOT, Gateway, Rehearsal, gateway

HERE = ROOT / ".venv-clients" / "suite"
FILES = ["chat/test_completions.py", "test_completions.py", "test_models.py", "test_embeddings.py", "test_responses.py", "responses"]
# The names of models that are written into those tests.
NAMES = ["gpt-6-astra", "gpt-3.5-turbo-instruct", "gpt-4o-mini", "model"]


def listed() -> dict[str, str]:
    """Patterns of tests that are known to fail, each with its reason."""
    found: dict[str, str] = {}
    reason = ""
    for line in (Path(__file__).parent / "openai_suite.txt").read_text().splitlines():
        if line.startswith("  "):
            found[line.strip()] = reason
        elif line and not line.startswith("#"):
            reason = line
    return found


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """`*` is anything, and nothing else has a meaning; the class of a test may be any."""
    wanted = re.compile(".*".join(map(re.escape, pattern.replace("::", "::*.").split("*"))))
    return sorted(name for name in names if wanted.fullmatch(name))


@pytest.fixture
def named(reached: Gateway, scripted_sglang: Rehearsal, tmp_path: Path) -> Iterator[Gateway]:
    """In front of the same engine, with those names, short answers where no bound is given, and a model that embeds."""
    config = {
        "models": {
            "tiny": {"backend": "dsv3", "aliases": NAMES, "default_max_tokens": 8},
            "embedder": {"backend": "embeds", "aliases": ["text-embedding-3-small"]},
        },
        "backends": {
            "dsv3": {"kind": "sglang_dsv3", "hosts": [{"url": engine_url(reached)}]},
            "embeds": {"kind": "sglang_dsv3", "hosts": [{"url": scripted_sglang.url}], "endpoints": ["/v1/embeddings"]},
        },
    }
    with gateway(tmp_path, config) as running:
        running.wait_all_hosts()
        yield running


def test_openai_pythons_own_tests_pass_but_for_those_listed(named: Gateway, tmp_path: Path) -> None:
    results = tmp_path / "results.xml"
    command = [str(HERE / "bin" / "python"), "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", "--tb=line"]
    env = {"PATH": os.environ["PATH"], "TEST_API_BASE_URL": named.base_url}
    files = [f"tests/api_resources/{name}" for name in FILES]
    done = subprocess.run(
        [*command, f"--junitxml={results}", *files], cwd=HERE / "source", env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]
    passed, failed = set(), {}
    for case in ElementTree.parse(results).iter("testcase"):
        file, _, group = case.attrib["classname"].removeprefix("tests.api_resources.").rpartition(".")
        name = f"{file.replace('.', '/')}.py::{group}.{case.attrib['name']}"
        if (failure := case.find("failure")) is not None:
            failed[name] = failure.attrib["message"][:300]
        else:
            assert case.find("error") is None, name
            passed.add(name)
    assert passed, done.stdout[-3000:]
    known = [(pattern, matching(pattern, failed), matching(pattern, passed)) for pattern in listed()]
    new = set(failed).difference(*(fails for _, fails, _ in known))
    assert not new, f"{len(new)} tests fail and are not in openai_suite.txt: { {name: failed[name] for name in sorted(new)[:5]} }"
    assert not {pattern: passes for pattern, _, passes in known if passes}, "these pass, though openai_suite.txt lists them"
    assert not [pattern for pattern, fails, _ in known if not fails], "nothing fails any more that these lines of openai_suite.txt name"
    reasons = dict.fromkeys(listed().values(), 0)
    for pattern, fails, _ in known:
        reasons[listed()[pattern]] += len(fails)
    assert sum(reasons.values()) == len(failed), "a test is listed once"
    rows = [f"| {reason} | {count} |" for reason, count in reasons.items()]
    tables.agrees("suite", ["| of openai-python's own tests | |", "|---|---|", f"| pass | {len(passed)} |", *rows])
