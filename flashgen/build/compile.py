"""`build`: plan -> cubin, through the disk cache."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Literal

from flashgen.build import artifact, compiler, elf, nvrtc
from flashgen.build.artifact import Cubin
from flashgen.build.cache import cache_key, lookup, publish
from flashgen.build.resources import mismatches, parse_log
from flashgen.codegen import Source, render
from flashgen.errors import BuildError
from flashgen.plan.model import KernelPlan


class PlanMismatchWarning(UserWarning):
    """A kernel is right, but slower than its plan promised: it spills, or fewer blocks fit."""


def build(plan: KernelPlan, *, cache: bool = True, on_mismatch: Literal["warn", "raise"] = "warn") -> Cubin:
    """Render and compile a plan, or take it from the cache.

    With ``cache=False`` nothing is read from disk or written to it, and `Cubin.path` is `None`. A kernel that
    spills or takes other resources than its plan says gives a `PlanMismatchWarning`, or with
    ``on_mismatch="raise"`` a `BuildError`.
    """
    source = render(plan)
    cubin = _cached(source, plan) if cache else _compiled(source, plan)
    problems = mismatches(plan, cubin.resources)
    if problems and on_mismatch == "raise":
        raise BuildError(problems)
    for problem in problems:
        warnings.warn(str(problem), PlanMismatchWarning, stacklevel=2)
    return cubin


def compile_source(source: Source, target: str, *, dynamic_smem: int = 0) -> Cubin:
    """Compile any source for `target`, without cache or plan; `dynamic_smem` bytes are added to the resource
    report.

    Raises `BuildError` with the compiler's errors, each at its line of the source.
    """
    chosen = nvrtc.options(source, target)
    compilation = nvrtc.compile_to_cubin(source, chosen)
    seconds = round(compilation.seconds, 3)
    resources = parse_log(compilation.log, source.name, dynamic_smem=dynamic_smem, compile_s=seconds)
    if resources is None:
        resources = elf.resources(
            compilation.binary, source.name, dynamic_smem=dynamic_smem, compile_s=seconds
        )
    manifest = artifact.describe(source, target, chosen, resources, nvrtc.compiler_id())
    return Cubin(compilation.binary, source, target, resources, manifest)


def _compiled(source: Source, plan: KernelPlan) -> Cubin:
    cubin = compile_source(source, plan.target, dynamic_smem=plan.smem_bytes)
    return replace(cubin, manifest={**cubin.manifest, "plan": plan.to_dict()})


def _cached(source: Source, plan: KernelPlan) -> Cubin:
    options = nvrtc.options(source, plan.target)
    believed = compiler.compiler_id()
    if found := lookup(cache_key(source, options, believed)):
        return found
    cubin = _compiled(source, plan)
    actual = str(cubin.manifest["compiler"])
    if actual != believed:
        compiler.remember(actual)
    return publish(cache_key(source, options, actual), cubin)


__all__ = ["PlanMismatchWarning", "build", "compile_source"]
