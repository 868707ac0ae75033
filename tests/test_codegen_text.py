"""The mathematics that is printed for masks and scores: how it reads, and that it compiles."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from attention_cases import Case
from codegen_plans import sm80_plan
from element_cases import MASKS, PLANS, PRODUCTS, SCORES, solved

from flashgen.arch import arch
from flashgen.codegen import render
from flashgen.codegen.elements import elements
from flashgen.plan import solve


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


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_what_a_query_has_without_its_keys_is_computed_before_the_loop(target: str) -> None:
    case = Case(
        128,
        128,
        mask="(q // 3 - kv // 3) % 5 < 2",
        score="score * sqrt(gain[q]) + slope[head] * (kv - q) - log(1 + abs(q))",
        inputs={
            "gain": {"index": ["q"], "dtype": "fp32"},
            "slope": {"index": ["head"], "dtype": "fp32"},
        },
    )
    text = render(solve(case.spec(), arch(target))).text
    outer, inner = (
        function(text, "score_query"),
        function(text, "score_row") + function(text, "score_element"),
    )
    assert "sqrt_approx" in outer and "log2_approx" in outer and "read(" in outer
    assert not re.search("sqrt_approx|log2_approx|read", inner)
    assert "floor_div" in function(text, "keep_query") and "floor_div(q" not in function(text, "keep_row")
    loop = text.index("while (visit") if target == "sm_80" else text.index("issue_scores(s, q_descriptor")
    for kind in ("score", "keep"):
        made = re.search(rf"{kind}_queries(\[kWarpBlocks\])?\[2\]", text)
        assert made is not None and made.start() < loop


def test_a_bias_of_the_distance_is_read_once_per_diagonal() -> None:
    text = printed("relative_bias")
    assert text.count("read(") == 1 and "read(row.distance_bias - (kEdge ?" in text
    assert "diagonals[2 + e] = j == 0 ? score_diagonal<kEdge>(row, e - 8) : diagonals[e];" in text
    assert text.count("score_row(params, terms,") == 1, "the other row is not read"


def test_a_distance_within_another_is_in_both() -> None:
    score = "log(1 + exp(-abs(q - kv) / 64)) * gain[kv] + score * exp(-abs(q - kv) / 64)"
    text = render(solved(score=score, tensors="{gain: {index: [kv], dtype: fp32}}")).text
    assert "return diagonal * s * params.scale + diagonal2 * gain;" in function(text, "score_element")


def test_neighbouring_columns_of_a_bias_are_one_load_where_their_address_allows_it() -> None:
    text = printed("dense_bias")
    assert "bias = read_column<kEdge, kPairs>(row.bias, c, row.bias_last);" in text
    assert "paired = holds_pairs(rows[0].bias) && holds_pairs(rows[1].bias);" in text
    assert "kPairs" not in printed("relative_bias") + printed("tables").partition("score_element")[0]


def test_a_quotient_that_falls_is_divided_once_a_row() -> None:
    text = printed("quotients that fall")
    elements = function(text, "score_element") + function(text, "score_diagonal")
    assert "floor_" not in elements and elements.count("static_cast<unsigned>(row.") == 5


def test_what_two_searches_look_for_is_read_once() -> None:
    prepare = printed("document").partition("_prepare(")[2]
    assert prepare.count("read(doc + min(") == 1 and prepare.count("value") == 5


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
    assert not re.search(r"\d\.\d+(e-?\d+)?(?![\d.]*(e-?\d+)?f)", code), "a literal that is a double"


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


def test_only_what_may_leave_32_bits_is_computed_in_64() -> None:
    def parts(mask: str) -> tuple[bool, bool]:
        text = render(solved(mask=mask)).text
        return "int64_t" in function(text, "keep_row"), "int64_t" in function(text, "keep_element")

    assert parts("q * kv % 7 == 0") == (True, True)
    assert parts("(q * 1103515245 + kv * 12345) % 65536 < 3000") == (True, False)
    assert parts("abs(7 * (q - kv) + 7) % 1000 < kv // 16") == (False, False)


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
@pytest.mark.parametrize("name", [*SCORES, *MASKS, *PRODUCTS])
def test_compiles_without_spills(name: str) -> None:
    from flashgen.build import compile_source

    plan = PLANS[name] if name in PLANS else solved(**(SCORES | PRODUCTS)[name])
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


@pytest.mark.parametrize(
    ("mask", "schedule"),
    [
        ("causal", {"reference": "running"}),
        ("causal", {"reference": "first"}),
        ("causal", {"cluster": 2}),
        ("causal and (q - kv) % 96 < 3", {}),
    ],
)
def test_the_next_tile_is_drawn_when_this_one_is_nearly_done(mask: str, schedule: dict[str, object]) -> None:
    """Drawn at its start, the next would wait for this block while others are free."""
    tiles = {"q": 128, "kv": 64, "schedule": {"family": "sm90", "tile_order": "dynamic", **schedule}}
    text = function(
        render(solve(Case(128, 128, mask=mask, tiles=tiles).spec(), arch("sm_90a"))).text, "produce"
    )
    loads = [found.start() for found in re.finditer(r"load_v\(tile", text)]
    assert text.count("atomicInc") == 1
    assert loads[-2] < text.index("atomicInc") < loads[-1]
