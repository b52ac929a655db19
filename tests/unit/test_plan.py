"""The arithmetic of a plan, held against published figures, real headers, and itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.sglang_dsv3.engine.plan import fleet, gpus, memory, models, published, question, roofline, verdict, weights
from backends.sglang_dsv3.engine.plan.gpus import CARDS, GIB, Host
from backends.sglang_dsv3.engine.plan.memory import Layout
from backends.sglang_dsv3.engine.plan.question import Question

V3 = published.model("V3")
MAIN, MTP = weights.computed(V3.shape, weights.scheme("fp8"))


def close(value: float) -> object:
    """Within 1 %, or a tenth where the published table has no more digits."""
    return pytest.approx(value, rel=0.01, abs=0.1)


def asked(name: str, spec: str, context: int = 1024, **more: object) -> Question:
    of, host = question.model(name), gpus.parsed(spec)
    return Question(of, host, question.spread(host, of), context=context, **more)  # type: ignore[arg-type]


# Whole GiB, weights a GPU, headroom raw and at the static fraction, thousands of KV tokens in BF16, TB/s, tokens/s at batch 1, verdict.
# From the contracts of July 2026, 2.10: FP8 V3, computed there independently.
ROWS = """
4xA100-40 158 157.6 -118.0 -121.1 0 6.2 165 NO
4xA100-80 317 157.6 -78.3 -84.6 0 8.2 216 NO
4xH100-80 318 157.6 -78.0 -84.3 0 13.4 355 NO
4xH20 382 157.6 -62.0 -69.6 0 16.0 424 NO
4xH200 562 157.6 -17.2 -28.4 0 19.2 509 NO
4xB200 716 157.6 21.5 7.2 110 32.0 849 tight
4xMI300X 768 157.6 34.4 19.1 291 21.2 562 tight
4xMI325X 1024 157.6 98.4 72.8 1113 24.0 637 yes
4xB300 1074 157.6 111.0 84.2 1286 32.0 849 yes
4xMI355X 1152 157.6 130.4 101.6 1553 32.0 849 yes
8xA100-40 317 79.3 -39.7 -42.9 0 12.4 330 NO
8xA100-80 634 79.3 -0.0 -6.4 0 16.3 433 NO
8xH100-80 637 79.3 0.3 -6.1 0 26.8 711 NO
8xH20 765 79.3 16.3 8.6 132 32.0 849 tight
8xH200 1123 79.3 61.1 49.9 762 38.4 1019 yes
8xB200 1433 79.3 99.8 85.5 1306 64.0 1698 yes
8xMI300X 1536 79.3 112.7 97.3 1487 42.4 1125 yes
8xMI325X 2048 79.3 176.7 151.1 2309 48.0 1273 yes
8xB300 2149 79.3 189.3 162.4 2482 64.0 1698 yes
8xMI355X 2304 79.3 208.7 179.9 2749 64.0 1698 yes
""".strip().splitlines()
WORDS = {"NO": "does not fit", "tight": "tight", "yes": "fits"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split()[0])
def test_every_host_of_the_published_table(row: str) -> None:
    spec, *numbers, word = row.split()
    whole, share, raw, static, tokens, bandwidth, roof = map(float, numbers)
    question_ = asked("V3", spec)
    said = verdict.judge(question_)
    room = said.room
    assert room.gpu_gib * question_.host.total == close(whole)
    assert room.weights_gib == close(share)
    assert room.free_gib == close(raw)
    assert room.headroom_gib == close(static)
    assert (room.kv_tokens or 0) / 1000 == close(tokens)
    fp8 = verdict.judge(msgspec.structs.replace(question_, kv_type="fp8_e4m3")).room
    assert (fp8.kv_tokens or 0) / 1000 == close(2 * tokens)
    work = roofline.Work(V3.shape, MAIN, question_.layout, question_.host.card, "auto")
    assert question_.host.card.tb_s * question_.host.total == close(bandwidth)
    assert roofline.step(work, 1, 1024).roof_tokens_per_s == close(roof)
    assert said.word == WORDS[word]


# Batch, distinct experts, GB a step, ms at 19.2, 32 and 38.4 TB/s, tokens/s at 32 TB/s: the same source.
STEPS = """
1 8.0 37.7 1.96 1.18 0.98 850
2 15.8 57.5 2.99 1.80 1.50 1114
4 30.5 95.2 4.96 2.98 2.48 1344
8 57.4 163.9 8.54 5.12 4.27 1562
16 102.0 277.7 14.46 8.68 7.23 1844
32 163.3 434.4 22.62 13.57 11.31 2357
64 222.4 585.4 30.49 18.29 15.25 3498
128 251.6 659.9 34.37 20.62 17.18 6207
256 255.9 670.9 34.94 20.97 17.47 12210
512 256.0 671.1 34.95 20.97 17.48 24412
""".strip().splitlines()


@pytest.mark.parametrize("row", STEPS, ids=lambda row: row.split()[0])
def test_every_batch_of_the_published_table(row: str) -> None:
    batch, experts, read, *times, tokens = map(float, row.split())
    for spec, ms in zip(("4xH200", "4xB300", "8xH200"), times, strict=True):
        host = gpus.parsed(spec)
        step = roofline.step(roofline.Work(V3.shape, MAIN, Layout(host.total), host.card, "auto"), int(batch), 1024)
        assert (step.experts, step.read_gb) == (close(experts), close(read))
        assert step.roof_ms == pytest.approx(ms, rel=0.01)
        if spec == "4xB300":
            assert step.roof_tokens_per_s == pytest.approx(tokens, rel=0.01)
        assert step.tokens_per_s <= step.roof_tokens_per_s, "what a rank reads of its own, and the cache, make it no faster"


def test_the_facts_of_the_official_checkpoint() -> None:
    """The contracts of July 2026, 2.10; the size on disk is the index's own, which has copies of embedding and head in the MTP layer."""
    gb = 1e9
    assert MAIN.total / gb == pytest.approx(673.15, rel=0.0001)
    assert MAIN.total / GIB == pytest.approx(626.92, rel=0.0001)
    assert MTP.total / gb == pytest.approx(11.72, rel=0.001)
    assert MAIN.total + MTP.total + MAIN.embedding + MAIN.head == pytest.approx(688_586_727_753, rel=0.0001)
    assert MAIN.routed / gb == pytest.approx(653.9, rel=0.001)
    assert weights.active(V3.shape) / gb == pytest.approx(36.62, rel=0.001)
    for name, size in (("bf16", 1342), ("nvfp4", 387), ("w4a8", 366)):
        assert weights.computed(V3.shape, weights.scheme(name))[0].total / gb == pytest.approx(size, rel=0.01)
    layout = Layout(4)
    assert memory.absorbed(V3.shape, layout) / GIB == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    ("name", "kv_type", "drafts", "size"),
    [
        ("V3", "auto", False, 70_272), ("V3", "fp8_e4m3", False, 35_136), ("V3", "bf16", True, 70_272 + 1152),
        ("V3.2", "auto", False, 78_324), ("V3.2", "fp8_e4m3", False, 61 * (656 + 132)),
        ("V4-Flash", "auto", False, 21 * (584 + 132) / 4 + 20 * 584 / 128), ("V4", "auto", False, 30 * (584 + 132) / 4 + 31 * 584 / 128),
    ],
)  # fmt: skip
def test_the_cache_of_a_token(name: str, kv_type: str, drafts: bool, size: float) -> None:
    """V3: 2.10; V3.2 and V4: the slots of SGLang's pools (mem_cache/memory_pool.py, deepseek_v4_memory_pool.py)."""
    assert memory.cache(published.model(name).shape, kv_type, drafts).token == pytest.approx(size)


