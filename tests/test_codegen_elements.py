"""The mathematics that is printed for masks and scores: its arithmetic against numpy, and how it reads."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from codegen_plans import sm80_plan
from host_kernel import COMPILER, HostKernel

from flashgen.arch import arch
from flashgen.codegen import render
from flashgen.codegen.elements import elements
from flashgen.plan import solve
from flashgen.plan.model import KernelPlan
from flashgen.plan.tiles import visits
from flashgen.spec import parse_spec
from flashgen.spec.evaluation import evaluate
from flashgen.spec.gallery import GALLERY
from flashgen.spec.inputs import TensorInput
from flashgen.spec.sample import sample_tensor

HEADS_Q, HEADS_KV, BATCH = 4, 2, 2
on_host = pytest.mark.skipif(COMPILER is None, reason="no host compiler")

SCORES = {
    **{name: {"score": entry.sample} for name, entry in GALLERY.items() if entry.kind == "score"},
    "softcap at call time": {"score": "softcap(cap)", "params": "{cap: runtime}"},
    "large scores": {"score": "softcap(0.01)"},
    "distance, not affine": {
        "score": "score - slope[head] * abs(kv - q) + 0.25 * max(q, kv) - (q // 3) % 5",
        "tensors": "{slope: {index: [head], dtype: fp32}}",
    },
    "a tanh of a sum": {
        "score": "20 * tanh((score + pad[kv]) / 20) + slope[head] * (kv - q)",
        "tensors": "{pad: {index: [batch, kv], dtype: fp16}, slope: {index: [head], dtype: fp32}}",
    },
    "a tanh of a diagonal": {
        "score": "2 * tanh(score + near[q - kv])",
        "tensors": "{near: {index: [head_kv, q - kv], dtype: bf16}}",
    },
    "two tanh": {"score": "tanh(score) + tanh(score / 7) * score"},
    "everything": {
        "score": "score * sigmoid(score) + exp(-score * score) + log(1 + abs(score)) + sqrt(abs(score))"
        " + where(score > 0.5, score / (1 + abs(score)), min(score, -0.25) * 3)"
    },
    "integers in an element": {"score": "score + (q - kv) // 7 + (q * kv) % 5 + (kv - q) // 8 + kv % 4"},
    "tables": {
        "score": "score + near[kv % 6] * far[q // 3, kv // 5] + all * where(on[kv], 1, -1)",
        "tensors": "{near: {index: [6], dtype: fp32}, far: {index: [q, kv], dtype: fp32},"
        " all: {index: [], dtype: fp32}, on: {index: [batch, kv], dtype: bool}}",
    },
    "shifted": {
        "score": "score + bias[head, q - 3, kv + 5] + near[q - kv + 9]",
        "tensors": "{bias: {index: [head, q, kv], dtype: bf16}, near: {index: [q - kv], dtype: fp32}}",
    },
    "integers at call time": {
        "score": "score * where((q - kv) % step < reach, 1, 0.5) + kv // step",
        "params": "{step: runtime, reach: {runtime: int, min: 0}}",
    },
    "lengths and heads": {
        "score": "score * head_dim / seqlen_kv + head * 0.5 - head_kv + batch + seqlen_q ** 2"
    },
}

MASKS = {
    **{name: {"mask": entry.sample} for name, entry in GALLERY.items() if entry.kind == "mask"},
    "dilated by a power of two": {"mask": "kv <= q and (q - kv) % 4 == 0"},
    "dilated at call time": {"mask": "kv <= q and (q - kv) % step == 0", "params": "{step: runtime}"},
    "remainders compared": {"mask": "q % 3 == kv % 3 or (kv + 2 * q) % 7 < 3"},
    "a remainder that none has": {"mask": "(q - kv) % 5 == q % 9"},
    "unsorted documents": {
        "mask": "causal and doc[q] == doc[kv]",
        "tensors": "{doc: {index: [batch, kv], dtype: int32}}",
    },
    "elements": {"mask": "keep[q, kv]", "tensors": "{keep: {index: [batch, head, q, kv], dtype: bool}}"},
    "distances": {
        "mask": "near[q - kv] > 0 and kv != 5",
        "tensors": "{near: {index: [head, q - kv], dtype: fp32}}",
    },
    "a quotient by a constant": {"mask": "(kv - q) // 6 % 2 == 0 or abs(kv % 10 - q % 10) <= 2"},
    "heads of two kinds": {"mask": "kv <= q and (head < 2 or q - kv < 9)"},
    "two windows": {"mask": "window(12) or (kv <= q - 40 and kv > q - 60)"},
    "documents, windows": {"mask": "document and window(30)"},
}


def solved(mask: str = "full", score: str = "score", params: str = "{}", tensors: str = "{}") -> KernelPlan:
    """A plan for the Ampere family."""
    text = f"""
flashgen: 1
name: printed
attention:
  heads: {{q: {HEADS_Q}, kv: {HEADS_KV}}}
  head_dim: 64
  mask: "{mask}"
  score: "{score}"
  params: {params}
  tensors: {tensors}
