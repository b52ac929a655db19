"""What is asked of a plan: a model by its name, its folder or an `engine` section, the GPUs, and how the one is spread over the other."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from backends.sglang_dsv3.config import Engine
from backends.sglang_dsv3.engine import checkpoint
from backends.sglang_dsv3.engine.plan import gpus, models, published, weights
from backends.sglang_dsv3.engine.plan.gpus import Host
from backends.sglang_dsv3.engine.plan.memory import KV_TYPES, Layout
from backends.sglang_dsv3.engine.plan.models import Shape
from backends.sglang_dsv3.engine.plan.weights import Pieces, Scheme

CONTEXT, CONCURRENCY = 32768, 64
# What is asked of a start whose section says no length: less would serve nobody.
_LEAST_CONTEXT = 4096
# The index of the official checkpoint counts 0.003 % more than its tensors have; one that is further off is another model's.
_TOLERATED = 0.01


class Model(msgspec.Struct, frozen=True):
    """A model and its bytes. `shape` is None for a family of which nothing is known here but its bytes; `basis`: where those are from."""

    name: str
    family: str
    stored: str
    scheme: Scheme | None
    shape: Shape | None
    main: Pieces
    mtp: Pieces
    basis: str
    notes: list[str] = []


class Question(msgspec.Struct, frozen=True):
    """`fraction`, `chunk` and `offload_gib` as an `engine` section has them; lengths in tokens."""

    model: Model
    host: Host
    layout: Layout
    kv_type: str = "auto"
    context: int = CONTEXT
    concurrency: int = CONCURRENCY
    fraction: float | None = None
    chunk: int | None = None
    offload_gib: int = 0


def word(given: str, accepted: Sequence[str], what: str) -> str:
    """The word as it is, or a ValueError that names those that are accepted and the nearest."""
    if given in accepted:
        return given
    near = difflib.get_close_matches(given.lower(), accepted, 1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise ValueError(f"{what}: '{given}' is not known; accepted: {', '.join(accepted)}{hint}")


def model(text: str, scheme: str | None = None) -> Model:
    """A folder with a config.json, or a model that is known by name, stored by `scheme` where that is given. Raises ValueError."""
    if (Path(text) / "config.json").exists() or "/" in text.removeprefix("deepseek-ai/"):
        if scheme is not None:
            raise ValueError(f"--quantization: '{scheme}' does not go with a folder, whose files say it; accepted: with a model's name")
        return folder(Path(text))
    return named(published.model(text), scheme)


def named(known: published.Known, scheme: str | None = None) -> Model:
    """A model whose weights are not at hand."""
    names = [each.name for each in weights.SCHEMES]
    how = weights.scheme(word(scheme, names, "--quantization") if scheme is not None else known.scheme)
    main, mtp = weights.computed(known.shape, how)
    return Model(known.name, known.family, how.title, how, known.shape, main, mtp, f"computed from its sizes, {known.source}")


def folder(path: Path) -> Model:
    """What lies in a folder: its tensors' headers, or, where there is no weight file, its config.json and the index beside it."""
    found, shape = models.read(path)
    how = weights.scheme(found.scheme) if found.scheme is not None else None
    index = checkpoint.index(path)
    if index is None or any((path / file).is_file() for file in index.weight_map.values()):
        if index is None and not (path / "model.safetensors").is_file():
            return _unweighed(path, found, shape, how, None)
        main, mtp = weights.counted(checkpoint.sizes(path), shape.num_hidden_layers)
        return Model(path.name, found.family, found.quantization, how, shape, main, mtp, "computed from its tensors' headers")
    return _unweighed(path, found, shape, how, index.metadata.total_size)


def _unweighed(path: Path, found: models.Checkpoint, shape: Shape, how: Scheme | None, total: int | None) -> Model:
    if how is None:
        stored = found.quantization_config.quant_method if found.quantization_config is not None else None
        raise models.Unreadable(
            f"{path / 'config.json'}: quantization_config.quant_method: '{stored}' is not known; accepted: {', '.join(models.SCHEMES)}, "
            "or weights beside it"
        )
    main, mtp = weights.computed(shape, how)
    notes = ["no weight file lies there: bytes are computed from its config.json"]
    # The copies of embedding and head that the MTP layer has on disk.
    whole = main.total + mtp.total + (main.embedding + main.head if mtp.total else 0)
    if total is not None and not any(abs(total / size - 1) < _TOLERATED for size in (whole, main.total, main.total + mtp.total)):
        raise models.Unreadable(
            f"{path / checkpoint.INDEX}: metadata.total_size: is {total:,} bytes; the sizes in config.json make {whole:,.0f}, so one of "
            "them is another model's"
        )
    return Model(path.name, found.family, found.quantization, how, shape, main, mtp, "computed from its config.json", notes)