def test_v4s_cache_is_what_its_makers_publish() -> None:
    """9.62 GiB for a request of 1,048,576 tokens in BF16, its indexer's keys too (news.triggerhive.com, 2026-04-25, on the V4 report)."""
    shape = published.model("V4").shape
    latent, key = 2 * shape.head_dim, 2 * shape.index_head_dim
    whole = sum((latent + (key if ratio == 4 else 0)) / ratio for ratio in shape.ratios if ratio) * 1048576
    assert whole / GIB == pytest.approx(9.62, rel=0.001)
    assert memory.cache(shape, "bf16").token * 1048576 < whole


# In billions, all and of a token, as DeepSeek says them.
PARAMETERS = {"V3": (671, 37), "R1": (671, 37), "V3.1": (671, 37), "V3.2": (671, 37), "V4-Flash": (284, 13), "V4": (1600, 49)}


@pytest.mark.parametrize("known", published.MODELS, ids=lambda known: known.name)
def test_every_model_has_as_many_parameters_as_its_makers_say(known: published.Known) -> None:
    # In BF16 each takes two bytes, but for a few in float32.
    every, active = PARAMETERS[known.name]
    assert weights.computed(known.shape, weights.scheme("bf16"))[0].total / 2e9 == pytest.approx(every, rel=0.02)
    assert weights.active(known.shape) / 1e9 == pytest.approx(active, rel=0.05)


