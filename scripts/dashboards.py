#!/usr/bin/env python3
"""Write the Grafana dashboards of deploy/grafana/panels.yaml, or with --check say whether they are what it makes, and whether they ask only
for series that the gateway exports."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from gateway.telemetry import metrics

GRAFANA = Path(__file__).resolve().parents[1] / "deploy" / "grafana"
SOURCE = {"type": "prometheus", "uid": "prometheus"}
_SERIES = re.compile(r"\b(?:penstock|gen_ai_server)_\w+")


def board(uid: str, made: dict[str, Any]) -> dict[str, Any]:
    """One dashboard as Grafana has it: rows of up to four panels."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row in made["rows"]:
        place = {"x": 0, "y": y, "w": 24, "h": 1}
        panels.append({"type": "row", "title": row["row"], "collapsed": False, "panels": [], "gridPos": place})
        y += 1
        width = 24 // min(4, len(row["panels"]))
        for number, panel in enumerate(row["panels"]):
            asked = [pair for one in panel["ask"] for pair in one.items()]
            targets = [
                {"refId": chr(65 + index), "expr": expr, "legendFormat": legend, "exemplar": True}
                for index, (legend, expr) in enumerate(asked)
            ]
            panels.append(
                {
                    "type": "timeseries",
                    "title": panel["title"],
                    "gridPos": {"x": number % 4 * width, "y": y + number // 4 * 8, "w": width, "h": 8},
                    "targets": targets,
                    "datasource": SOURCE,
                    "fieldConfig": {"defaults": {"unit": panel["unit"], "min": 0}, "overrides": []},
                }
            )
        y += -(-len(row["panels"]) // 4) * 8
    for number, panel in enumerate(panels):
        panel["id"] = number + 1
    ((name, query),) = made["variable"].items()
    everything = {"includeAll": True, "multi": True, "current": {"text": "All", "value": "$__all"}, "refresh": 2}
    return {
        "uid": f"penstock-{uid}",
        "title": made["title"],
        "tags": ["penstock"],
        "schemaVersion": 39,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [{"name": name, "type": "query", "datasource": SOURCE, "query": query, **everything}]},
        "panels": panels,
    }


def unknown(expr: str) -> set[str]:
    """Series in a query that the gateway does not export."""
    exported: set[str] = set()
    for family in metrics.FAMILIES:
        exported |= {f"{family.name}{end}" for end in ("_bucket", "_sum", "_count")} if family.kind == "histogram" else {family.name}
    return set(_SERIES.findall(expr)) - exported


def main() -> int:
    """Write, or check."""
    wrong: list[str] = []
    for uid, made in yaml.safe_load((GRAFANA / "panels.yaml").read_text()).items():
        found = board(uid, made)
        for panel in found["panels"]:
            for target in panel.get("targets", ()):
                wrong += [
                    f"panels.yaml: '{panel['title']}' asks for {name}, which there is not" for name in sorted(unknown(target["expr"]))
                ]
        path, text = GRAFANA / "dashboards" / f"{uid}.json", json.dumps(found, indent=1) + "\n"
        if "--check" not in sys.argv[1:]:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            wrong.append(f"{path.name} is old: run `make fix`")
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