def layout(host: Host, shape: Shape | None, scheme: Scheme | None, given: Layout) -> Layout:
    """How a model is spread, where it can be; raises ValueError with what is accepted."""
    tp, dp, ep = given.tp, given.dp, given.ep
    for name, value in (("dp", dp), ("ep", ep)):
        if tp % value:
            divisors = ", ".join(str(each) for each in range(1, tp + 1) if tp % each == 0)
            raise ValueError(f"--{name}: {value} does not divide the {tp} ranks; accepted: {divisors}")
    if tp > host.total or host.total % tp:
        divisors = ", ".join(str(each) for each in range(1, host.total + 1) if host.total % each == 0)
        raise ValueError(f"--tp: {tp} ranks are no part of {host.spec}; accepted: {divisors}")
    if shape is None:
        return given
    if shape.num_attention_heads % given.group:
        raise ValueError(
            f"--tp: {shape.num_attention_heads} attention heads cannot be shared by {given.group} ranks; more --dp makes them fewer"
        )
    block = shape.moe_intermediate_size // (tp // ep)
    if scheme is not None and scheme.other < 2 and (block % 128 or shape.moe_intermediate_size % (tp // ep)):
        raise ValueError(
            f"--tp: an expert's {shape.moe_intermediate_size} columns over {tp // ep} ranks are no whole blocks of 128; add --ep {tp}"
        )
    return given


def spread(
    host: Host, of: Model, tp: int | None = None, dp: int = 1, ep: int = 1, travel: bool | None = None, drafts: bool = False
) -> Layout:
    """One engine over all GPUs, or over `tp` of them. Tokens travel to experts that are whole on their ranks, unless `travel` says."""
    ranks = tp or host.total
    nodes = max(1, -(-ranks // host.each))
    given = Layout(ranks, dp, ep, nodes, ep > 1 if travel is None else travel, drafts)
    return layout(host, of.shape, of.scheme, given)


def section(config: Engine, host: Host) -> Question:
    """What an `engine` section asks of GPUs such as these. Raises ValueError."""
    of = served(Path(config.model_path or ""))
    travel = config.moe_a2a_backend not in (None, "none")
    drafts = config.speculative_algorithm is not None and of.mtp.total > 0
    given = spread(host, of, config.ranks, config.attn_dp_size or 1, config.ep_size or 1, travel, drafts)
    longest = of.shape.max_position_embeddings if of.shape is not None else _LEAST_CONTEXT
    kv_type = config.kv_cache_dtype if config.kv_cache_dtype in KV_TYPES else "auto"
    return Question(
        of, host, given, kv_type or "auto", config.context_length or min(_LEAST_CONTEXT, longest), config.max_running_requests,
        config.memory_fraction, config.chunked_prefill_size, config.cpu_offload_gb or 0,
    )  # fmt: skip


def served(path: Path) -> Model:
    """The same of a folder that is to be served: of a family that is not planned for its bytes alone. Raises checkpoint.Unusable."""
    try:
        return folder(path)
    except models.Unreadable:
        total = float(sum(checkpoint.sizes(path).values()))
        return Model(path.name, "unknown", "as it is", None, None, Pieces(dense=total), Pieces(), "computed from its tensors' headers")


def accepted_kv() -> list[str]:
    """What `--kv-cache-dtype` takes."""
    return list(KV_TYPES)


def machine(spec: str | None, nodes: int | None) -> Host:
    """The GPUs that are named, or this machine's own. Raises ValueError."""
    if spec is None:
        found = gpus.detected(nodes=nodes or 1)
        if found is None:
            raise ValueError(f"--gpus: this machine has no GPU that could be asked; name some; accepted: {gpus.accepted()}")
        return found
    host = gpus.parsed(spec)
    if nodes is None or nodes == host.nodes:
        return host
    if host.nodes > 1:
        raise ValueError(f"--nnodes: {nodes} is not what --gpus {spec} says; accepted: {host.nodes}, or leave it out")
    return host._replace(nodes=nodes)
