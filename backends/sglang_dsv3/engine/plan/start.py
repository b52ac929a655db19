"""A start held against the plan: what cannot fit is refused, unless an operator insists."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from backends.sglang_dsv3.config import Engine
from backends.sglang_dsv3.engine import TINY_MODEL, checkpoint, launch
from backends.sglang_dsv3.engine.known import Known
from backends.sglang_dsv3.engine.plan import gpus, memory, models, question, verdict, weights
from backends.sglang_dsv3.engine.plan.gpus import CARDS, GIB, Host
from backends.sglang_dsv3.engine.plan.memory import Layout
from gateway.errors import ConfigError


class Expected(msgspec.Struct, frozen=True):
    """What the plan expects of each rank, in GiB, and of the engine, in tokens; None where that is not known."""

    verdict: str
    weights_gib: float
    kv_gib: float | None
    kv_tokens: int | None


def host(config: Engine) -> Host | None:
    """This machine's GPUs that the section names, on as many nodes as it says; None where there are none that could be asked."""
    found = gpus.detected(config.gpus, config.nnodes) if config.gpus else None
    return found._replace(each=len(config.gpus)) if found is not None else None


def verify(config: Engine, path: str, known: Known | None = None, force: bool = False) -> list[str]:
    """What an operator should know before a section is started on this machine's GPUs, one line each. Raises ConfigError where it cannot
    fit; with `force` that is one of the lines."""
    folder = Path(config.model_path or "")
    machine = host(config) if config.model_path is not None and (folder / "config.json").is_file() else None
    if machine is None:
        return []
    try:
        asked = question.section(config, machine)
    except checkpoint.Unusable as problem:
        raise ConfigError(f"{path}.model_path", str(problem)) from None
    except ValueError as error:
        raise ConfigError(f"{path}.gpus", str(error)) from None
    said = verdict.judge(asked)
    old = too_old(folder, known.capabilities, machine, config.quantization) if known is not None else None
    if said.word != "does not fit" and old is None:
        return [f"{path}: it is tight: {reason}" for reason in said.why] if said.word == "tight" else []
    reason = "; ".join([*said.why, *([old] if old is not None else [])] if said.word == "does not fit" else [old or ""])
    would = ", ".join(f"{each.ask} ({each.verdict})" for each in verdict.alternatives(asked)) if said.word == "does not fit" else ""
    text = f"{reason}{f'; these would: {would}' if would else ''}"
    if force:
        return [f"{path}.gpus: {text}; it is tried all the same (--force)"]
    raise ConfigError(f"{path}.gpus", f"{text} (--force tries all the same)")


def too_old(folder: Path, capabilities: Mapping[str, int], machine: Host, chosen: str | None) -> str | None:
    """Why a GPU cannot compute with a checkpoint's quantisation, by what the installed SGLang says of it; None where nothing says so."""
    found = models.checkpoint(folder)
    stored = found.quantization_config.quant_method if found.quantization_config is not None else None
    method, card = chosen or stored, machine.card
    least = capabilities.get(method or "")
    if card.capability is None or least is None or card.capability >= least:
        return None
    able = ", ".join(dict.fromkeys(one.name for one in CARDS if one.capability is not None and one.capability >= least))
    return f"{method} needs compute capability {least / 10:.1f}, {card.name} has {card.capability / 10:.1f}; these have it: {able}"


def expected(config: Engine, home: Path) -> Expected | None:
    """What the plan expects of a section on this machine; None where its weights cannot be read. On a CPU, weights are held as what it
    computes in, and the cache has as many tokens as it is told."""
    folder = Path(config.model_path) if config.model_path is not None else home / "checkpoints" / TINY_MODEL
    machine = host(config)
    try:
        if machine is not None:
            asked = question.section(config, machine)
            said = verdict.judge(asked)
            room, groups = said.room, asked.layout.dp
            limit = asked.fraction or room.own_fraction
            kv = max(0.0, limit * room.gpu_gib - room.weights_gib)
            tokens = room.kv_tokens if asked.fraction is not None else room.own_kv_tokens
            if config.max_total_tokens is not None and tokens is not None and room.kv_bytes_per_token is not None:
                tokens = min(tokens, config.max_total_tokens * groups)
                kv = min(kv, tokens / groups * room.kv_bytes_per_token / GIB)
            return Expected(said.word, round(room.weights_gib, 3), round(kv, 3), tokens)
        if config.gpus:
            return None
        of = question.folder(folder)
    except (ValueError, checkpoint.Unusable):
        return None
    return _on_cpu(config, of)


def _on_cpu(config: Engine, of: question.Model) -> Expected | None:
    if of.shape is None:
        return None
    wide = 4.0 if config.dtype == "float32" else 2.0
    main, mtp = weights.computed(of.shape, weights.scheme("bf16"))
    share = memory.weights(main, mtp, Layout(config.ranks)) * wide / 2
    tokens = config.max_total_tokens or launch.CPU_TOTAL
    cache = memory.cache(of.shape, "bf16").token * wide / 2
    return Expected("fits", round(share / GIB, 3), round(tokens * cache / GIB, 3), tokens)
