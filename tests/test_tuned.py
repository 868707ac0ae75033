"""Tuned plans: the shipped file, which entry speaks for which workload, and what happens to files that are
wrong.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from flashgen.arch import ARCHS
from flashgen.errors import PlanError
from flashgen.plan import (
    MaskPlan,
    Sm80Schedule,
    Sm90Schedule,
    Workload,
    plan_from_dict,
    rank,
    solve,
    validate,
)
from flashgen.plan.constraints import violations
from flashgen.plan.tiling import Head
from flashgen.plan.tuned import (
    SHIPPED,
    Tuned,
    Tunings,
    TuningWarning,
    bucket,
    find,
    key_of,
    mask_class,
    read,
    tunings_for,
    user_path,
)
from flashgen.spec import AttentionSpec
from flashgen.spec.bounds import RowBounds

H200 = ARCHS["sm_90a"]
FILES = sorted(SHIPPED.glob("*.json"))


def make_spec(seqlen: Any = 4096, head_dim: Any = 128, mask: Any = "causal", **tiles: Any) -> AttentionSpec:
    """16k tokens, as the entries were measured."""
    longest = max(seqlen.values()) if isinstance(seqlen, dict) else seqlen
    parts: dict[str, Any] = {
        "attention": {"heads": 16, "head_dim": head_dim, "mask": mask},
        "workload": {"batch": max(1, 16384 // longest), "seqlen": seqlen},
    }
    return AttentionSpec(name="tuned", **parts, **({"tiles": tiles} if tiles else {}))


def entry(seqlen: int = 4096, **change: Any) -> Tuned:
    fields: dict[str, Any] = {
        "element_bits": 16, "head_dim_qk": 128, "head_dim_v": 128, "mask": "causal", "seqlen_q": seqlen,
        "seqlen_kv": seqlen, "family": "sm90", "tile_q": 128, "tile_kv": 128, "stages": 2, "warps": 8,
        "schedule": {"tile_order": "dynamic", "key_order": "ascending", "reference": "first", "q_stages": 2,
                     "o_buffer": "own", "producer_registers": 40, "consumer_registers": 232},
        "tflops": 500.0, "tried": 9, "rank_correlation": 0.5, "regret": 0.03, "source": "by hand",
    }  # fmt: skip
    return Tuned(**(fields | change))


def tunings(*entries: Tuned) -> Tunings:
    return Tunings(target="sm_90a", gpu="a GPU", entries=entries)


def workload(**change: Any) -> Workload:
    return dataclasses.replace(Workload.of(make_spec()), **change)


# -- the shipped files -------------------------------------------------------------------------------------


def test_there_are_shipped_tunings() -> None:
    assert [path.stem for path in FILES] == ["sm_90a"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_tunings_are_legal_and_written_as_tune_writes_them(path: Path) -> None:
    file = read(path)
    assert file is not None and file.target == path.stem and file.text == path.read_text()
    assert len({e.key for e in file.entries}) == len(file.entries)
    for e in file.entries:
        head = Head(e.head_dim_qk, e.head_dim_v, has_first=e.mask == "window", unmasked=e.mask == "full")
        assert violations(e.tiling, head, ARCHS[file.target]) == ()
        for length in (e.seqlen_q, e.seqlen_kv):
            assert bucket(length) == length
        assert e.tflops > 0 and e.tried > 0 and 0 <= e.regret < 1 and e.source


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_tunings_are_what_solve_gives(path: Path) -> None:
    """At the workload that they were measured on, the model does not object to any of them."""
    file = read(path)
    assert file is not None
    for e in file.entries:
        mask = {"full": "full", "causal": "causal", "window": {"window": 1024}}[e.mask]
        heads = max(1, 2048 // e.head_dim_v)
        spec = AttentionSpec(
            name="tuned",
            attention={
                "heads": heads,
                "head_dim": {"qk": e.head_dim_qk, "v": e.head_dim_v},
                "mask": mask,
                "dtype": e.variant or "bf16",
            },
            workload={"batch": max(1, 16384 // e.seqlen_kv), "seqlen": {"q": e.seqlen_q, "kv": e.seqlen_kv}},
        )
        plan = solve(spec, ARCHS[file.target])
        assert plan.why.origin == "tuned", e.key
        assert (plan.tile_q, plan.tile_kv, plan.stages) == (e.tile_q, e.tile_kv, e.stages)
        assert plan.schedule == e.tiling.schedule
        validate(plan, ARCHS[file.target])
        assert plan_from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


# -- which entry -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seqlen", "expected"),
    [(1, None), (255, None), (256, 512), (512, 512), (513, 1024), (4096, 4096), (5000, 8192), (10**6, 16384)],
)
def test_buckets(seqlen: int, expected: int | None) -> None:
    assert bucket(seqlen) == expected


def test_mask_classes() -> None:
    def of(mask: str) -> str:
        return mask_class(Workload.of(make_spec(mask=mask)).mask)

    assert of("full") == of("padding") == of("kv % 2 == 0") == "full"
    assert of("causal") == of("kv <= q + 7") == of("prefix_lm(9)") == of("sink_window(4, 99)") == "causal"
    assert (
        of("document")
        == of("window(4)")
        == of("kv >= q")
        == of("chunked(99)")
        == of("dilated(9, 2)")
        == "window"
    )


def test_the_nearest_length_speaks_for_one_that_was_not_measured() -> None:
    file = tunings(entry(512), entry(2048), entry(16384))
    lengths = {512: 512, 600: 2048, 2048: 2048, 4096: 2048, 8192: 16384, 40000: 16384}
    for seqlen, expected in lengths.items():
        found = find([file], workload(seqlen_q=seqlen, seqlen_kv=seqlen))
        assert found is not None and found[0].seqlen_q == expected, seqlen
    assert find([file], workload(seqlen_q=100)) is None
    assert find([file], workload(seqlen_q=512)) is None  # queries and keys of different lengths
    assert find([file], workload(head_dim_v=64)) is None
    assert find([file], workload(mask=MaskPlan.of_bounds("full", RowBounds(None, None)))) is None


def test_lengths_that_differ_need_their_own_entry() -> None:
    file = tunings(entry(512, seqlen_kv=4096))
    found = find([file], workload(seqlen_q=400))
    assert found is not None and found[0] is file.entries[0]
    assert find([file], workload(seqlen_q=4096)) is None


def test_the_users_tunings_come_first() -> None:
    own, shipped = tunings(entry(4096, tflops=600.0)), tunings(entry(4096), entry(512))
    found = find([own, shipped], workload())
    assert found is not None and found == (own.entries[0], own)
    found = find([own, shipped], workload(seqlen_q=512, seqlen_kv=512))
    assert found is not None and found[1] is shipped


# -- what solve makes of it --------------------------------------------------------------------------------


def test_a_tuned_plan_says_so() -> None:
    ranking = rank(make_spec(), H200, tunings=[tunings(entry())])
    plan = ranking.best
    assert ranking.tuned is not None and plan is ranking.tuned.plan
    assert isinstance(plan.schedule, Sm90Schedule) and plan.schedule.key_order == "ascending"
    assert plan.why.origin == "tuned"
    assert "best of 9 tilings" in plan.why.binding
    said = dict(plan.why.measured)
    assert said["measured"] == "500 TFLOP/s at seqlen 4096 on a GPU"
    assert said["the model's ranking there"] == "rank correlation +0.50, its choice 3.0% slower"
    assert plan.why.slack and plan.why.rejected and plan.why.cost
    again = plan_from_dict(plan.to_dict())
    assert again == plan and again.why == plan.why
    assert json.loads(json.dumps(ranking.to_dict()))["tuned"]["plan"]["why"]["origin"] == "tuned"


def test_it_is_said_where_another_mask_was_measured() -> None:
    prefix = make_spec(mask="prefix_lm(16)")
    (measured, *_) = rank(prefix, H200, tunings=[tunings(entry())]).best.why.measured
    assert measured == ("measured", "500 TFLOP/s at seqlen 4096 on a GPU, of causal masks")


@pytest.mark.parametrize(
    ("measured", "dtype", "reference"),
    [("causal_softcap30", "bf16", "first"), ("causal_softcap30", "fp16", "running"), ("", "fp16", "running")],
)
def test_a_score_keeps_the_reference_that_it_was_measured_with(
    measured: str, dtype: str, reference: str
) -> None:
    softcap = AttentionSpec(
        name="tuned",
        attention={"heads": 16, "head_dim": 128, "dtype": dtype, "mask": "causal", "score": "softcap(30)"},
        workload={"batch": 4, "seqlen": 4096},
    )
    schedule = {**entry().schedule, "distance_terms": "early"}  # of which this score has none
    kept = tunings(entry(variant=measured, tile_kv=96, schedule=schedule))
    plan = rank(softcap, H200, tunings=[kept]).best
    assert isinstance(plan.schedule, Sm90Schedule) and plan.why.origin == "tuned"
    assert (plan.schedule.reference, plan.schedule.distance_terms) == (reference, "late")


@pytest.mark.parametrize(
    ("dtype", "score", "steps"), [("bf16", "score", 4), ("fp16", "score", 0), ("bf16", "alibi", 0)]
)
def test_steps_of_q_and_clusters_are_taken_where_they_were_measured(
    dtype: str, score: str, steps: int
) -> None:
    """A score may need the registers."""
    spec = AttentionSpec(
        name="tuned",
        attention={"heads": 16, "head_dim": 128, "dtype": dtype, "mask": "causal", "score": score},
        workload={"batch": 4, "seqlen": 4096},
    )
    schedule = {**entry().schedule, "q_register_steps": 4, "cluster": 2}
    plan = rank(spec, H200, tunings=[tunings(entry(tile_kv=96, schedule=schedule))]).best
    assert isinstance(plan.schedule, Sm90Schedule) and plan.why.origin == "tuned"
    assert (plan.schedule.q_register_steps, plan.schedule.cluster) == (steps, 2 if steps else 1)


FIRST = {"reference": "first"}


@pytest.mark.parametrize("measured", ["full", "causal", None])
@pytest.mark.parametrize(
    ("mask", "score", "choices"),
    [
        ("causal", "score", {**FIRST, "output_wait": "middle", "distance_terms": "late"}),
        ("causal", "alibi", {**FIRST, "key_order": "descending", "output_wait": "early", "ping_pong": False}),
        ("full", "alibi", {"reference": "running"}),  # the first key tile is far from most rows
        ("full", "relative_bias", {**FIRST, "output_wait": "early", "distance_terms": "early"}),
        ("causal", "t5_bias", {**FIRST, "key_order": "descending", "distance_terms": "late"}),
        ("full", "dense_bias", {**FIRST, "output_wait": "middle", "distance_terms": "late"}),
        ("causal", "softcap(30)", {**FIRST, "key_order": "ascending", "output_wait": "middle"}),
        ("causal and document", "softcap(30)", {"reference": "running"}),
    ],
)
def test_what_a_score_is_computed_with(
    mask: str, score: str, choices: dict[str, Any], measured: str | None
) -> None:
    """Without a tuning, and with one of a mask alone."""
    spec = AttentionSpec(
        name="scored",
        attention={"heads": 16, "head_dim": 128, "mask": mask, "score": score},
        workload={"batch": 4, "seqlen": 4096},
    )
    schedule = rank(spec, H200, tunings=[tunings(entry(mask=measured))] if measured else []).best.schedule
    assert {name: getattr(schedule, name) for name in choices} == choices


@pytest.mark.parametrize("score", ["softcap(30)", "alibi", "relative_bias"])
def test_what_a_score_is_computed_with_is_left_to_sm90(score: str) -> None:
    spec = AttentionSpec(
        name="scored",
        attention={"heads": 16, "head_dim": 128, "mask": "causal", "score": score},
        workload={"batch": 4, "seqlen": 4096},
    )
    tuning = entry(family="sm80", tile_kv=64, schedule={"q_in_registers": False})
    file = Tunings(target="sm_80", gpu="a GPU", entries=(tuning,))
    assert rank(spec, ARCHS["sm_80"], tunings=[file]).best.schedule == Sm80Schedule(q_in_registers=False)


@pytest.mark.parametrize(
    "tiles",
    [{"kv": 64}, {"stages": 2}, {"schedule": {"q_stages": 1}}],
    ids=str,
)
def test_what_is_given_is_not_overruled(tiles: dict[str, Any]) -> None:
    assert rank(make_spec(**tiles), H200, tunings=[tunings(entry())]).tuned is None


@pytest.mark.parametrize(
    "change",
    [
        {"tile_kv": 256},  # registers
        {"stages": 9},  # shared memory
        {"schedule": {"consumer_registers": 248}},  # the register pool: it would hang
        {"family": "sm80", "schedule": {}},
        {"tile_q": 64, "tile_kv": 16, "warps": 4,
         "schedule": {"ping_pong": False, "producer_registers": 56, "consumer_registers": 248}},  # far off
    ],
    ids=str,
)  # fmt: skip
def test_an_entry_that_is_illegal_or_unlike_this_workload_is_left(change: dict[str, Any]) -> None:
    ranking = rank(make_spec(), H200, tunings=[tunings(entry(**change))])
    assert ranking.tuned is None and ranking.best.why.origin == "solved"


def test_other_chips_have_no_tunings_of_this_one() -> None:
    assert tunings_for("sm_80") == ()
    assert solve(make_spec(), ARCHS["sm_80"]).why.origin == "solved"


# -- the user's file ---------------------------------------------------------------------------------------


@pytest.fixture
def own_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path))
    path = user_path("sm_90a")
    path.parent.mkdir()
    return path


def test_the_users_file_is_read(own_file: Path) -> None:
    assert len(tunings_for("sm_90a")) == 1
    own_file.write_text(tunings(entry(tflops=999.0)).text)
    assert len(tunings_for("sm_90a")) == 2
    assert dict(solve(make_spec(), H200).why.measured)["measured"].startswith("999 TFLOP/s")
    own_file.write_text(tunings(entry(tflops=1001.0)).text)  # a change is seen
    assert dict(solve(make_spec(), H200).why.measured)["measured"].startswith("1001 TFLOP/s")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data.replace('"stages":2', '"stages":"2"').replace('"stages": 2', '"stages": "2"'),
        lambda data: data.replace("key_order", "warp_speed"),
        lambda data: data.replace('"ascending"', '"sideways"'),
        lambda data: data.replace('"version": 1', '"version": 2'),
        lambda data: "[]",
    ],
    ids=["cut", "type", "field", "choice", "version", "list"],
)
def test_a_damaged_file_is_named_and_left_out(own_file: Path, damage: Any) -> None:
    text = tunings(entry()).text
    assert damage(text) != text
    own_file.write_text(damage(text))
    with pytest.raises(PlanError, match=r"holds no tunings that this version reads: \w"):
        read(own_file)
    with pytest.warns(TuningWarning, match="remove it"):
        found = tunings_for("sm_90a")
    assert len(found) == 1
    assert solve(make_spec(), H200).tile_q > 0


def test_merging_keeps_what_speaks_for_something_else() -> None:
    merged = tunings(entry(512), entry(1024)).with_entries([entry(1024, tflops=700.0), entry(2048)])
    assert {e.seqlen_q: e.tflops for e in merged.entries} == {512: 500.0, 1024: 700.0, 2048: 500.0}
    assert Tunings.model_validate_json(merged.text).text == merged.text


def test_a_key_is_that_of_its_own_workload() -> None:
    assert key_of(workload()) == entry().key
    assert key_of(workload(seqlen_q=17)) is None


def test_attention_takes_tuned_plans_by_bucket() -> None:
    torch = pytest.importorskip("torch")
    from flashgen.runtime.formula import Formula
    from flashgen.runtime.shaped import ShapedAttention

    shaped = ShapedAttention(Formula('"causal"'))
    q, k, v = (torch.zeros(4, 2000, 16, 128, dtype=torch.bfloat16, device="meta") for _ in range(3))
    plan = shaped.kernel_for(q, k, v).plan
    assert plan.why.origin == "tuned"
    assert dict(plan.why.measured)["measured"].split(" at ")[1].startswith("seqlen 2048")
