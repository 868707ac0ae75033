"""Plans as plain data: what manifests hold and `--json` prints. JSON-safe, equal after a round trip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import sympy

from flashgen.errors import FlashgenError, PlanError
from flashgen.plan.model import Explanation, KernelPlan, MaskPlan, Sm80Schedule, Sm90Schedule
from flashgen.spec.bounds import SEQLEN_KV, SEQLEN_Q, Q, RowBounds
from flashgen.spec.expression import Kind, parse_expression

_SCHEDULES: Mapping[str, type[Sm80Schedule] | type[Sm90Schedule]] = {
    "sm80": Sm80Schedule,
    "sm90": Sm90Schedule,
}
_NAMES = {symbol.name: symbol for symbol in (Q, SEQLEN_Q, SEQLEN_KV)}


def plan_to_dict(plan: KernelPlan) -> dict[str, Any]:
    """Every field of the plan; bounds as text of the spec's expression language, null for no bound."""
    data = {f.name: getattr(plan, f.name) for f in fields(plan) if f.name not in ("mask", "schedule", "why")}
    bounds = plan.mask.bounds
    why = plan.why
    return data | {
        "kernel": plan.kernel,
        "mask": {
            "label": plan.mask.label,
            "first": None if bounds.first is None else bound_text(bounds.first),
            "last": None if bounds.last is None else bound_text(bounds.last),
        },
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
        mask, why = rest.pop("mask"), rest.pop("why", {})
        schedule = _SCHEDULES[data["family"]](**rest.pop("schedule"))
        plan = KernelPlan(
            **rest,
            mask=MaskPlan(mask["label"], RowBounds(_bound(mask["first"]), _bound(mask["last"]))),
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


def bound_text(expr: sympy.Expr) -> str:
    """A row bound in the spec's expression language: ``max(q - 4095, 0)``, ``8*(q // 8)``."""
    if isinstance(expr, sympy.Symbol | sympy.Integer):
        return str(expr)
    if isinstance(expr, sympy.floor):
        numerator, denominator = sympy.fraction(sympy.together(expr.args[0]))
        return f"(({bound_text(numerator)}) // {bound_text(denominator)})"
    if isinstance(expr, sympy.Max | sympy.Min):
        name = "max" if isinstance(expr, sympy.Max) else "min"
        return f"{name}({', '.join(sorted(map(bound_text, expr.args)))})"
    if isinstance(expr, sympy.Add):
        return "(" + " + ".join(sorted(map(bound_text, expr.args))) + ")"
    if isinstance(expr, sympy.Mul):
        return "(" + " * ".join(sorted(map(bound_text, expr.args))) + ")"
    raise TypeError(f"no text for the bound {expr}")


def _bound(text: str | None) -> sympy.Expr | None:
    return None if text is None else parse_expression(text, names=_NAMES, expect=Kind.INTEGER)
