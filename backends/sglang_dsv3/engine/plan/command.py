"""`penstock plan`."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import msgspec

from backends.sglang_dsv3.config import Config
from backends.sglang_dsv3.engine import checkpoint, section
from backends.sglang_dsv3.engine.plan import chart, display, fleet, question, verdict
from backends.sglang_dsv3.engine.plan.question import Question
from gateway.errors import ConfigError
from gateway.plugin import CommandEnv
from gateway.terminal import say, say_json

_MOST = 1 << 24


@click.command()
@click.argument("model", required=False)
@click.option("-c", "--config", "path", type=click.Path(path_type=Path), help="Plan what an `engine` section says, instead of MODEL.")
@click.option("--backend", "name", help="Which backend's section, where several are of this kind.")
@click.option("--gpus", help="Such as 8xH200, 4xA100-40, 2x8xH100-80; without it this machine's own.")
@click.option("--nnodes", type=click.IntRange(1, 128), help="So many nodes with these GPUs.")
@click.option("--tp", type=click.IntRange(1, 1024), help="Tensor-parallel ranks of one engine; all GPUs without it.")
@click.option("--dp", type=click.IntRange(1, 1024), default=1, help="Groups of ranks with a KV cache each (DP attention).")
@click.option("--ep", type=click.IntRange(1, 1024), default=1, help="Ranks that experts are spread over, whole.")
@click.option("--mtp", is_flag=True, help="With the MTP layer, for speculation.")
@click.option("--quantization", help="How a MODEL that is named is stored: fp8, bf16, int8, w4a8, nvfp4, mxfp4, awq.")
@click.option("--kv-cache-dtype", "kv_type", default="auto", help="auto, bf16, fp8_e4m3.")
@click.option("--context", type=click.IntRange(1, _MOST), help="Prompt and answer of a request together.  [default: 32768]")
@click.option("--concurrency", type=click.IntRange(1, 65536), default=question.CONCURRENCY, help="Requests at once.", show_default=True)
@click.option("--memory-fraction", "fraction", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="As SGLang is given it.")
@click.option("--target", help="Size a fleet: 'ttft 2s, 30 tok/s, 200 users'.")
@click.option("--prompt-tokens", type=click.IntRange(1, _MOST), default=2000, help="Of each request of the target.", show_default=True)
@click.option("--answer-tokens", type=click.IntRange(1, _MOST), default=500, help="The same.", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object, with where each number is from.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write the roofline as SVG.")
@click.pass_obj
def plan(
    env: CommandEnv, model: str | None, path: Path | None, name: str | None, gpus: str | None, nnodes: int | None, tp: int | None, dp: int,
    ep: int, mtp: bool, quantization: str | None, kv_type: str, context: int | None, concurrency: int, fraction: float | None,
    target: str | None, prompt_tokens: int, answer_tokens: int, as_json: bool, plot: Path | None,
) -> None:  # fmt: skip
    """Say whether MODEL (a folder, or V3, V3.1, V3.2, R1, V4-Flash, V4) fits GPUs, why, how many tokens, how fast at best, and what else
    would; from headers and published sizes, without starting anything. Exit code 1 where it does not fit."""
    try:
        if (model is None) == (path is None):
            raise ValueError("either MODEL or -c FILE says what is planned; see penstock plan --help")
        if path is not None:
            asked = _section(env, path, name, gpus, nnodes)
        else:
            of, host = question.model(model or "", quantization), question.machine(gpus, nnodes)
            wanted = question.word(kv_type, question.accepted_kv(), "--kv-cache-dtype")
            assert of.shape is not None
            longest = of.shape.max_position_embeddings
            if context is not None and context > longest:
                raise ValueError(f"--context: {context} is more than {of.name} was made for; accepted: 1 to {longest}")
            spread = question.spread(host, of, tp, dp, ep, drafts=mtp)
            asked = Question(of, host, spread, wanted, context or min(question.CONTEXT, longest), concurrency, fraction)
        said = verdict.judge(asked)
        others = [] if said.word == "fits" else verdict.alternatives(asked)
        sized = None
        if target is not None:
            wish = fleet.parsed(target)
            if said.room.kv_tokens is None or not asked.host.card.tb_s:
                raise ValueError(f"--target: nothing is known here of the speed of {asked.host.card.name}; name GPUs with --gpus")
            if said.word != "does not fit":
                sized = fleet.sized(display.work(asked), said.room.kv_tokens, wish, prompt_tokens, answer_tokens)
        shown = display.plan(asked, said, display.steps(asked), others, sized)
        if plot is not None:
            if not shown.steps:
                raise ValueError(f"--plot: nothing is known here of the speed of {asked.host.card.name}; name GPUs with --gpus")
            plot.write_text(chart.svg(shown), encoding="utf-8")
    except ConfigError as error:
        for line in str(error).splitlines():
            say(f"penstock: {line}", error=True)
        sys.exit(2)
    except OSError as error:
        say(f"penstock: {error.filename}: {error.strerror}", error=True)
        sys.exit(2)
    except (ValueError, checkpoint.Unusable) as error:
        say(f"penstock: {error}", error=True)
        sys.exit(2)
    if as_json:
        say_json(msgspec.json.format(msgspec.json.encode(shown)))
    else:
        for line in display.lines(shown, checkpoint=model is not None and asked.model.scheme is not None and Path(model).exists()):
            say(line)
    sys.exit(1 if said.word == "does not fit" else 0)


def _section(env: CommandEnv, path: Path, name: str | None, gpus: str | None, nnodes: int | None) -> Question:
    """What an `engine` section asks of GPUs that are named, or of this machine's own."""
    config: Config
    where, config = section.chosen(env, path, name)
    engine = config.engine
    if engine.model_path is None:
        raise ConfigError(f"{where}.model_path", "is missing: the tiny checkpoint runs on the CPU, and needs no plan")
    if not Path(engine.model_path).is_dir():
        raise ConfigError(f"{where}.model_path", f"'{engine.model_path}' is not on this machine; accepted: a folder with a config.json")
    count = len(engine.gpus)
    host = question.machine(gpus or None, nnodes)
    if gpus is None:
        host = host._replace(each=count or host.each, nodes=engine.nnodes)
    if engine.gpus and host.total != engine.ranks:
        raise ConfigError(f"{where}.gpus", f"names {engine.nnodes} x {count} GPUs, --gpus {host.spec}; accepted: as many")
    try:
        return question.section(msgspec.structs.replace(engine, tp_size=engine.tp_size or host.total), host)
    except ValueError as error:
        raise ConfigError(where, str(error)) from None