def official() -> Iterator[tuple[str, int]]:
    """Every tensor of DeepSeek-V3 on the hub, by its name there, with its bytes: the MTP layer is the 62nd."""
    hidden, wide = 7168, 128

    def matrix(name: str, rows: int, columns: int) -> Iterator[tuple[str, int]]:
        yield f"{name}.weight", rows * columns
        yield f"{name}.weight_scale_inv", 4 * -(-rows // 128) * -(-columns // 128)

    def mlp(name: str, inner: int) -> Iterator[tuple[str, int]]:
        for part in ("gate_proj", "up_proj"):
            yield from matrix(f"{name}.{part}", inner, hidden)
        yield from matrix(f"{name}.down_proj", hidden, inner)

    yield "model.embed_tokens.weight", 2 * 129280 * hidden
    yield "lm_head.weight", 2 * 129280 * hidden
    yield "model.norm.weight", 2 * hidden
    for number in range(62):
        layer = f"model.layers.{number}"
        for name, rows, columns in (
            ("q_a_proj", 1536, hidden), ("q_b_proj", wide * 192, 1536), ("kv_a_proj_with_mqa", 576, hidden), ("kv_b_proj", wide * 256, 512),
            ("o_proj", hidden, wide * 128),
        ):  # fmt: skip
            yield from matrix(f"{layer}.self_attn.{name}", rows, columns)
        for name, size in (("self_attn.q_a_layernorm", 1536), ("self_attn.kv_a_layernorm", 512), ("input_layernorm", hidden)):
            yield f"{layer}.{name}.weight", 2 * size
        yield f"{layer}.post_attention_layernorm.weight", 2 * hidden
        if number < 3:
            yield from mlp(f"{layer}.mlp", 18432)
            continue
        yield f"{layer}.mlp.gate.weight", 2 * 256 * hidden
        yield f"{layer}.mlp.gate.e_score_correction_bias", 4 * 256
        yield from mlp(f"{layer}.mlp.shared_experts", 2048)
        for expert in range(256):
            yield from mlp(f"{layer}.mlp.experts.{expert}", 2048)
    for name, size in (("embed_tokens", 129280 * hidden), ("shared_head.head", 129280 * hidden), ("eh_proj", 2 * hidden * hidden)):
        yield f"model.layers.61.{name}.weight", 2 * size
    for name in ("enorm", "hnorm", "shared_head.norm"):
        yield f"model.layers.61.{name}.weight", 2 * hidden


def test_the_official_checkpoints_tensors_fall_into_the_same_pieces() -> None:
    tensors = dict(official())
    assert sum(tensors.values()) == pytest.approx(688_586_727_753, rel=0.0001), "what its index says"
    for found, made in zip(weights.counted(tensors, 61), (MAIN, MTP), strict=True):
        for name in weights.Pieces.__struct_fields__:
            assert getattr(found, name) == pytest.approx(getattr(made, name), rel=0.001), name


def test_v4_flash_takes_what_is_published() -> None:
    """160 GB, with its MTP layer (localainews.co, DeepSeek-V4-Flash)."""
    main, mtp = weights.computed(published.model("V4-Flash").shape, weights.scheme("mxfp4"))
    assert (main.total + mtp.total) / 1e9 == pytest.approx(160, rel=0.01)


@pytest.mark.parametrize("deployment", published.DEPLOYMENTS, ids=lambda each: each.gpus)
def test_published_throughput_lies_under_the_roofline_and_not_far(deployment: published.Deployment) -> None:
    """docs/capacity.md says what each reaches; `penstock plan --target` reckons with the least and the most of them."""
    host = gpus.parsed(deployment.gpus)
    layout = Layout(host.total, deployment.dp, deployment.ep, host.nodes, travel=True)
    work = roofline.Work(V3.shape, MAIN, layout, host.card, deployment.kv_cache_dtype)
    bound = roofline.step(work, deployment.batch * host.total, deployment.context).tokens_per_s / host.total
    least, most = (share for share, _ in fleet.REACHED)
    assert least <= deployment.tokens_per_s / bound <= most < 1
    held = verdict.room(Question(question.model("V3"), host, layout, deployment.kv_cache_dtype, deployment.context))
    assert (held.kv_tokens or 0) >= deployment.batch * host.total * deployment.context, "a plan that says it cannot be would be wrong"


def test_a_folder_without_weights_is_computed_and_its_index_must_agree(tmp_path: Path) -> None:
    config = {"architectures": ["DeepseekV3ForCausalLM"], "quantization_config": {"quant_method": "fp8"}, **msgspec.to_builtins(V3.shape)}
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    index = {"metadata": {"total_size": 688_586_727_753}, "weight_map": {"a": "model-00001-of-000163.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert question.folder(tmp_path).main == MAIN
    index["metadata"] = {"total_size": 1_342_000_000_000}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        models.Unreadable, match=r"index.json: metadata.total_size: is 1,342,000,000,000 bytes; the sizes in config.json make"
    ):
        question.folder(tmp_path)


def test_groups_with_a_cache_each_hold_more_tokens_and_more_weights() -> None:
    host, of = gpus.parsed("8xH200"), question.model("V3")
    one = verdict.room(Question(of, host, question.spread(host, of)))
    eight = verdict.room(Question(of, host, question.spread(host, of, dp=8)))
    assert eight.weights_gib > one.weights_gib
    assert (eight.kv_tokens or 0) > 6 * (one.kv_tokens or 0)


def test_sglangs_own_fraction_is_by_its_own_rule() -> None:
    """4 x B200: about 0.86 by the contracts (2.10); H200 in SGLang's logs about 0.9."""
    assert verdict.judge(asked("V3", "4xB200")).room.own_fraction == pytest.approx(0.85, abs=0.02)
    assert verdict.judge(asked("V3", "8xH200")).room.own_fraction == pytest.approx(0.89, abs=0.02)


CONTEXTS = st.integers(10, 17).map(lambda power: 1 << power)


@settings(deadline=None)
@given(st.sampled_from(published.MODELS), st.sampled_from(CARDS), st.sampled_from([1, 2, 4, 8, 16]), st.floats(1, 400), CONTEXTS)
def test_more_memory_never_turns_a_fit_into_a_misfit(
    known: published.Known, card: gpus.Card, count: int, more: float, context: int
) -> None:
    of = question.named(known)
    host, larger = Host(1, count, card), Host(1, count, card._replace(gib=card.gib + more))
    layout = Layout(count)
    small, large = (verdict.judge(Question(of, one, layout, context=context)) for one in (host, larger))
    assert (small.word == "does not fit") or (large.word != "does not fit")
    assert (small.room.kv_tokens or 0) <= (large.room.kv_tokens or 0)


@settings(deadline=None)
@given(
    st.sampled_from(published.MODELS),
    st.sampled_from(CARDS),
    st.sampled_from([2, 4, 8, 16]),
    CONTEXTS,
    CONTEXTS,
    st.sampled_from(["auto", "fp8_e4m3"]),
)
def test_a_longer_context_never_frees_memory(
    known: published.Known, card: gpus.Card, count: int, one: int, other: int, kv_type: str
) -> None:
    of, host = question.named(known), Host(1, count, card)
    short, long = (verdict.judge(Question(of, host, Layout(count), kv_type, length)) for length in sorted((one, other)))
    assert short.room.smallest_fraction <= long.room.smallest_fraction
    assert (short.room.requests or 0) >= (long.room.requests or 0)
    assert (short.word != "does not fit") or (long.word == "does not fit")
    steps = [
        roofline.step(roofline.Work(known.shape, of.main, Layout(count), card, kv_type), 32, length).ms for length in sorted((one, other))
    ]
    assert steps[0] <= steps[1]


@settings(deadline=None)
@given(st.sampled_from([each.name for each in published.MODELS]), st.sampled_from(CARDS), st.sampled_from([4, 8]), CONTEXTS)
def test_what_is_named_instead_does_fit(name: str, card: gpus.Card, count: int, context: int) -> None:
    of = question.model(name)
    host = Host(1, count, card)
    asked_ = Question(of, host, question.spread(host, of), context=context)
    before = verdict.judge(asked_)
    for each in verdict.alternatives(asked_) if before.word != "fits" else []:
        again = _ask(asked_, each.ask)
        assert verdict.judge(again).word == each.verdict != "does not fit"


def _ask(asked_: Question, words: str) -> Question:
    """What an alternative says, asked anew as an operator would."""
    name, _, rest = words.partition(" ") if not words.startswith("--") else (asked_.model.name, "", words)
    option, value = rest.split() if rest else ("", "")
    host = gpus.parsed(value) if option == "--gpus" else asked_.host
    of = question.model(name, value if option == "--quantization" else None)
    kv_type = value if option == "--kv-cache-dtype" else asked_.kv_type
    context = int(value) if option == "--context" else asked_.context
    return Question(of, host, question.spread(host, of), kv_type, context)


TARGET = fleet.parsed("ttft 2s, 30 tok/s, 200 users")


@settings(deadline=None)
@given(st.integers(1, 5000), st.floats(1, 200), st.floats(0.1, 20))
def test_a_fleet_meets_what_it_was_sized_for(users: int, speed: float, ttft: float) -> None:
    target = fleet.Target(ttft, speed, users)
    asked_ = asked("V3", "8xH200")
    work = roofline.Work(V3.shape, MAIN, asked_.layout, asked_.host.card, "auto")
    tokens = verdict.room(asked_).kv_tokens or 0
    for found in fleet.sized(work, tokens, target, 2000, 500):
        if found.engines:
            assert found.engines * found.users_per_engine >= users > (found.engines - 1) * found.users_per_engine
            assert found.users_per_engine * 2500 <= tokens
            assert found.expected_tokens_per_s >= speed
            assert found.expected_ttft_s <= ttft
