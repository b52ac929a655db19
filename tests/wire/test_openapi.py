"""The OpenAPI document is valid, is what is served, and is kept by the answers; the page that shows it needs no network."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any, cast

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from openapi_spec_validator import validate

from gateway.errors import InvalidRequest
from gateway.plugin import Endpoint
from gateway.serving import calls
from tests.support import raw
from tests.support.processes import ROOT, Gateway

# FUZZ_EXAMPLES asks for more.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
DOCUMENT: dict[str, Any] = json.loads((ROOT / "openapi" / "openapi.json").read_text())


def resolved(schema: Any) -> dict[str, Any]:
    """A schema with the document's components beside it."""
    return {**schema, "components": DOCUMENT["components"]}


def check_answer(path: str, answer: raw.Answer) -> None:
    """The answer's status is documented, and its body is what the document says of it."""
    [operation] = DOCUMENT["paths"][path].values()
    content = operation["responses"][str(answer.status)]["content"]
    kind = answer.headers["content-type"].partition(";")[0]
    assert kind in content
    if kind == "application/json":
        jsonschema.validate(answer.json(), resolved(content[kind]["schema"]))


def test_the_document_is_valid_and_says_what_is_served(wired: Gateway) -> None:
    validate(DOCUMENT)
    assert DOCUMENT["openapi"].startswith("3.1")
    # Its examples name the models of its configuration, here this one.
    served = raw.call(wired.port, "GET", "/openapi.json").body
    assert json.loads(served.replace(b'deepseek-v3"', b'deepseek-v3-tiny"').replace(b'deepseek-v3\\"', b'deepseek-v3-tiny\\"')) == DOCUMENT
    assert {endpoint.value for endpoint in Endpoint} <= set(DOCUMENT["paths"])


def test_the_check_finds_an_old_document(tmp_path: Path) -> None:
    script = "import sys, openapi.__main__ as m; from pathlib import Path; m.FILE = Path(sys.argv.pop()); sys.exit(m.main())"
    old = tmp_path / "openapi.json"
    old.write_text("{}")
    command = [str(ROOT / ".venv-dev/bin/python"), "-c", script, "--check", str(old)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 1
    old.write_bytes((ROOT / "openapi" / "openapi.json").read_bytes())
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("path", ["/v1/models", "/livez", "/readyz"])
def test_what_is_read_is_as_documented(wired: Gateway, path: str) -> None:
    check_answer(path, raw.call(wired.port, "GET", path))


def _for_one_model() -> dict[str, Any]:
    """The document with the one model of the scripted engine, so that what is generated gets past the 404, and only what it serves."""
    narrowed = copy.deepcopy(DOCUMENT)
    for schema in narrowed["components"]["schemas"].values():
        if "Request" in schema.get("title", ""):
            schema["properties"]["model"] = {"type": "string", "enum": ["deepseek-v3"]}
    narrowed["paths"] = {path: item for path, item in narrowed["paths"].items() if path not in (Endpoint.EMBEDDINGS, Endpoint.RERANK)}
    return narrowed


OPERATIONS: list[Any] = [found.ok() for found in cast("Any", schemathesis.openapi.from_dict(_for_one_model()).get_all_operations())]


# What a GET asks cannot be wrong: nothing in it is checked but its path.
CASES = [(found, mode) for found in OPERATIONS for mode in schemathesis.GenerationMode if found.body or mode.value == "positive"]


# Through our own parametrisation: schemathesis gives all of its operations one and the same test id.
@pytest.mark.slow
@pytest.mark.parametrize(("operation", "mode"), CASES, ids=[f"{found.label}, {mode.value}" for found, mode in CASES])
def test_no_request_brings_a_failure_or_an_answer_that_is_not_documented(operation: Any, mode: Any, wired: Gateway) -> None:
    """Good and bad requests out of the document: no 5xx, no undocumented status, no answer against its schema. Whether a bad one is taken
    is the engine's word."""

    @settings(max_examples=EXAMPLES // 4, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def play(case: schemathesis.Case) -> None:
        judged = [schemathesis.checks.positive_data_acceptance, schemathesis.checks.negative_data_rejection]
        case.call_and_validate(base_url=wired.root, excluded_checks=judged)

    play()


@pytest.mark.slow
@pytest.mark.parametrize("operation", [found for found in OPERATIONS if found.body], ids=lambda found: found.label)
def test_openais_rules_are_those_of_the_document(operation: Any) -> None:
    """With `strict` nothing passes that the document does not allow."""
    schema = resolved(DOCUMENT["paths"][operation.path]["post"]["requestBody"]["content"]["application/json"]["schema"])
    wrong = jsonschema.Draft202012Validator(schema)
    refused = 0

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
    def play(case: schemathesis.Case) -> None:
        nonlocal refused
        if not isinstance(case.body, dict) or wrong.is_valid({name: value for name, value in case.body.items() if value is not None}):
            return
        refused += 1
        with pytest.raises(InvalidRequest):
            calls.parse(Endpoint(operation.path), json.dumps(case.body).encode(), strict=True)

    play()
    assert refused


def test_the_page_needs_nothing_from_elsewhere(wired: Gateway) -> None:
    page = raw.call(wired.port, "GET", "/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.body.decode())
    assert all(link.startswith(("/docs/", "data:,")) for link in loaded)
    for link in loaded[1:]:
        assert raw.call(wired.port, "GET", link).status == 200
    for missing in ("/docs/../secret", "/docs/%2e%2e/README.md", "/docs/nope.js", "/docsx"):
        assert raw.call(wired.port, "GET", missing).status == 404


def test_the_page_works_in_a_browser_without_a_network(wired: Gateway, tmp_path: Path) -> None:
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000", "--dump-dom",
        f"{wired.root}/docs",
    ]  # fmt: skip
    page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    for endpoint in Endpoint:
        assert f'data-path="{endpoint.value}"' in page
    assert "OAS 3.1" in page
    assert "Unable to render" not in page
