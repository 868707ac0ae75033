"""`render`: a pure function from a plan to the text of its kernel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from flashgen.codegen.environment import environment, templates_dir

if TYPE_CHECKING:
    from flashgen.plan.model import KernelPlan

_INCLUDE = re.compile(r'^#include "([^"]+)"[^\n]*\n', re.MULTILINE)
_INCLUDE_PATH = " -I templates/device"  # in the line that says how to compile
_PRAGMA_ONCE = re.compile(r"^#pragma once\n+", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """A kernel as text."""

    name: str  # the extern "C" entry point
    text: str  # the .cu
    headers: Mapping[str, str]  # file name -> text, of every header that `text` includes, directly or not


def render(plan: KernelPlan) -> Source:
    """Print the kernel of a plan from ``templates/kernels/<family>/forward.cu.j2``.

    Pure: the same plan gives the same text, and nothing but the plan and the templates enters it.
    """
    text = environment().get_template(f"kernels/{plan.family}/forward.cu.j2").render(plan=plan)
    headers: dict[str, str] = {}
    _collect_headers(text, headers)
    return Source(name=plan.kernel, text=text, headers=dict(sorted(headers.items())))


def render_standalone(plan: KernelPlan) -> str:
    """The same kernel as one file that ``nvcc -arch=...`` compiles with no include path of ours."""
    source = render(plan)
    seen: set[str] = set()

    def amalgamate(text: str) -> str:
        return _INCLUDE.sub(replacement, text)

    def replacement(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return ""
        seen.add(name)
        return f"// ---- {name} ----\n" + amalgamate(_PRAGMA_ONCE.sub("", source.headers[name])) + "\n"

    return amalgamate(source.text).replace(_INCLUDE_PATH, "", 1)


def _collect_headers(text: str, headers: dict[str, str]) -> None:
    for name in _INCLUDE.findall(text):
        if name not in headers:
            headers[name] = _header(name)
            _collect_headers(headers[name], headers)


@cache
def _header(name: str) -> str:
    return (templates_dir() / "device" / name).read_text(encoding="utf-8")
