"""Rendering: a pure function of the plan, nothing unused in the output, and code that the compiler takes."""

from __future__ import annotations

import re
from dataclasses import replace

import jinja2
import pytest
from codegen_plans import SM80_PLANS, plan_id, sm80_plan

from flashgen.arch import ARCHS
from flashgen.codegen import render, render_standalone
from flashgen.codegen.environment import environment
from flashgen.errors import BuildError
from flashgen.plan import solve
from flashgen.plan.model import Explanation, KernelPlan
from flashgen.spec import AttentionSpec

plans = pytest.mark.parametrize("plan", SM80_PLANS, ids=plan_id)


def test_a_name_that_the_plan_lacks_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        environment().from_string("{{ plan.tile_z }}").render(plan=sm80_plan())


def test_source_depends_on_the_plan_alone() -> None:
    plan = sm80_plan()
    assert render(plan) == render(replace(plan, why=Explanation(binding="registers", origin="tuned")))
    assert render(plan).text != render(replace(plan, tile_kv=32)).text


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(("name", "formula"), [("causal", "kv <= q"), ("full", "true"), ("full", "kv == kv")])
def test_a_formula_is_the_kernel_of_its_name(name: str, formula: str, target: str, head_dim: int) -> None:
    """Byte by byte, plan and source: nobody pays for writing the mathematics out."""
    plans = []
    for mask in (name, formula):
        heads = {"q": 8, "kv": 2}
        spec = AttentionSpec(name="a", attention={"heads": heads, "head_dim": head_dim, "mask": mask})
        plans.append(solve(spec, ARCHS[target]))
    assert plans[0] == plans[1]
    assert render(plans[0]).text == render(plans[1]).text
    assert render_standalone(plans[0]) == render_standalone(plans[1])


@plans
def test_nothing_in_the_output_is_unused(plan: KernelPlan) -> None:
    code = re.sub(r"//[^\n]*", "", render(plan).text)
    declared = set(
        re.findall(r"\bk[A-Z]\w*(?= =)|(?<=using )\w+|(?<=const )\w+(?= =)|(?<=const auto )\w+", code)
    )
    assert declared, "the pattern no longer finds declarations"
    unused = {name for name in declared if len(re.findall(rf"\b{name}\b", code)) < 2}
    assert not unused


@plans
def test_output_is_clean_text(plan: KernelPlan) -> None:
    text = render(plan).text
    lines = text.split("\n")
    assert text.startswith(f"// {plan.kernel}\n") and text.endswith("}\n")
    assert "{{" not in re.sub(r"mask_\w+\(s\[i\], \{", "", text) and "{%" not in text
    assert [line for line in lines if line != line.rstrip() or "\t" in line] == []
    assert [line for line in lines if len(line) > 110] == []
    assert "\n\n\n" not in text


@plans
def test_headers_are_those_that_are_included(plan: KernelPlan) -> None:
    source = render(plan)
    included = set(re.findall(r'#include "([^"]+)"', source.text))
    for text in source.headers.values():
        included |= set(re.findall(r'#include "([^"]+)"', text))
    assert included == set(source.headers)


def test_standalone_holds_every_header_once() -> None:
    plan = sm80_plan()
    text = render_standalone(plan)
    assert '#include "' not in text and "#pragma once" not in text and "-I templates/device" not in text
    for name in render(plan).headers:
        assert text.count(f"// ---- {name} ----") == 1


def test_facts_enter_as_constants() -> None:
    text = render(sm80_plan((192, 128), 128, 64, 8, stages=2, group=2)).text
    for fact in (
        "kHeadDimQk = 192",
        "kHeadDimV = 128",
        "kGroup = 2",
        "kStages = 2",
        "kTileQ = 128",
        "kTileKv = 64",
    ):
        assert f"constexpr int {fact};" in text


@pytest.mark.parametrize("mask", ["full", "causal", "window1024", "future"])
def test_a_mask_prints_only_the_bounds_it_has(mask: str) -> None:
    text = render(sm80_plan(mask=mask)).text
    assert ("first_key" in text) == (mask in ("window1024", "future"))
    assert ("last_key" in text) == (mask in ("window1024", "causal"))


@pytest.mark.compiler
@plans
def test_compiles_without_spills(plan: KernelPlan) -> None:
    from flashgen.build import build

    resources = build(plan, cache=False).resources
    assert resources.spill_bytes == 0 and resources.stack_bytes == 0
    assert resources.smem_bytes == plan.smem_bytes


@pytest.mark.compiler
def test_standalone_compiles_alone() -> None:
    from flashgen.build import compile_source
    from flashgen.codegen import Source

    plan = sm80_plan(64)
    compile_source(Source(plan.kernel, render_standalone(plan), {}), plan.target)


@pytest.mark.compiler
def test_a_plan_with_other_shared_memory_than_the_kernel_does_not_compile() -> None:
    from flashgen.build import build

    plan = sm80_plan(64)
    with pytest.raises(BuildError, match="static assertion"):
        build(replace(plan, smem_bytes=plan.smem_bytes + 16), cache=False)
