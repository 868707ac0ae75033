"""Masks and scores in plans: names, records, what they rule out, what they cost, which tunings they take."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import sympy

from flashgen.arch import ARCHS
from flashgen.build import build
from flashgen.errors import PlanError
from flashgen.plan import KernelPlan, Sm90Schedule, Workload, plan_from_dict, rank, solve, validate
from flashgen.plan.constraints import violations
from flashgen.plan.cost import Cost, cost
from flashgen.plan.operations import of_condition, of_score
from flashgen.plan.tiling import Tiling
from flashgen.plan.tuned import Tuned, Tunings, find, key_of, variant
from flashgen.spec import AttentionSpec
from flashgen.spec.gallery import GALLERY
from flashgen.spec.symbols import SCORE

H200, A100 = ARCHS["sm_90a"], ARCHS["sm_80"]


def make_spec(
    mask: str = "causal",
    score: str = "score",
    *,
    seqlen: Any = 4096,
    kv_heads: int = 4,
    tiles: dict[str, Any] | None = None,
    **declared: Any,
) -> AttentionSpec:
    return AttentionSpec(
        name="masked",
        attention={
            "heads": {"q": 16, "kv": kv_heads}, "head_dim": 128, "mask": mask, "score": score, **declared
        },
        workload={"batch": 4, "seqlen": seqlen},
        tiles=tiles or "auto",
    )  # fmt: skip


# -- what is in the plan -----------------------------------------------------------------------------------


def test_names_tell_mask_score_and_sink() -> None:
    def name(*formulas: str, **declared: Any) -> str:
        return solve(make_spec(*formulas, kv_heads=16, **declared), H200).kernel

    assert name() == "attn_fwd_causal_bf16_d128_sm90a"
    assert name("causal", "softcap(50)") == "attn_fwd_causal_softcap50_bf16_d128_sm90a"
    assert name("window(64)", sink=True) == "attn_fwd_window64_sink_bf16_d128_sm90a"
    assert name("full", "alibi", sink=True) == "attn_fwd_full_alibi_sink_bf16_d128_sm90a"
    names = {name("kv * kv <= q"), name("kv * kv <= q + 1"), name("causal", "2 * score"), name()}
    assert len(names) == 4


def test_a_plan_holds_what_a_launch_needs() -> None:
    spec = make_spec("document and q - kv < size", "alibi", params={"size": "runtime"}, sink=True)
    plan = solve(spec, H200)
    assert [tensor.name for tensor in plan.tensors] == ["doc", "slope"]
    assert [(p.name, p.kind, p.least) for p in plan.parameters] == [("size", "int", 1)]
    assert plan.sink and plan.preparation == "ranges"
    assert solve(make_spec("kv % 2 == 0"), H200).preparation == "map"
    assert solve(make_spec("padding"), H200).preparation is None


DECLARED: dict[str, Any] = {
    "params": {"chunk": "runtime", "cap": {"runtime": "float"}},
    "tensors": {
        "keep": {"index": ["head_kv", "q", "kv"], "dtype": "bool"},
        "table": {"index": ["head", 7], "dtype": "fp32", "grad": True},
        "seg": {"index": ["batch", "kv"], "dtype": "int32", "sorted": True},
    },
}
WRITTEN = [
    *((e.sample, "score") if e.kind == "mask" else ("causal", e.sample) for e in GALLERY.values()),
    ("keep[q, kv] and kv // chunk == q // chunk", "cap * tanh(score / cap)"),
    ("causal and seg[q] <= seg[kv] + 1", "score + table[head, (q - kv) % 7]"),
    ("where(head < 2, causal, band(9)) or kv < 4", "where(kv < chunk, score, min(score, 0.1))"),
    ("seg[kv] == 3 and q < 2000", "score * sigmoid(cap) + log(1 + abs(q - kv))"),
    ("kv % 3 != q % 3", "score / sqrt(q - kv + chunk)"),
]


@pytest.mark.parametrize(("mask", "score"), WRITTEN)
def test_every_mask_and_score_survives_as_text(mask: str, score: str) -> None:
    for arch in (A100, H200):
        plan = solve(make_spec(mask, score, **DECLARED), arch)
        again = plan_from_dict(json.loads(json.dumps(plan.to_dict())))
        assert again == plan and hash(again) == hash(plan)
        assert again.mask.derivation == plan.mask.derivation
        validate(again, arch)


@pytest.mark.parametrize(
    ("of", "change", "message"),
    [
        ("mask", {"condition": "kv <= depth"}, "unknown name"),
        ("mask", {"segments": [{"first": None, "last": "doc[q]"}]}, "unknown tensor"),
        ("mask", {"route": "guess"}, "not a plan"),
        ("score", {"expr": "kv <= q"}, "expected a number"),
    ],
)
def test_damaged_mathematics_are_refused(of: str, change: dict[str, Any], message: str) -> None:
    data = solve(make_spec(), H200).to_dict()
    with pytest.raises(PlanError, match=message):
        plan_from_dict(data | {of: data[of] | change})


# -- what masks and scores rule out ------------------------------------------------------------------------

ONE_INTERVAL = "needs a mask with one interval of keys for each row, in closed form"


@pytest.mark.parametrize(
    ("schedule", "mask", "score", "message"),
    [
        ({"pack_gqa": True}, "sink_window(4, 99)", "score", ONE_INTERVAL),
        ({"pack_gqa": True}, "document", "score", ONE_INTERVAL),
        ({"pack_gqa": True}, "kv % 2 == 0", "score", ONE_INTERVAL),
        ({"cluster": 2}, "dilated(9, 2)", "score", ONE_INTERVAL),
        ({"pack_gqa": True}, "causal", "alibi", "that are the same for all heads"),
        ({"pack_gqa": True}, "head < 2 or causal", "score", "that are the same for all heads"),
        ({"pack_gqa": True}, "causal", "sink", "and no sink"),
    ],
)
def test_packed_heads_and_clusters_are_refused_with_the_reason(
    schedule: dict[str, Any], mask: str, score: str, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        solve(make_spec(mask, score, tiles={"schedule": schedule}), H200)


@pytest.mark.parametrize("mask", ["causal", "window(64)", "padding", "kv < size", "head_kv < 2 or causal"])
def test_packed_heads_and_clusters_take_intervals_in_closed_form(mask: str) -> None:
    declared = {"params": {"size": "runtime"}}
    for schedule in ({"pack_gqa": True}, {"cluster": 2}):
        plan = solve(make_spec(mask, tiles={"schedule": schedule}, **declared), H200)
        assert all(getattr(plan.schedule, name) == value for name, value in schedule.items())


@pytest.mark.parametrize(
    ("mask", "score", "packs"),
    [
        ("causal", "score", True),
        ("causal", "softcap(9)", True),
        ("causal", "alibi", False),
        ("document", "score", False),
    ],
)
def test_decoding_packs_heads_where_it_can(mask: str, score: str, packs: bool) -> None:
    schedule = solve(make_spec(mask, score, seqlen={"q": 1, "kv": 8192}), H200).schedule
    assert isinstance(schedule, Sm90Schedule) and schedule.pack_gqa == packs


def test_a_score_takes_registers() -> None:
    tiling = Tiling("sm80", 128, 64, 1, 4, solve(make_spec(), A100).schedule)
    plain, biased = (Workload.of(make_spec("causal", score)).head for score in ("score", "dense_bias"))
    assert biased.element_registers > plain.element_registers == 0
    assert violations(tiling, plain, A100) == ()
    assert [use.constraint.name for use in violations(tiling, biased, A100)] == ["registers"]


# -- what they cost ----------------------------------------------------------------------------------------


def score_of(text: str) -> sympy.Expr:
    return make_spec("causal", text).attention.score_expr


def test_operations_of_scores() -> None:
    assert of_score(SCORE).plain == of_score(SCORE).mufu == 0
    assert of_score(score_of("softcap(30)")).mufu == 1
    assert of_score(score_of("alibi")).mufu == 0
    plain = [of_score(score_of(text)).plain for text in ("2 * score", "alibi", "dense_bias", "t5_bias")]
    assert plain == sorted(plain) and plain[0] > 0
    rows = of_score(score_of("score * exp(q / 100) + log(q + 5000)"))
    assert rows.mufu == 0, "what a row has in common is computed once"
    once = of_score(score_of("tanh(score) + 2 * tanh(score) ** 2"))
    assert once.mufu == 1, "what appears twice is computed once"


def test_operations_of_conditions() -> None:
    def plain(mask: str) -> float:
        return of_condition(make_spec(mask, params={"n": "runtime"}).attention.condition).plain

    costs = [plain(mask) for mask in ("causal", *(f"(q - kv) % {n} == 0" for n in (8, 7, "n")))]
    assert costs == sorted(set(costs))


def seconds(mask: str, score: str = "score", **change: Any) -> Cost:
    tiling = Tiling("sm90", 128, 128, 2, 8, Sm90Schedule(**change))
    return cost(tiling, Workload.of(make_spec(mask, score)), H200)


def test_scores_and_listed_masks_cost_time() -> None:
    causal = seconds("causal")
    assert causal.seconds < seconds("causal", "alibi").seconds < seconds("causal", "softcap(30)").seconds
    assert seconds("causal", "softcap(30)").exp2_s == pytest.approx(2 * causal.exp2_s)
    strided = seconds("causal and (q - kv) % 7 == 0")
    assert strided.tiles_visited == causal.tiles_visited and strided.seconds > 1.2 * causal.seconds
    assert seconds("full").seconds == seconds("kv >= 0 and kv < seqlen_kv").seconds


# -- tunings -----------------------------------------------------------------------------------------------


def entry(of: str = "", **change: Any) -> Tuned:
    fields: dict[str, Any] = {
        "element_bits": 16, "head_dim_qk": 128, "head_dim_v": 128, "mask": "causal", "variant": of,
        "seqlen_q": 4096, "seqlen_kv": 4096, "family": "sm90", "tile_q": 128, "tile_kv": 128, "stages": 2,
        "warps": 8,
        "schedule": {"tile_order": "dynamic", "producer_registers": 40, "consumer_registers": 232},
        "tflops": 500.0, "tried": 9, "rank_correlation": 0.5, "regret": 0.03, "source": "by hand",
    }  # fmt: skip
    return Tuned(**(fields | change))


@pytest.mark.parametrize(
    ("mask", "score", "sink", "expected"),
    [
        ("causal", "score", False, ""),
        ("kv <= q + 9", "score", False, ""),
        ("prefix_lm(9)", "score", False, ""),
        ("causal", "softcap(50)", False, "causal_softcap50"),
        ("causal", "score", True, "causal_sink"),
        ("sink_window(4, 99)", "score", False, "sink_window_4_99"),
        ("document", "alibi", True, "document_alibi_sink"),
    ],
)
def test_variants(mask: str, score: str, sink: bool, expected: str) -> None:
    spec = make_spec(mask, score, sink=sink)
    assert variant(Workload.of(spec)) == expected
    half = spec.model_copy(update={"attention": spec.attention.model_copy(update={"dtype": "fp16"})})
    assert variant(Workload.of(half)) == "_".join(filter(None, (expected, "fp16")))


def test_a_variant_is_tuned_by_its_own_entry_first_and_by_its_class_else() -> None:
    first = {**entry().schedule, "reference": "first"}  # as the solver would choose: its own is not far ahead
    plain, own = entry(tile_kv=112, schedule=first), entry("causal_softcap50", schedule=first)
    file = Tunings(target="sm_90a", gpu="a GPU", entries=(plain, own))
    capped, biased = (Workload.of(make_spec("causal", score)) for score in ("softcap(50)", "dense_bias"))
    assert key_of(capped) == own.key
    found = [find([file], work) for work in (capped, biased, Workload.of(make_spec()))]
    assert [pair[0] for pair in found if pair is not None] == [own, plain, plain]
    plan = rank(make_spec("causal", "softcap(50)"), H200, tunings=[file]).best
    assert (
        plan.tile_kv == 128 and dict(plan.why.measured)["measured"] == "500 TFLOP/s at seqlen 4096 on a GPU"
    )
    other = rank(make_spec("causal", "softcap(30)"), H200, tunings=[file]).best
    assert other.tile_kv == 112
    assert "of causal masks: causal_softcap30 was not measured" in dict(other.why.measured)["measured"]


def test_a_tuning_that_a_score_has_no_registers_for_is_left() -> None:
    one_q_buffer = {
        "tile_order": "dynamic",
        "reference": "first",
        "producer_registers": 40,
        "consumer_registers": 232,
    }
    file = Tunings(target="sm_90a", gpu="a GPU", entries=(entry(tile_kv=160, schedule=one_q_buffer),))
    assert rank(make_spec(), H200, tunings=[file]).tuned is not None
    tight = rank(make_spec("causal", "t5_bias + bias[q, kv] - bias[kv, kv]", **BIAS), H200, tunings=[file])
    assert tight.tuned is None


BIAS: dict[str, Any] = {"tensors": {"bias": {"index": ["head", "q", "kv"], "dtype": "bf16"}}}


@pytest.mark.compiler
def test_a_tile_of_one_mma_where_no_other_has_the_registers() -> None:
    spec = AttentionSpec(
        name="wide",
        attention={"heads": 4, "head_dim": 256, "mask": "longformer(30, 5)", "score": "dense_bias"},
        workload={"batch": 1, "seqlen": 1024},
    )
    plan = solve(spec, A100)
    assert plan.tile_kv == 16
    assert build(plan, cache=False).resources.spill_bytes == 0


def test_plans_of_equal_masks_are_equal() -> None:
    def plan(mask: str) -> KernelPlan:
        return dataclasses.replace(solve(make_spec(mask), H200), spec="")

    assert plan("kv <= q") == plan("causal")
    assert plan("full") == plan("true")
    for everything in ("kv >= 0 and kv < seqlen_kv", "kv <= q or kv > q"):
        unmasked = plan(everything)
        assert dataclasses.replace(unmasked, mask=plan("full").mask) == plan("full")
        assert unmasked.mask.keeps_all
    assert plan("not (q < kv)").mask.derivation == plan("causal").mask.derivation
