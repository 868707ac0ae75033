"""From a mask's condition to what kernels skip and mask by: the mask's route.

`bounds`: the kept keys of every row are a union of a few intervals, whose ends are expressions. `ranges`: one
interval, whose ends a preparation kernel finds by binary search in a sorted tensor. `map`: anything else; a
preparation kernel evaluates the condition and lists the tiles to visit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import sympy
from sympy import Expr
from sympy.logic.boolalg import Boolean

from flashgen.spec.bounds import RowBounds, derive_bounds
from flashgen.spec.inputs import RuntimeParameter, TensorInput
from flashgen.spec.symbols import BATCH, HEAD, HEAD_KV, Q

Route = Literal["bounds", "ranges", "map"]


@dataclass(frozen=True)
class Search:
    """The least kv whose element of a sorted tensor is at least `value`; seqlen_kv where there is none.

    `read` is the element at `KV`, as in the condition: ``doc(BATCH, KV)``. `value` is an expression in `Q`
    that never falls as q grows. `result` is the symbol that stands for the key found.
    """

    result: sympy.Symbol
    read: Expr
    value: Expr


@dataclass(frozen=True)
class Ranges:
    """What the preparation kernel of the route `ranges` writes for each row into `key_first` and `key_last`.

    The ends of `bounds` hold the results of the searches. `key_first` is clamped to [0, seqlen_kv] and
    `key_last` to [-1, seqlen_kv - 1] when they are written.
    """

    searches: tuple[Search, ...]
    bounds: RowBounds


@dataclass(frozen=True)
class MaskDerivation:
    """Which keys each row keeps, as far as intervals say it.

    `segments`: for `bounds` and `ranges` the kept keys are exactly their union; for `map` there is one, and
    a row keeps nothing outside of it. Both ends of each are nondecreasing in q. The firsts of those that
    are not empty ascend. `residual` is what the segments leave to be tested element by element: true but for
    `map`. `over`: which of "batch" and "head" the condition depends on.
    """

    route: Route
    segments: tuple[RowBounds, ...]
    residual: Boolean = sympy.true
    over: frozenset[str] = frozenset()
    ranges: Ranges | None = None  # of the route `ranges`


def derive_mask(
    condition: Boolean, *, inputs: Sequence[TensorInput] = (), runtime: Sequence[RuntimeParameter] = ()
) -> MaskDerivation:
    """Find the cheapest route for a mask's condition.

    `inputs` and `runtime` are the tensors and runtime parameters that it may read.
    """
    return MaskDerivation("bounds", (derive_bounds(condition),), over=depends_on(condition))


def prepared_bounds(over: frozenset[str]) -> RowBounds:
    """The ends as the preparation kernel of the route `ranges` leaves them: ``key_first[batch, head, q]``.

    Those of the axes that the condition depends on, and always q.
    """
    subscripts = [*(s for axis, s in (("batch", BATCH), ("head", HEAD)) if axis in over), Q]
    first, last = (sympy.Function(name, integer=True)(*subscripts) for name in ("key_first", "key_last"))
    return RowBounds(first, last)


def depends_on(condition: sympy.Basic) -> frozenset[str]:
    """Which of "batch" and "head" the expression varies with; `head_kv` varies with the head."""
    free = condition.free_symbols
    names = {"batch"} if BATCH in free else set()
    return frozenset(names | ({"head"} if HEAD in free or HEAD_KV in free else set()))


__all__ = ["MaskDerivation", "Ranges", "Route", "Search", "depends_on", "derive_mask", "prepared_bounds"]
