"""The mathematics that is printed for masks and scores: its arithmetic against numpy, on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from element_cases import PLANS, PRODUCTS, SCORES, Case, solved
from host_kernel import COMPILER, HostKernel

from flashgen.plan.tiles import visits
from flashgen.spec.evaluation import evaluate

on_host = pytest.mark.skipif(COMPILER is None, reason="no host compiler")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


LENGTHS = [(150, 203), (70, 33)]


@on_host
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", [name for name in SCORES if name != "sink"])
def test_score_is_the_formula(name: str, lengths: tuple[int, int], compiled: Path) -> None:
    plan = solved(**SCORES[name])
    case = Case(plan, compiled, *lengths)
    for batch, head in ((0, 0), (1, 3)):
        for q, kv in case.tiles():
            products = case.random.normal(scale=8, size=(16, plan.tile_kv)).astype(np.float32)
            values = case.at(batch, head, q, kv) | {"score": case.scale * products.astype(np.float64)}
            expected = np.broadcast_to(evaluate(plan.score.expr, values), products.shape)
            printed = products.copy()
            case.kernel.tile("score", batch, head, q, kv, printed)
            inside = case.exists(q, kv)
            if case.kernel.capped:
                expected = np.exp(expected)
            np.testing.assert_allclose(printed[inside], expected[inside], rtol=3e-4, atol=3e-4)


@on_host
@pytest.mark.parametrize(("start", "gap"), [(0, 0), (0, 1), (1, 0), (1, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize("subscripts", ["q, kv", "q - 3, kv", "kv", "q, kv + 1", "q, kv - 1", "q, 2 * kv"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_biases_are_read_wherever_they_lie(
    dtype: str, subscripts: str, start: int, gap: int, compiled: Path
) -> None:
    index = "head, q, kv" if "q" in subscripts else "head, kv"
    plan = solved(
        score=f"score + bias[head, {subscripts}]", tensors=f"{{bias: {{index: [{index}], dtype: {dtype}}}}}"
    )
    for lengths in ((40, 150), (40, 2 * plan.tile_kv), (24, 203)):
        case = Case(plan, compiled, *lengths, start=start, gap=gap)
        for q, kv in case.tiles():
            printed = case.random.normal(size=(16, plan.tile_kv)).astype(np.float32)
            expected = evaluate(plan.score.expr, case.at(1, 3, q, kv) | {"score": case.scale * printed})
            case.kernel.tile("score", 1, 3, q, kv, printed)
            inside = case.exists(q, kv)
            np.testing.assert_allclose(printed[inside], expected[inside], rtol=1e-5, atol=1e-5)


def masks(*, listed: bool | None = None, preparation: str | None = "any") -> pytest.MarkDecorator:
    """The masks whose plans are as said."""
    names = [
        name
        for name, plan in PLANS.items()
        if listed in (None, plan.mask.listed) and preparation in ("any", plan.preparation)
    ]
    assert names
    return pytest.mark.parametrize("name", names)


HEADS = [(0, 0), (1, 3)]  # (batch, head)


@on_host
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@masks(listed=True)
def test_listed_mask_is_the_condition(name: str, lengths: tuple[int, int], compiled: Path) -> None:
    plan = PLANS[name]
    case = Case(plan, compiled, *lengths)
    for batch, head in HEADS:
        for q, kv in case.tiles():
            kept = np.ones((16, plan.tile_kv), np.float32)
            case.kernel.tile("mask", batch, head, q, kv, kept)
            expected = case.condition(batch, head, q, kv)
            rows = case.exists(q, kv).any(axis=1)
            np.testing.assert_array_equal((kept == 1)[rows], expected[rows])


@on_host
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@masks(listed=False, preparation=None)
def test_ends_are_those_of_the_condition(name: str, lengths: tuple[int, int], compiled: Path) -> None:
    case = Case(PLANS[name], compiled, *lengths)
    for batch, head in HEADS:
        for row in range(case.seqlen_q):
            kept = case.kept_keys(batch, head, row)
            first, last = case.kernel.ends(batch, head, row + case.shift)
            assert list(range(max(first, 0), min(last + 1, case.seqlen_kv))) == kept


@on_host
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@masks(preparation="ranges")
def test_prepared_ranges_are_those_of_the_condition(
    name: str, lengths: tuple[int, int], compiled: Path
) -> None:
    case = Case(PLANS[name], compiled, *lengths)
    batches, heads = case.extents()
    firsts, lasts = case.kernel.prepare_ranges(batches, heads, case.seqlen_q)
    for batch, head in HEADS:
        place = min(batch, batches - 1), min(head, heads - 1)
        for row in range(case.seqlen_q):
            first, last = int(firsts[place][row]), int(lasts[place][row])
            assert 0 <= first <= case.seqlen_kv and -1 <= last < case.seqlen_kv
            assert list(range(first, last + 1)) == case.kept_keys(batch, head, row)
            assert case.kernel.ends(batch, head, row + case.shift) == (first, last)


@on_host
@pytest.mark.parametrize("name", ["end", "place", "row_blocks", "value"])
def test_a_tensor_may_have_the_name_of_a_variable(name: str, compiled: Path) -> None:
    tensors = f"{{{name}: {{index: [batch, kv], dtype: int32, sorted: true}}}}"
    HostKernel(solved(mask=f"{name}[q] == {name}[kv]", tensors=tensors), compiled)  # compiles


@on_host
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@masks(listed=True, preparation=None)
def test_visits_are_those_of_the_plan(name: str, lengths: tuple[int, int], compiled: Path) -> None:
    plan = PLANS[name]
    case = Case(plan, compiled, *lengths)
    for batch, head in HEADS:
        values = case.at(batch, head, 0, 0)
        for begin in range(0, case.seqlen_q, plan.tile_q):
            q0 = begin + case.shift
            q1 = min(begin + plan.tile_q, case.seqlen_q) - 1 + case.shift
            ends = [
                (
                    *segment.evaluate(q0, case.seqlen_q, case.seqlen_kv, {**values, "q": q0}),
                    *segment.evaluate(q1, case.seqlen_q, case.seqlen_kv, {**values, "q": q1}),
                )
                for segment in plan.mask.derivation.segments
            ]
            assert case.kernel.visits(batch, head, q0, q1) == visits(ends, plan.tile_kv)


@on_host
@pytest.mark.parametrize("step", [1, 2, 7, 64, 201, 255, 256, 511, 512, 513, 70_001, 2**31 - 1])
def test_divisors_of_every_size_at_call_time(step: int, compiled: Path) -> None:
    plan = solved(mask="kv <= q and (q - kv) % step == 0", params="{step: runtime}")
    case = Case(plan, compiled, 600, 600)
    case.kernel.set(inputs_step=step)
    case.values["step"] = step
    for q, kv in case.tiles():
        kept = np.ones((16, plan.tile_kv), np.float32)
        case.kernel.tile("mask", 0, 0, q, kv, kept)
        rows = case.exists(q, kv).any(axis=1)
        np.testing.assert_array_equal((kept == 1)[rows], case.condition(0, 0, q, kv)[rows])


LONG = 2**20


@on_host
@pytest.mark.parametrize("name", PRODUCTS)
def test_what_leaves_32_bits_is_right_too(name: str, compiled: Path) -> None:
    plan = solved(**PRODUCTS[name])
    case = Case(plan, compiled, LONG, LONG)
    if plan.parameters:
        case.kernel.set(inputs_step=2**31 - 2)
        case.values["step"] = 2**31 - 2
    what = "score" if "score" in PRODUCTS[name] else "mask"
    for q, kv in ((LONG - 16, 0), (LONG - 16, LONG - plan.tile_kv), (70_000, 65_536), (0, LONG // 2)):
        printed = np.ones((16, plan.tile_kv), np.float32)
        expected = case.condition(0, 0, q, kv)
        if what == "score":
            expected = evaluate(plan.score.expr, case.at(0, 0, q, kv) | {"score": case.scale})
        case.kernel.tile(what, 0, 0, q, kv, printed)
        expected = np.broadcast_to(expected, printed.shape)  # a query's own
        np.testing.assert_allclose(printed == 1 if what == "mask" else printed, expected, rtol=1e-6)


@on_host
@pytest.mark.parametrize("mask", ["abs(q - kv) <= size", "kv <= q + size", "q - kv < size", "kv < size"])
def test_a_limit_without_end_at_call_time(mask: str, compiled: Path) -> None:
    case = Case(solved(mask=mask, params="{size: runtime}"), compiled, 90, 33)
    case.kernel.set(inputs_size=2**31 - 1)
    for row in range(case.seqlen_q):
        first, last = case.kernel.ends(0, 0, row + case.shift)
        assert first <= 0 and case.seqlen_kv - 1 <= last


@on_host
@pytest.mark.parametrize("cap", [15, 30, 50, 300, 1000])
def test_exponentials_of_capped_scores_are_within_a_thousandth(cap: int, compiled: Path) -> None:
    plan = solved(score=f"softcap({cap})")
    case = Case(plan, compiled, 64, 64)
    for score in np.linspace(-40, 40, 161):
        printed = np.full((16, plan.tile_kv), score / case.scale, np.float32)
        case.kernel.tile("score", 0, 0, 0, 0, printed)
        np.testing.assert_allclose(np.log(printed), cap * np.tanh(score / cap), atol=1e-3)


@on_host
@masks(preparation="map")
def test_map_lists_the_tiles_with_a_kept_key(name: str, compiled: Path) -> None:
    plan = PLANS[name]
    case = Case(plan, compiled, 150, 203)
    batches, heads = case.extents()
    q_tiles, kv_tiles = -(-case.seqlen_q // plan.tile_q), -(-case.seqlen_kv // plan.tile_kv)
    counts, words = case.kernel.prepare_map(batches, heads, q_tiles, kv_tiles)
    for batch in range(batches):
        for head in range(heads):
            rows = np.stack([case.row(batch, head, row) for row in range(case.seqlen_q)])
            for tile in range(q_tiles):
                expected = []
                for kv_tile in range(kv_tiles):
                    keys = slice(kv_tile * plan.tile_kv, (kv_tile + 1) * plan.tile_kv)
                    box = rows[tile * plan.tile_q : (tile + 1) * plan.tile_q, keys]
                    if box.any():
                        expected.append(2 * kv_tile + (not box.all() or box.shape[1] < plan.tile_kv))
                assert words[batch, head, tile, : counts[batch, head, tile]].tolist() == expected
