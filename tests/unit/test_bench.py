"""What the bench makes of its figures: the targets judged, the documents filled, parts of two runs put together, stages told apart."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from bench import gateway, played, report, routing, stages, traces
from bench.load import KINDS
from bench.peers import BARE, OURS
from tests.support.processes import ROOT

NAMES = (OURS, BARE, "nginx", "smg", "sglang-router")


def result() -> dict[str, Any]:
    """Every line just met: the target everywhere, the stretch for JSON alone."""
    median = {
        "json": dict(zip(NAMES, (50.0, 40.0, 10.0, 100.0, 50.0), strict=True)),
        "json_200k": dict(zip(NAMES, (60.0, 40.0, 10.0, 100.0, 50.0), strict=True)),
        "sse": dict(zip(NAMES, (55.0, 40.0, 10.0, 100.0, 50.0), strict=True)),
        "event": dict(zip(NAMES, (100.0, 40.0, 10.0, 100.0, 50.0), strict=True)),
    }
    added = {count: {name: {"p50": 200.0, "p99": 300.0 if name == OURS else 200.0} for name in NAMES} for count in ("1", "32")}
    straight = {"p50": 100.0, "p99": 200.0, "late_p50": 60.0, "late_p99": 90.0, "client_cpu": 70.0}
    memory = {"idle_mb": 70.0, "idle_shared_mb": 60.0, "open_mb": 180.0, "open_shared_mb": 170.0, "each_kb": 9.0}
    parts: dict[str, dict[str, Any]] = {
        "cpu": {"rounds": 3, "median": median, "resident_mb": {name: [50, 60] for name in NAMES}},
        "latency": {"rounds": 3, "rate": 200, "added_us": added, "direct_us": {"1": straight, "32": straight}},
        "memory": {"rounds": 3, "streams": 5000, **memory},
        "variants": {"rounds": 3, "ratio": {"redis": 1.5, "2 workers": 1.05, "2 workers, redis": 9.0}, "redis_server_us": 30.0},
        "start": {"median_s": 0.5},
    }  # fmt: skip
    ours = {"version": "0.1", "commit": "abc", "form": "compiled", "python": "3.11"}
    dated = {name: {"date": "2026-11-25", **part} for name, part in parts.items()}
    return {"machine": "here", "command": "make bench", "penstock": ours, "versions": {"smg": "1.13.0"}, "parts": dated}


def test_a_target_is_met_up_to_its_last_figure_and_not_beyond() -> None:
    found = list(report.lines(result()))
    assert len(found) == 13
    assert all(line.met for line in found), [line for line in found if not line.met]
    assert [line.name for line in found if line.stretch_met] == [f"CPU: {KINDS[0].title}"]
    worse = result()
    for by in worse["parts"]["cpu"]["median"].values():
        by[OURS] += 31.0
    for by in worse["parts"]["latency"]["added_us"].values():
        by[OURS] = {"p50": 201.0, "p99": 301.0}
    worse["parts"]["memory"].update(idle_mb=71.0, open_mb=181.0)
    worse["parts"]["variants"]["ratio"].update({"redis": 1.51, "2 workers": 1.06})
    worse["parts"]["start"]["median_s"] = 0.51
    assert not any(line.met for line in report.lines(worse))


def test_what_was_not_measured_is_not_judged() -> None:
    little = result()
    little["parts"] = {"memory": {**little["parts"]["memory"], "streams": 500, "rounds": 1}}
    assert [line.met for line in report.lines(little)] == [True, None]
    assert "for trying" in report.table(little)
    assert "for trying" not in report.table(result())


def test_a_multiple_of_what_was_lost_in_noise_is_not_judged() -> None:
    noisy = result()
    noisy["parts"]["latency"]["added_us"]["1"]["smg"]["p99"] = -50.0
    assert [line.met for line in report.lines(noisy) if "p99" in line.name] == [None, True]


def test_the_table_says_every_gateway_beside_penstock_and_penstock_beside_smg() -> None:
    row = next(line for line in report.cpu(result()).splitlines() if line.startswith("| JSON request, 0.5 kB"))
    assert row.split(" | ")[1:] == ["**50**", "40 (0.80×)", "10 (0.20×)", "100 (2.00×)", "50 (1.00×)", "0.50", "0.40 |"]


def test_a_document_is_filled_where_it_asks_and_nowhere_else() -> None:
    text = "before\n<!-- bench:cpu -->\nold\n<!-- bench -->\nbetween\n<!-- bench:latency -->\nold\n<!-- bench -->\nafter\n"
    found = report.filled(text, result())
    assert found.startswith(f"before\n<!-- bench:cpu -->\n{report.cpu(result())}\n<!-- bench -->\nbetween\n")
    assert report.filled(found, result()) == found
    partly = result()
    del partly["parts"]["latency"]
    assert "<!-- bench:latency -->\nold\n<!-- bench -->" in report.filled(text, partly)


@pytest.mark.parametrize("document", report.DOCS)
def test_the_documents_have_blocks_and_each_names_a_table(document: Path) -> None:
    names = [found[2] for found in report._BLOCK.finditer(document.read_text())]
    assert names
    report.filled(document.read_text(), result())


def test_parts_of_an_earlier_run_stay_if_it_was_of_the_same_penstock_on_the_same_machine() -> None:
    earlier, now = result(), result()
    now["parts"] = {"start": {"date": "2026-11-26", "median_s": 0.4}}
    found = gateway.merged(earlier, now)
    assert list(found["parts"]) == list(gateway.PARTS)
    assert found["parts"]["start"]["median_s"] == 0.4
    for name in ("machine", "penstock", "versions"):
        assert list(gateway.merged({**earlier, name: "another"}, now)["parts"]) == ["start"]
    assert list(gateway.merged({"median": {}}, now)["parts"]) == ["start"]  # as the file was in 2026-11


@pytest.mark.parametrize("name", [name for name in stages.STAGES if name != stages.LOOP_MODULE])
def test_a_stage_names_modules_that_are_there(name: str) -> None:
    assert importlib.util.find_spec(name) is not None


def test_code_is_counted_to_the_module_that_it_is_of() -> None:
    packages = f"{ROOT}/.venv-dev/lib/python3.11/site-packages/"
    compiled = {"body": "gateway.wire.body", "wire___body": "gateway.wire.body", "limits___memory": "gateway.access.limits.memory"}
    of = played.rules({"roots": [packages, f"{ROOT}/"], "compiled": compiled})
    assert of(f"{ROOT}/gateway/wire/body.py:read") == "gateway.wire.body"
    assert of(f"{packages}litestar/routes/__init__.py:<module>") == "litestar.routes"
    assert of(f"{ROOT}/tests/support/memory_net.py:write") == of(f"{ROOT}/bench/played.py:play") == "harness"
    assert of("/usr/lib/python3.11/asyncio/base_events.py:_run_once") == "asyncio"
    # The library's is its caller's: a timeout, a name tuple's constructor, the C of mypyc's own runtime.
    assert of("/usr/lib/python3.11/asyncio/base_events.py:call_later") == of("<string>:__new__") == of("CPyDict_GetItem") == ""
    assert of("CPyDef_body___read") == of("CPyPy_wire___body___read") == "gateway.wire.body"
    assert of("CPyDef_limits___memory___Memory___take") == "gateway.access.limits.memory"
    assert stages.stage("gateway.access.limits.memory") == "admission and settlement"
    assert stages.stage("gateway.something_new") == "gateway.something_new"


def test_simulated_hosts_show_what_a_policy_does_to_their_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "TRACES", {"agents": traces.TRACES["agents"]})
    monkeypatch.setattr(routing, "POLICIES", ("two_choices", "affinity"))
    result = routing.measure(length_s=60)
    blind, bound = (result["traces"]["agents"][policy] for policy in ("two_choices", "affinity"))
    assert blind["requests"] == bound["requests"] > 200
    assert bound["hit_rate"] > blind["hit_rate"] + 0.05
    assert bound["hit_rate"] >= bound["expected_rate"] > bound["hit_rate"] - 0.1, "what is expected is there, and nearly all that is there"
    assert bound["imbalance"] < 2
    assert f"{bound['hit_rate']:.1%}" in routing.table(result)
    assert routing.draw(result).count("<rect") == 1 + 2 * len(routing._PANELS)
