"""What `bench.gateway` measured, as tables, a drawing, and the price list's targets with met or not met.

python -m bench.report [--docs]       from bench/results/gateway.json: .md and .svg anew; --docs: the tables in the documents too
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.load import KINDS
from bench.peers import BARE, OURS
from tests.support.processes import ROOT

RESULTS = ROOT / "bench" / "results"
DOCS = (ROOT / "docs" / "performance.md", ROOT / "README.md")
# What may be in a document: <!-- bench:cpu --> the table <!-- bench -->.
_BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- bench -->)", re.DOTALL)


@dataclass(frozen=True)
class Line:
    """A line of the price list: what was measured in words, its target and stretch in words, and whether they are met; None: it cannot be
    judged."""

    name: str
    measured: str
    target: str
    met: bool | None
    stretch: str = ""
    stretch_met: bool | None = None


# Of CPU: the target as a multiple of SMG's, the stretch as a multiple of somebody's.
_CPU = {"json": (0.8, 1.0, "sglang-router"), "json_200k": (0.6, 0.4, "smg"), "sse": (0.55, 0.4, "smg"), "event": (1.0, 1.5, "nginx")}
_NAMES = {"smg": "SMG", "nginx": "NGINX"}


def lines(result: dict[str, Any]) -> Iterator[Line]:
    """Of the parts that were measured; what is judged is Penstock with everything on."""
    parts = result["parts"]
    if cpu := parts.get("cpu"):
        for kind in KINDS:
            by, (target, factor, whose) = cpu["median"][kind.name], _CPU[kind.name]
            ours, smg = by[OURS], by["smg"]
            name = _NAMES.get(whose, whose)
            stretch = f"≤ {factor:g} × {name} ({factor * by[whose]:.0f} µs)"
            words = f"{ours:.0f} µs, {ours / smg:.2f} × SMG"
            yield Line(f"CPU: {kind.title}", words, f"≤ {target:g} × SMG", ours <= target * smg, stretch, ours <= factor * by[whose])
    if latency := parts.get("latency"):
        for count, added in latency["added_us"].items():
            ours, smg = added[OURS], added["smg"]
            where = f"{latency['rate']} req/s, c={count}"
            yield Line(
                f"Added latency p50, {where}", f"{ours['p50']:.0f} µs; SMG {smg['p50']:.0f}", "≤ SMG's", ours["p50"] <= smg["p50"],
                "≤ half of SMG's", ours["p50"] <= smg["p50"] / 2,
            )  # fmt: skip
            words = f"{ours['p99']:.0f} µs; SMG {smg['p99']:.0f}"
            # Where SMG seems quicker than nothing at all the machine was too busy for a multiple of that to mean anything.
            met = ours["p99"] <= 1.5 * smg["p99"] if smg["p99"] > 0 else None
            yield Line(f"Added latency p99, {where}", words, "≤ 1.5 × SMG's", met)
    if memory := parts.get("memory"):
        yield Line("Resident, idle", f"{memory['idle_mb']:.0f} MB", "≤ 70 MB", memory["idle_mb"] <= 70)
        open_mb = memory["open_mb"]
        enough = memory["streams"] >= 5000
        yield Line(f"Resident, {memory['streams']:,d} streams", f"{open_mb:.0f} MB", "≤ 180 MB", open_mb <= 180 if enough else None)
    if variants := parts.get("variants"):
        for (what, ratio), limit in zip(variants["ratio"].items(), (1.5, 1.05, None), strict=True):
            if limit is not None:
                yield Line(f"CPU, {what}", f"{ratio:.2f}", f"≤ {limit:g}", ratio <= limit)
    if start := parts.get("start"):
        yield Line("Start to listening", f"{start['median_s']:.2f} s", "≤ 0.5 s", start["median_s"] <= 0.5)


def _rows(head: list[str], body: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def price(result: dict[str, Any]) -> str:
    """Every target, with met or not met."""

    def verdict(met: bool | None) -> str:
        return "" if met is None else "met" if met else "**not met**"

    body = [[line.name, line.measured, line.target, verdict(line.met), line.stretch, verdict(line.stretch_met)] for line in lines(result)]
    return _rows(["", "measured", "target", "", "stretch", ""], body)


def cpu(result: dict[str, Any]) -> str:
    """Medians; in brackets how many times Penstock's with everything on."""
    found = result["parts"]["cpu"]
    names = list(found["resident_mb"])
    body = []
    for kind in KINDS:
        by = found["median"][kind.name]
        cells = [f"**{by[name]:.0f}**" if name == OURS else f"{by[name]:.0f} ({by[name] / by[OURS]:.2f}×)" for name in names]
        body.append([f"{kind.title}: {kind.unit}", *cells, *(f"{by[name] / by['smg']:.2f}" for name in (OURS, BARE))])
    memory = [f"{after} ({idle})" for idle, after in found["resident_mb"].values()]
    body.append(["Resident memory after all of it (before), MB", *memory, "", ""])
    return _rows(["", *names, f"{OURS} / SMG", f"{BARE} / SMG"], body)


