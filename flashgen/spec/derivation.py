"""From a mask's condition to what kernels skip and mask by: the mask's route.

`bounds`: the kept keys of every row are a union of a few intervals, whose ends are expressions. `ranges`: one
interval, whose ends a preparation kernel finds by binary search in a sorted tensor. `map`: anything else; a
preparation kernel evaluates the condition and lists the tiles to visit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from typing import Literal

import sympy
from sympy import And, Expr, Max, Min, Not, Piecewise, S
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from flashgen.spec.affine import Budget, Prover, TooManyCasesError
from flashgen.spec.bounds import (
    EVERYTHING,
    AllOf,
    AnyOf,
    ConditionReader,
    Guard,
    RowBounds,
    Search,
    Tree,
)
from flashgen.spec.inputs import RuntimeParameter, TensorInput
from flashgen.spec.symbols import BATCH, HEAD, HEAD_KV, KV, SEQLEN_KV, SEQLEN_Q, Q
from flashgen.spec.values import has_large_integer

Route = Literal["bounds", "ranges", "map"]

MAX_SEGMENTS = 4
MAX_BOXES = 24  # of a condition in disjunctive form, before those that touch are joined
PROOF_STEPS = 1000  # a millisecond each
HULL_STEPS = 500  # once those are spent
SETTLING_STEPS = 300  # what holds of all elements is mostly simple


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
    condition: Boolean,
    *,
    align: Literal["bottom_right", "top_left"] = "bottom_right",
    inputs: Sequence[TensorInput] = (),
    runtime: Sequence[RuntimeParameter] = (),
) -> MaskDerivation:
    """Find the cheapest route for a mask's condition.

    `inputs` and `runtime` are the tensors and runtime parameters that it may read; `align` says at which
    positions the rows are. Every condition has a
    route: what cannot be proven, or not within a budget of steps, goes by the map.
    """
    least = {p.symbol: p.least for p in runtime if p.kind == "int" and p.least is not None}
    sorted_reads = [tensor.name for tensor in inputs if tensor.sorted]
    prover = Prover(least, sorted_reads, Budget(PROOF_STEPS))
    last = SEQLEN_KV - 1
    rows = (last - SEQLEN_Q + 1, last) if align == "bottom_right" else (S.Zero, SEQLEN_Q - 1)
    of_elements = Prover(least, sorted_reads, Budget(SETTLING_STEPS), {Q: rows, KV: (S.Zero, last)})
    derivation = _Derivation(prover, ConditionReader(prover, of_elements), depends_on(condition))
    normal = sympy.to_nnf(condition, simplify=False)
    try:
        return derivation.intervals(normal)
    except (_NotIntervalsError, TooManyCasesError):
        prover.budget = Budget(HULL_STEPS)
        return derivation.map(normal)


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


class _NotIntervalsError(Exception):
    """The kept keys are not known to be a few intervals with ends that never move back."""


@dataclass(frozen=True)
class _Box:
    """Keys from the greatest of `firsts` to the least of `lasts`, in rows where all guards hold."""

    firsts: tuple[Expr, ...] = ()
    lasts: tuple[Expr, ...] = ()
    guards: frozenset[Guard] = frozenset()

    @cached_property  # sympy compares the ends of a Max pair by pair
    def first(self) -> Expr | None:
        return Max(*self.firsts) if self.firsts else None

    @cached_property
    def last(self) -> Expr | None:
        return Min(*self.lasts) if self.lasts else None


class _Derivation:
    def __init__(self, prover: Prover, reader: ConditionReader, over: frozenset[str]) -> None:
        self.prove = prover
        self.reader = reader
        self.over = over

    # -- a union of intervals

    def intervals(self, condition: Boolean) -> MaskDerivation:
        boxes = self.boxes(self.reader.read(condition))
        if len(boxes) > MAX_SEGMENTS or not all(self.moves_forward(box) for box in boxes):
            raise _NotIntervalsError
        segments = tuple(self.segment(box) for box in self.ascending(boxes))
        ends = [end for segment in segments for end in (segment.first, segment.last) if end is not None]
        if any(map(self.is_beyond_kernels, ends)):
            raise _NotIntervalsError
        if not any(self.needs_preparation(end) for end in ends):
            return MaskDerivation("bounds", segments or (RowBounds(None, S.NegativeOne),), over=self.over)
        if len(segments) > 1:
            raise _NotIntervalsError
        used = {symbol for end in ends for symbol in end.free_symbols}
        searches = tuple(s for s in self.reader.searches.values() if s.result in used)
        ranges = Ranges(searches, segments[0])
        return MaskDerivation("ranges", (prepared_bounds(self.over),), over=self.over, ranges=ranges)

    def boxes(self, tree: Tree) -> list[_Box]:
        """The disjunctive form, boxes that touch joined."""
        match tree:
            case RowBounds(first=first, last=last):
                return [_Box(() if first is None else (first,), () if last is None else (last,))]
            case Guard():
                return [_Box(guards=frozenset({tree}))]
            case AnyOf(parts=parts):
                return self.joined([box for part in parts for box in self.boxes(part)])
            case AllOf(parts=parts):
                crossed = [_Box()]
                for part in parts:
                    pairs = product(crossed, self.boxes(part))
                    crossed = self.joined([box for a, b in pairs if (box := self.both(a, b)) is not None])
                return crossed
        raise _NotIntervalsError

    def both(self, a: _Box, b: _Box) -> _Box | None:
        """The intersection; None where it is known to be empty."""
        guards = a.guards | b.guards
        conditions = {guard.condition for guard in guards}
        if any(Not(condition) in conditions for condition in conditions):
            return None
        firsts = self.strictest(tuple(dict.fromkeys(a.firsts + b.firsts)), sign=1)
        lasts = self.strictest(tuple(dict.fromkeys(a.lasts + b.lasts)), sign=-1)
        if any(self.prove.positive(first - last) for first, last in product(firsts, lasts)):
            return None
        return _Box(firsts, lasts, guards)

    def strictest(self, ends: tuple[Expr, ...], *, sign: int) -> tuple[Expr, ...]:
        """Without those that another end makes no difference to."""
        kept = list(ends)
        for end in ends:
            if any(other != end and self.prove.nonnegative(sign * (other - end)) for other in kept):
                kept.remove(end)
        return tuple(kept)

    def joined(self, boxes: list[_Box]) -> list[_Box]:
        """The same keys in fewer boxes."""
        pending = list(dict.fromkeys(boxes))
        if len(pending) > MAX_BOXES:
            raise _NotIntervalsError
        while True:
            for a, b in combinations(pending, 2):
                joined = self.join(a, b) or self.join(b, a)
                if joined is not None:
                    pending = [box for box in pending if box not in (a, b)] + [joined]
                    break
            else:
                return pending

    def join(self, a: _Box, b: _Box) -> _Box | None:
        """One box with the keys of both, where `a` has no guard that `b` lacks; None where none is known."""
        common = a.guards & b.guards
        only_a, only_b = a.guards - common, b.guards - common
        if len(only_a) == len(only_b) == 1:
            return self.alternative(a, b, common, *only_a, *only_b)
        if only_a or any(guard.slope != 0 for guard in only_b):
            return None
        if not (self.begins_within(a, b) and self.begins_within(b, a)):
            return None
        # Two intervals without a gap between them: their hull is their union, even where one is empty.
        test = And(*[guard.condition for guard in only_b])
        first = self.farther(a.first, b.first, test, sign=-1)
        last = self.farther(a.last, b.last, test, sign=1)
        return _Box(() if first is None else (first,), () if last is None else (last,), common)

    def alternative(
        self, a: _Box, b: _Box, common: frozenset[Guard], guard: Guard, other: Guard
    ) -> _Box | None:
        """Of two boxes that are never there together: heads with one mask, and heads with another."""
        if guard.slope or other.slope or guard.condition != Not(other.condition):
            return None
        first = (S.Zero if a.first is None else a.first), (S.Zero if b.first is None else b.first)
        end = SEQLEN_KV - 1
        last = (end if a.last is None else a.last), (end if b.last is None else b.last)
        firsts = () if a.first is b.first is None else (where(guard.condition, *first),)
        lasts = () if a.last is b.last is None else (where(guard.condition, *last),)
        return _Box(firsts, lasts, common)

    def begins_within(self, a: _Box, b: _Box) -> bool:
        """Does `a` begin at most one key past the end of `b`, for every q and all lengths?"""
        return a.first is None or b.last is None or self.prove.nonnegative(b.last + 1 - a.first)

    def farther(self, a: Expr | None, b: Expr | None, test: Boolean, *, sign: int) -> Expr | None:
        """The end of a join: the greater one for a sign of 1, else the lesser; `b` counts where `test`."""
        if a is None or (b is not None and self.prove.nonnegative(sign * (a - b))):
            return a
        if test == sympy.true:
            if b is None or self.prove.nonnegative(sign * (b - a)):
                return b
            return (Max if sign > 0 else Min)(a, b)
        if b is None:
            return where(test, SEQLEN_KV - 1 if sign > 0 else S.Zero, a)
        if self.prove.nonnegative(sign * (b - a)):
            return where(test, b, a)
        return (Max if sign > 0 else Min)(a, where(test, b, a))

    def moves_forward(self, box: _Box) -> bool:
        return all(self.prove.nondecreasing_in_q(end) for end in (*box.firsts, *box.lasts))

    def ascending(self, boxes: list[_Box]) -> list[_Box]:
        """In the order of their firsts."""
        pending, ordered = list(boxes), []
        while pending:
            least = next(
                (a for a in pending if all(a is b or self.begins_before(a, b) for b in pending)), None
            )
            if least is None:
                raise _NotIntervalsError
            pending.remove(least)
            ordered.append(least)
        return ordered

    def begins_before(self, a: _Box, b: _Box) -> bool:
        if a.first is None or b.first is None:
            return a.first is None
        return self.prove.nonnegative(b.first - a.first)

    def segment(self, box: _Box) -> RowBounds:
        """Guards empty a row by an end that never moves back: the last before they hold, else the first."""
        first, last = box.first, box.last
        if ceasing := [guard.condition for guard in box.guards if guard.slope > 0]:
            first = where(And(*ceasing), S.Zero if first is None else first, SEQLEN_KV)
        if others := [guard.condition for guard in box.guards if guard.slope <= 0]:
            last = where(And(*others), SEQLEN_KV - 1 if last is None else last, S.NegativeOne)
        return RowBounds(first, last)

    def needs_preparation(self, end: Expr) -> bool:
        """Whether an end is found by a search, or reads a tensor at the row's position."""
        if end.has(*[search.result for search in self.reader.searches.values()]):
            return True
        return any(self.prove.depends_on_q(read) for read in end.atoms(AppliedUndef))

    def is_beyond_kernels(self, end: Expr) -> bool:
        """Whether it, or what it is searched by, holds constants that int32 does not."""
        searched = [s.value for s in self.reader.searches.values() if end.has(s.result)]
        return any(map(has_large_integer, (end, *searched)))

    # -- the map

    def map(self, condition: Boolean) -> MaskDerivation:
        """The hull of what is kept, and the conjuncts that it does not say."""
        firsts: list[Expr] = []
        lasts: list[Expr] = []
        residual: list[Boolean] = []
        for part in And.make_args(condition):
            try:
                hull, exact = self.hull_of(part)
            except TooManyCasesError:
                hull, exact = RowBounds(None, None), False
            firsts += () if hull.first is None else (hull.first,)
            lasts += () if hull.last is None else (hull.last,)
            residual += () if exact else (part,)
        try:
            firsts = list(self.strictest(tuple(dict.fromkeys(firsts)), sign=1))
            lasts = list(self.strictest(tuple(dict.fromkeys(lasts)), sign=-1))
        except TooManyCasesError:
            pass
        box = _Box(tuple(firsts), tuple(lasts))
        return MaskDerivation("map", (RowBounds(box.first, box.last),), And(*residual), self.over)

    def hull_of(self, part: Boolean) -> tuple[RowBounds, bool]:
        """Of one conjunct, and whether it says no more than that."""
        tree = self.reader.read(part)
        if tree == EVERYTHING:
            return RowBounds(None, None), True
        try:
            boxes = self.boxes(tree)
        except _NotIntervalsError:
            boxes = []
        if len(boxes) == 1 and not boxes[0].guards:
            whole = RowBounds(boxes[0].first, boxes[0].last)
            usable = RowBounds(self.usable(whole.first), self.usable(whole.last))
            return usable, usable == whole
        hull = self.hull(tree)
        return RowBounds(self.usable(hull.first), self.usable(hull.last)), False

    def hull(self, tree: Tree) -> RowBounds:
        match tree:
            case RowBounds():
                return tree
            case AllOf(parts=parts):
                hulls = [self.hull(part) for part in parts]
                firsts = [end for hull in hulls if (end := self.usable(hull.first)) is not None]
                lasts = [end for hull in hulls if (end := self.usable(hull.last)) is not None]
                return RowBounds(Max(*firsts) if firsts else None, Min(*lasts) if lasts else None)
            case AnyOf(parts=parts) if parts:
                hulls = [self.hull(part) for part in parts]
                ends = [hull.first for hull in hulls], [hull.last for hull in hulls]
                return RowBounds(
                    None if None in ends[0] else Min(*ends[0]), None if None in ends[1] else Max(*ends[1])
                )
        return RowBounds(None, None)

    def usable(self, end: Expr | None) -> Expr | None:
        """The end, where the map's kernel can have it."""
        if end is None or self.needs_preparation(end) or self.is_beyond_kernels(end):
            return None
        if not self.prove.nondecreasing_in_q(end):
            return None
        return end


def where(test: Boolean, then: Expr, otherwise: Expr) -> Expr:
    """A choice, unevaluated as the parser's: sympy takes time without bound over nested ones."""
    if then == otherwise or test == sympy.true:
        return then
    return Piecewise((then, test), (otherwise, True), evaluate=False)


__all__ = ["MaskDerivation", "Ranges", "Route", "Search", "depends_on", "derive_mask", "prepared_bounds"]
