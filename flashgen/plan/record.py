"""Plans as plain data: what manifests hold and `--json` prints. JSON-safe, equal after a round trip.

Expressions are text of the spec's language, read back by its grammar.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, get_args

import sympy

from flashgen.errors import FlashgenError, PlanError
from flashgen.plan.model import (
    Explanation,
    KernelPlan,
    MaskPlan,
    ScorePlan,
    Sm80Schedule,
    Sm90Schedule,
)
from flashgen.spec.bounds import RowBounds
from flashgen.spec.derivation import MaskDerivation, Ranges, Route, Search, prepared_bounds
from flashgen.spec.expression import Kind, parse_expression
from flashgen.spec.inputs import RuntimeParameter, TensorInput
from flashgen.spec.printer import to_text
from flashgen.spec.symbols import MASK_VARIABLES, SCORE_VARIABLES

_SCHEDULES: Mapping[str, type[Sm80Schedule] | type[Sm90Schedule]] = {
    "sm80": Sm80Schedule,
    "sm90": Sm90Schedule,
}
_OWN = ("mask", "score", "tensors", "parameters", "schedule", "why")  # fields that are not plain data


def plan_to_dict(plan: KernelPlan) -> dict[str, Any]:
    """Every field of the plan; expressions as text, null for no bound."""
    data = {f.name: getattr(plan, f.name) for f in fields(plan) if f.name not in _OWN}
    why = plan.why
    return data | {
        "kernel": plan.kernel,
        "mask": _mask_to_dict(plan.mask),
        "score": {"label": plan.score.label, "expr": to_text(plan.score.expr)},
        "tensors": [asdict(tensor) | {"index": list(tensor.index)} for tensor in plan.tensors],
        "parameters": [asdict(parameter) for parameter in plan.parameters],
        "schedule": asdict(plan.schedule),
        "why": {
            "origin": why.origin,
            "binding": why.binding,
            "slack": [list(pair) for pair in why.slack],
            "rejected": [list(pair) for pair in why.rejected],
            "cost": [list(pair) for pair in why.cost],
            "measured": [list(pair) for pair in why.measured],
        },
    }


def plan_from_dict(data: Mapping[str, Any]) -> KernelPlan:
    """The plan that `KernelPlan.to_dict` wrote.

    Raises:
        PlanError: a field is missing, unknown or malformed. Text in it is parsed by the spec's own grammar.
    """
    try:
        rest = dict(data)
        kernel = rest.pop("kernel", None)
        mask, score, why = rest.pop("mask"), rest.pop("score"), rest.pop("why", {})
        schedule = _SCHEDULES[data["family"]](**rest.pop("schedule"))
        tensors = tuple(TensorInput(**t | {"index": tuple(t["index"])}) for t in rest.pop("tensors"))
        parameters = tuple(RuntimeParameter(**p) for p in rest.pop("parameters"))
        language = _Language(tensors, parameters)
        plan = KernelPlan(
            **rest,
            mask=language.mask(mask),
            score=ScorePlan(score["label"], language.score(score["expr"])),
            tensors=tensors,
            parameters=parameters,
            schedule=schedule,
            why=Explanation(
                origin=why.get("origin", "solved"),
                binding=why.get("binding", ""),
                slack=tuple((str(a), str(b)) for a, b in why.get("slack", ())),
                rejected=tuple((str(a), str(b)) for a, b in why.get("rejected", ())),
                cost=tuple((str(a), float(b)) for a, b in why.get("cost", ())),
                measured=tuple((str(a), str(b)) for a, b in why.get("measured", ())),
            ),
        )
    except (KeyError, TypeError, ValueError, AttributeError, FlashgenError) as error:
        raise PlanError(f"not a plan: {type(error).__name__}: {error}") from error
    if kernel not in (None, plan.kernel):
        raise PlanError(f"not a plan: it calls itself {kernel!r}, but its fields spell {plan.kernel!r}")
    return plan


def _bounds_to_dict(bounds: RowBounds) -> dict[str, str | None]:
    ends = {"first": bounds.first, "last": bounds.last}
    return {name: None if end is None else to_text(end) for name, end in ends.items()}


def _mask_to_dict(mask: MaskPlan) -> dict[str, Any]:
    derived = mask.derivation
    data: dict[str, Any] = {
        "label": mask.label,
        "condition": to_text(mask.condition),
        "route": derived.route,
        "over": sorted(derived.over),
    }
    if derived.ranges is not None:
        searches = [
            {
                "result": s.result.name,
                "read": to_text(s.read),
                "relation": s.relation,
                "value": to_text(s.value),
            }
            for s in derived.ranges.searches
        ]
        return data | {"searches": searches, "ranges": _bounds_to_dict(derived.ranges.bounds)}
    segments = [_bounds_to_dict(segment) for segment in derived.segments]
    return data | {"segments": segments, "residual": to_text(derived.residual)}


class _Language:
    """Reads a plan's expressions back, with the names that it declares."""

    def __init__(self, tensors: tuple[TensorInput, ...], parameters: tuple[RuntimeParameter, ...]) -> None:
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self.parameters = {parameter.name: parameter.symbol for parameter in parameters}

    def score(self, text: str) -> sympy.Expr:
        return self._parse(text, {**SCORE_VARIABLES, **self.parameters}, Kind.REAL)

    def mask(self, data: Mapping[str, Any]) -> MaskPlan:
        names = {**MASK_VARIABLES, **self.parameters}
        condition = self._parse(data["condition"], names, Kind.BOOLEAN)
        over = frozenset(data["over"])
        if data["route"] not in get_args(Route):
            raise ValueError(f"there is no route {data['route']!r}")
        if data["route"] == "ranges":
            searches = tuple(
                Search(
                    sympy.Symbol(search["result"], integer=True),
                    self._parse(search["read"], names, Kind.INTEGER),
                    search["relation"],
                    self._parse(search["value"], names, Kind.INTEGER),
                )
                for search in data["searches"]
            )
            found = {search.result.name: search.result for search in searches}
            ranges = Ranges(searches, self._bounds(data["ranges"], {**names, **found}))
            derived = MaskDerivation("ranges", (prepared_bounds(over),), over=over, ranges=ranges)
        else:
            segments = tuple(self._bounds(segment, names) for segment in data["segments"])
            residual = self._parse(data["residual"], names, Kind.BOOLEAN)
            derived = MaskDerivation(data["route"], segments, residual, over)
        return MaskPlan(data["label"], condition, derived)

    def _bounds(self, data: Mapping[str, str | None], names: Mapping[str, sympy.Expr]) -> RowBounds:
        first, last = (
            None if (text := data[end]) is None else self._parse(text, names, Kind.INTEGER)
            for end in ("first", "last")
        )
        return RowBounds(first, last)

    def _parse(self, text: str, names: Mapping[str, sympy.Expr], expect: Kind) -> sympy.Basic:
        return parse_expression(text, names=names, tensors=self.tensors, expect=expect)