def latency(result: dict[str, Any]) -> str:
    """What a gateway adds, p50 and p99."""
    found = result["parts"]["latency"]
    names = list(next(iter(found["added_us"].values())))
    body = []
    for count, by in found["added_us"].items():
        straight = found["direct_us"][count]
        cells = [f"{by[name]['p50']:.0f} / {by[name]['p99']:.0f}" for name in names]
        body.append(
            [
                f"{found['rate']} req/s over {count} connection{'s' * (count != '1')}",
                *cells,
                f"{straight['p50']:.0f} / {straight['p99']:.0f}",
            ]
        )
    return _rows(["added µs, p50 / p99", *names, "(straight to the upstream)"], body)


def _client(result: dict[str, Any]) -> str:
    by = result["parts"]["latency"]["direct_us"]
    late = ", ".join(f"{each['late_p50']:.0f} and {each['late_p99']:.0f} µs late with c={count}" for count, each in by.items())
    cpu_us = max(each["client_cpu"] for each in by.values())
    return f"The client sends on time to (p50 and p99) {late}, and takes {cpu_us:.0f} µs of CPU a request itself."


def others(result: dict[str, Any]) -> str:
    """Memory, variants and the start, in sentences."""
    parts, said = result["parts"], []
    if memory := parts.get("memory"):
        said.append(
            f"Resident with everything on, parent and worker: {memory['idle_mb']:.0f} MB idle, {memory['open_mb']:.0f} MB with "
            f"{memory['streams']:,d} streams open, {memory['each_kb']:.1f} kB each (with what both share counted once "
            f"{memory['idle_shared_mb']:.0f} and {memory['open_shared_mb']:.0f} MB)."
        )
    if variants := parts.get("variants"):
        ratios = "; ".join(f"{what}: {ratio:.2f}" for what, ratio in variants["ratio"].items())
        said.append(f"CPU of a JSON request, {ratios}. Redis itself takes {variants['redis_server_us']:.0f} µs a request.")
    if start := parts.get("start"):
        said.append(f"`penstock serve` without a local engine listens {start['median_s']:.2f} s after it was started.")
    return "\n".join(said)


def foot(result: dict[str, Any]) -> str:
    """Where, when, with which versions and how."""
    ours = result["penstock"]
    versions = ", ".join(f"{_NAMES.get(name, name)} {version}" for name, version in result["versions"].items())
    dates = sorted({part["date"] for part in result["parts"].values()})
    rounds = min((part["rounds"] for part in result["parts"].values() if "rounds" in part), default=0)
    return (
        f"{' and '.join(dates)}, {result['machine']}; `{result['command']}`, medians of {rounds} rounds in turn, one worker each."
        f"{'' if rounds >= 3 else ' **So few rounds are for trying, not for publishing.**'}\n"
        f"Penstock {ours['version']} ({ours['commit']}), {ours['form']}; {versions}.\n"
        f"`{OURS}`: a key with rpm, tpm and max_in_flight, metrics, 1 % of traces sampled, weights 5, 3 and 2 over three\n"
        f"hosts, ledger, kept records and a log line on. `{BARE}` and the others: none of it, one host."
    )


