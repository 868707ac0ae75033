"""spec + arch -> `KernelPlan`: on-chip constraints, the I/O and cost models, the solver."""

from __future__ import annotations

from flashgen.plan.cost import Cost
from flashgen.plan.io import IoModel
from flashgen.plan.model import (
    Explanation,
    KernelPlan,
    MaskPlan,
    ScorePlan,
    Sm80Schedule,
    Sm90Schedule,
)
from flashgen.plan.record import plan_from_dict
from flashgen.plan.solver import Candidate, Ranking, rank, solve, validate
from flashgen.plan.workload import Workload

__all__ = [
    "Candidate",
    "Cost",
    "Explanation",
    "IoModel",
    "KernelPlan",
    "MaskPlan",
    "Ranking",
    "ScorePlan",
    "Sm80Schedule",
    "Sm90Schedule",
    "Workload",
    "plan_from_dict",
    "rank",
    "solve",
    "validate",
]
