#!/usr/bin/env python3
"""Write the tables and the picture of docs/capacity.md and docs/origin.md from what `penstock plan` computes, or with --check say whether
they are what it makes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from backends.sglang_dsv3 import origin
from backends.sglang_dsv3.engine.plan import chart, display, gpus, published, question, roofline, verdict, weights
from backends.sglang_dsv3.engine.plan.memory import Layout
from backends.sglang_dsv3.engine.plan.question import Question

DOCS = Path(__file__).resolve().parents[1] / "docs"
_COUNTS = (4, 8)
# The how-to's own columns: name, memory, speed, loss in BLEU.
_CLAIMED = (("FP16", "bf16", "100 %", "base", "-"), ("FP8", "fp8", "55 %", "+12 %", "0.3 %"),
            ("INT8", "int8", "30 %", "+35 %", "1.8 %"), ("FP4", "nvfp4", "18 %", "+60 %", "4.2 %"))  # fmt: skip


def hosts() -> Iterator[str]:
    """FP8 V3 on four and on eight of each card."""
    of = question.model("V3")
    for count in _COUNTS:
        for card in gpus.CARDS:
            host = gpus.Host(1, count, card)
            asked = Question(of, host, question.spread(host, of), context=1024)
            said = verdict.judge(asked)
            roof = roofline.step(display.work(asked), 1, 1024).roof_tokens_per_s
            tokens = f"{said.room.kv_tokens:,}" if said.room.kv_tokens else "-"
            left = f"{said.room.headroom_gib:.1f}"
            yield f"| {host.spec} | {said.room.weights_gib:.1f} | {left} | {tokens} | {roof:,.0f} | {said.word} |"


def deployments() -> Iterator[str]:
    """Published throughput beside the roofline of the same GPUs."""
    of = question.model("V3")
    assert of.shape is not None
    for each in published.DEPLOYMENTS:
        host = gpus.parsed(each.gpus)
        layout = Layout(host.total, each.dp, each.ep, host.nodes, travel=True)
        work = roofline.Work(of.shape, of.main, layout, host.card, each.kv_cache_dtype)
        best = roofline.step(work, each.batch * host.total, each.context).tokens_per_s / host.total
        share = f"{each.tokens_per_s / best:.0%}"
        yield f"| {each.what} | {each.tokens_per_s:,.0f} | {best:,.0f} | {share} | {each.says}: {each.source} |"


def quantisation() -> Iterator[str]:
    """The how-to's table, each row answered."""
    of = question.model("V3", "bf16")
    host = gpus.parsed("8xH200")

    def computed(name: str) -> tuple[float, float, float]:
        assert of.shape is not None
        main, _ = weights.computed(of.shape, weights.scheme(name))
        work = roofline.Work(of.shape, main, Layout(host.total), host.card, "auto")
        one, many = (roofline.step(work, batch, 1024).roof_tokens_per_s for batch in (1, 128))
        return main.total / 1e9, one, many

    base = computed("bf16")
    for title, name, memory, speed, loss in _CLAIMED:
        size, one, many = computed(name)
        faster = f"{one / base[1] - 1:+.0%} at batch 1, {many / base[2] - 1:+.0%} at 128 (computed)" if name != "bf16" else "the base"
        quality = "" if name == "bf16" else "; loss: claimed by the origin, no source found"
        yield f"| {title} | {memory} | {speed} | {loss} | {size:,.0f} GB, {size / base[0]:.0%} (computed); {faster}{quality} |"


def keys() -> Iterator[str]:
    """What each of its keys is today."""
    kept = {
        "memory_fraction": "the same name: of each GPU, for weights and KV cache together",
        "quantization": "left out: the checkpoint says it",
    }
    for name, words in sorted({**origin.FORMER, **origin.CHANGED, **kept}.items()):
        yield f"| `{name}` | {words} |"


TABLES = {"capacity.md": {"hosts": hosts, "deployments": deployments}, "origin.md": {"quantisation": quantisation, "keys": keys}}


def made() -> dict[Path, str]:
    """Every file as it should be."""
    found: dict[Path, str] = {}
    for name, tables in TABLES.items():
        text = (DOCS / name).read_text(encoding="utf-8")
        for table, rows in tables.items():
            pattern = rf"(<!-- plan:{table} -->\n(?:\|[^\n]*\n){{2}})(?:\|[^\n]*\n)*(<!-- plan -->)"
            body = "\n".join(rows()) + "\n"
            text, count = re.subn(pattern, lambda match, body=body: match[1] + body + match[2], text)
            if count != 1:
                raise SystemExit(f"docs/{name} has no place for {table}")
        found[DOCS / name] = text
    of, host = question.model("V3"), gpus.parsed("8xH200")
    asked = Question(of, host, question.spread(host, of))
    found[DOCS / "capacity.svg"] = chart.svg(display.plan(asked, verdict.judge(asked), display.steps(asked), []))
    return found


def main() -> int:
    """Write, or check."""
    old = [path for path, text in made().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" not in sys.argv[1:]:
        for path, text in made().items():
            path.write_text(text, encoding="utf-8")
        return 0
    for path in old:
        print(f"docs/{path.name} is old: run `make fix`")
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