def table(result: dict[str, Any]) -> str:
    """All of it, as bench/results/gateway.md."""
    parts = result["parts"]
    said = [price(result)]
    if "cpu" in parts:
        said.append(cpu(result))
    if "latency" in parts:
        said += [latency(result), _client(result)]
    return "\n\n".join([*said, others(result), foot(result)]) + "\n"


def draw(result: dict[str, Any]) -> str:
    """One panel a load, one bar a gateway."""
    found = result["parts"]["cpu"]
    names = list(found["resident_mb"])
    row, panel = 24, 34 + 24 * len(names)
    height = 40 + panel * len(KINDS) + 20
    parts = ['<text x="10" y="24" font-size="16" font-weight="bold">CPU a gateway spends (less is better)</text>']
    for index, kind in enumerate(KINDS):
        top = 44 + index * panel
        values = found["median"][kind.name]
        scale = 380 / max(values.values())
        parts.append(f'<text x="10" y="{top + 12}" font-weight="bold">{kind.title}</text>')
        for place, name in enumerate(names):
            y = top + 20 + place * row
            width = max(values[name] * scale, 1)
            color = "#2a7de1" if name in (OURS, BARE) else "#b8c4d0"
            parts.append(f'<text x="10" y="{y + 14}">{name}</text>')
            parts.append(f'<rect x="120" y="{y}" width="{width:.0f}" height="18" rx="2" fill="{color}"/>')
            parts.append(f'<text x="{126 + width:.0f}" y="{y + 14}">{values[name]:.0f} {kind.unit.split(" ")[0]}</text>')
    say = f"{found['date']}, {result['machine']}; make bench, medians of {found['rounds']}"
    parts.append(f'<text x="10" y="{height - 10}" font-size="10" fill="#555">{say}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {height}" font-family="sans-serif" font-size="13">'
    return f'{head}<rect width="640" height="{height}" fill="white"/>{"".join(parts)}</svg>\n'


def write(result: dict[str, Any], folder: Path) -> None:
    """gateway.json, .md and .svg."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gateway.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    (folder / "gateway.md").write_text(table(result))
    if "cpu" in result["parts"]:
        (folder / "gateway.svg").write_text(draw(result))


def stages(folder: Path = RESULTS) -> str:
    """Where a request's instructions go in the compiled form, and what all of them come to in pure Python."""
    pure = json.loads((folder / "stages-pure.json").read_text())
    whole = [f"{pure['all'][kind] / 1e3:,.0f}" for kind in ("json", "stream", "event")]
    found = (folder / "stages-compiled.md").read_text().strip()
    told = f"In pure Python all of it, event loop included, is {whole[0]}, {whole[1]} and {whole[2]}"
    return f"{found}\n\n{told} ({pure['date']}, {pure['machine']})."


def filled(text: str, result: dict[str, Any]) -> str:
    """A document with its blocks made anew; one whose part was not measured stays as it is."""
    made = {"price": price, "cpu": cpu, "latency": lambda of: f"{latency(of)}\n\n{_client(of)}", "others": others, "foot": foot}
    made["stages"] = lambda _: stages()
    needs = {"cpu": "cpu", "latency": "latency"}

    def block(found: re.Match[str]) -> str:
        name = found[2]
        if needs.get(name, "") not in {"", *result["parts"]}:
            return found[0]
        return f"{found[1]}{made[name](result)}\n{found[3]}"

    return _BLOCK.sub(block, text)


def main() -> None:
    """Render anew what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", action="store_true", help="fill the tables in docs/performance.md and README.md too")
    options = parser.parse_args()
    result = json.loads((RESULTS / "gateway.json").read_text())
    write(result, RESULTS)
    if options.docs:
        for document in DOCS:
            document.write_text(filled(document.read_text(), result))
    print(price(result))


if __name__ == "__main__":
    main()