workload: {{batch: {BATCH}, seqlen: 4096}}
"""
    return solve(parse_spec(text), arch("sm_80"))


class Case:
    """A plan with lengths and contents for all that it reads, in numpy and in the host kernel's memory."""

    def __init__(self, plan: KernelPlan, folder: Path, seqlen_q: int, seqlen_kv: int) -> None:
        self.plan, self.seqlen_q, self.seqlen_kv = plan, seqlen_q, seqlen_kv
        self.kernel = HostKernel(plan, folder)
        self.scale = 0.125
        self.random = np.random.default_rng(17)
        self.kernel.set(
            batch=BATCH,
            heads_q=HEADS_Q,
            heads_kv=HEADS_KV,
            seqlen_q=seqlen_q,
            seqlen_kv=seqlen_kv,
            scale=self.scale,
        )
        self.values: dict[str, Any] = {"seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv, "scale": self.scale}
        for tensor in plan.tensors:
            self._give(tensor)
        for parameter in plan.parameters:
            number = 3 if parameter.kind == "int" else 2.5
            self.values[parameter.name] = number
            self.kernel.set(**{f"inputs_{parameter.name}": number})
        self.shift = seqlen_kv - seqlen_q if plan.align == "bottom_right" else 0

    def _give(self, tensor: TensorInput) -> None:
        sizes = {"seqlen_q": self.seqlen_q, "seqlen_kv": self.seqlen_kv}
        held = sample_tensor(tensor, batch=BATCH, heads_q=HEADS_Q, heads_kv=HEADS_KV, **sizes)
        if held is None:
            lengths = {
                "batch": BATCH,
                "head": HEADS_Q,
                "head_kv": HEADS_KV,
                "q": self.seqlen_q,
                "kv": self.seqlen_kv,
                "q - kv": self.seqlen_q + self.seqlen_kv - 1,
            }
            shape = tuple(axis if isinstance(axis, int) else lengths[axis] for axis in tensor.index)
            held = (
                self.random.integers(-1, 2, shape)
                if tensor.dtype == "int32"
                else self.random.normal(size=shape)
            )
            held = held > 0 if tensor.dtype == "bool" else held
        memory, numbers = _stored(np.asarray(held), tensor.dtype)
        self.kernel.give(tensor.name, memory)
        starts = {"q": self.seqlen_kv - self.seqlen_q if self.plan.align == "bottom_right" else 0}
        starts["q - kv"] = starts["q"] - (self.seqlen_kv - 1)

        def element(*subscripts: Any) -> Any:
            places = [
                np.clip(np.asarray(at) - starts.get(str(axis), 0), 0, size - 1)
                for axis, at, size in zip(tensor.index, subscripts, numbers.shape, strict=True)
            ]
            return numbers[tuple(places)]

        self.values[tensor.name] = element

    def tiles(self) -> list[tuple[int, int]]:
        """(first position, first key) of every 16 rows and every tile of keys."""
        rows = range(0, self.seqlen_q, 16)
        return [(row + self.shift, kv) for row in rows for kv in range(0, self.seqlen_kv, self.plan.tile_kv)]

    def at(self, batch: int, head: int, q: int, kv: int) -> dict[str, Any]:
        """Values for the 16 rows from position q on and the tile of keys from kv on."""
        named = {"batch": batch, "head": head, "head_kv": head * HEADS_KV // HEADS_Q}
        rows, keys = q + np.arange(16)[:, None], kv + np.arange(self.plan.tile_kv)[None, :]
        return self.values | named | {"q": rows, "kv": keys}

    def condition(self, batch: int, head: int, q: int, kv: int) -> npt.NDArray[np.bool_]:
        """What the mask keeps of the 16 rows from position q on and the tile of keys from kv on."""
        shape = (16, self.plan.tile_kv)
        kept = np.broadcast_to(evaluate(self.plan.mask.condition, self.at(batch, head, q, kv)), shape)
        return kept & (kv + np.arange(self.plan.tile_kv) < self.seqlen_kv)

    def row(self, batch: int, head: int, row: int) -> npt.NDArray[np.bool_]:
        """What the mask keeps of one row."""
        named = {"batch": batch, "head": head, "head_kv": head * HEADS_KV // HEADS_Q}
        values = self.values | named | {"q": row + self.shift, "kv": np.arange(self.seqlen_kv)}
        return np.broadcast_to(evaluate(self.plan.mask.condition, values), (self.seqlen_kv,))

    def kept_keys(self, batch: int, head: int, row: int) -> list[int]:
        return np.flatnonzero(self.row(batch, head, row)).tolist()

    def extents(self) -> tuple[int, int]:
        """Batches and heads that have prepared arrays of their own."""
        over = self.plan.mask.derivation.over
        return BATCH if "batch" in over else 1, HEADS_Q if "head" in over else 1

    def exists(self, q: int, kv: int) -> npt.NDArray[np.bool_]:
        rows = q + np.arange(16) - self.shift < self.seqlen_q
        return rows[:, None] & (kv + np.arange(self.plan.tile_kv) < self.seqlen_kv)[None, :]


def _stored(held: npt.NDArray[Any], dtype: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """As in memory, and the numbers that it stands for."""
    if dtype == "bf16":
        bits = (held.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    stored = held.astype({"fp32": np.float32, "fp16": np.float16, "int32": np.int32, "bool": np.uint8}[dtype])
    return stored, stored.astype(np.float64 if dtype in ("fp32", "fp16") else np.int64)


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


PLANS = {name: solved(**mask) for name, mask in MASKS.items()}


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


# -- how it reads


def printed(name: str) -> str:
    return render(solved(**SCORES[name]) if name in SCORES else PLANS[name]).text


def function(text: str, name: str) -> str:
    """The body of a printed function."""
    found = re.search(rf"{name}\([^{{]*\) {{\n(.*?)\n}}", text, re.DOTALL)
    assert found is not None
    return re.sub(r"\s+", " ", found[1]).strip()


def test_a_linear_bias_is_one_multiply_add_beside_the_scale() -> None:
    assert (
        function(printed("alibi"), "score_element") == "return s * params.scale + (c * terms.slope + row.x);"
    )


def test_a_softcap_is_left_to_the_softmax() -> None:
    text = printed("softcap")
    assert "CappedSoftmax softmax" in text and "apply_score" not in text


def test_a_tanh_of_more_than_the_score_has_its_polynomial_too() -> None:
    text = printed("a tanh of a diagonal")
    assert "score_argument" in text and "score_element" not in text
    assert "near_zero(s[j][e])" in text and "anywhere(s[j][e])" in text


def test_a_bias_of_the_distance_is_read_once_per_diagonal() -> None:
    text = printed("relative_bias")
    assert text.count("read(") == 1 and "read(row.distance_bias - (kEdge ?" in text
    assert "diagonals[2 + e] = j == 0 ? score_diagonal<kEdge>(rows[0], e - 8) : diagonals[e];" in text


@pytest.mark.parametrize("name", SCORES)
def test_no_integer_is_converted_for_an_element_if_a_row_can(name: str) -> None:
    text = printed(name)
    element = function(text, "score_element") if "score_element(" in text else ""
    divided = r"floor_(div|mod)\(|[\w.() ]* (/|%|&|>>) |static_cast<int>\(static_cast<unsigned>"
    conversions = re.findall(r"static_cast<float>\((.*)", element)
    assert all(re.match(divided, converted) for converted in conversions), element


def test_a_remainder_is_compared_with_a_constant_of_the_column() -> None:
    assert function(printed("dilated by a power of two"), "keep_element") == "return 3 * c % 4 == row.n;"
    assert function(printed("dilated"), "keep_element") == "return 2 * c % 3 == row.n;"


@pytest.mark.parametrize("name", [*SCORES, *MASKS])
def test_no_double_and_no_slow_function(name: str) -> None:
    code = re.sub(r"//[^\n]*", "", printed(name))
    assert not re.search(r"\b(double|std::|powf|tanhf|expf|logf|sqrtf|floorf)\b", code)
    assert not re.search(r"\d\.\d+(?![\d.]*f)", code), "a literal that is a double"


@pytest.mark.parametrize("name", [*SCORES, *MASKS])
def test_output_is_clean_text(name: str) -> None:
    text = printed(name)
    assert [line for line in text.split("\n") if line != line.rstrip() or len(line) > 110] == []
    assert "\n\n\n" not in text
    code = re.sub(r"//[^\n]*", "", text)
    declared = set(
        re.findall(r"(?<=const )\w+(?= =)|(?<=const int )\w+|(?<=const float )\w+|(?<=struct )\w+", code)
    )
    assert {name for name in declared if len(re.findall(rf"\b{name}\b", code)) < 2} == set()


def test_a_name_that_cpp_keeps_for_itself_is_printed_otherwise() -> None:
    plan = solved(
        score="score * float + register[head]",
        params="{float: runtime}",
        tensors="{register: {index: [head], dtype: fp32}}",
    )
    assert "float float_;" in elements(plan).inputs and "params.inputs.register_ + head" in render(plan).text


def test_printing_is_deterministic() -> None:
    plan = solved(**SCORES["everything"])
    first = render(plan).text
    elements.cache_clear()
    assert render(plan).text == first


@pytest.mark.compiler
@pytest.mark.parametrize("name", [*SCORES, *MASKS])
def test_compiles_without_spills(name: str) -> None:
    from flashgen.build import compile_source

    plan = solved(**SCORES[name]) if name in SCORES else PLANS[name]
    roomy = sm80_plan(64, 64, 64, 4)  # the registers that a tiling leaves are the solver's affair
    plan = replace(
        roomy,
        mask=plan.mask,
        score=plan.score,
        tensors=plan.tensors,
        parameters=plan.parameters,
        sink=plan.sink,
        group=plan.group,
    )
    resources = compile_source(render(plan), plan.target, dynamic_smem=plan.smem_bytes).resources
    assert resources.spill_bytes == 0 and resources.stack_bytes == 0
