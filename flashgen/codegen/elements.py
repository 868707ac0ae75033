"""The mathematics of a plan, printed: what it reads, terms of a head, scores and masks of elements."""

from __future__ import annotations

import re
from functools import lru_cache

import sympy
from sympy import Add, Expr, Mul, S

from flashgen.codegen.extents import Extents
from flashgen.codegen.identifiers import identifier
from flashgen.codegen.levels import (
    FIRST_KV,
    PRODUCT,
    TANH,
    Inlined,
    Kind,
    Level,
    Levels,
    Scope,
    level_of,
    levelled,
)
from flashgen.codegen.parts import (
    Diagonal,
    Elements,
    Function,
    Keep,
    Ranges,
    Score,
    Search,
    Segment,
    Shared,
)
from flashgen.codegen.reads import C_TYPES, Reads
from flashgen.codegen.reals import ElementPrinter
from flashgen.plan.model import KernelPlan
from flashgen.plan.operations import distance_parts
from flashgen.spec import derivation
from flashgen.spec.affine import is_whole
from flashgen.spec.bounds import RowBounds
from flashgen.spec.inputs import TensorInput
from flashgen.spec.printer import to_text
from flashgen.spec.symbols import KV, SCALE, SCORE, SEQLEN_KV, SEQLEN_Q

PREPARE_THREADS = {"map": 512, "ranges": 128}
"""Threads of a block of the preparation kernel."""

_PARAMETERS = (  # of a printed function, by what its text holds
    (r"\bparams\b", "const AttentionParams &params"),
    (r"\bterms\b", "const HeadTerms &terms"),
    (r"\bquery\b", "const {query} &query"),
    (r"\brow\b", "const {row} &row"),
    (r"\bs\b", "float s"),
    (r"\bt\b", "float t"),
    (r"\bc\b", "int c"),
)


@lru_cache(maxsize=256)
def elements(plan: KernelPlan) -> Elements:
    """Print the mathematics of a plan, in two passes: the first finds what is needed more than once."""
    repeated = _Build(plan, frozenset()).repeated()
    return _Build(plan, repeated).elements


class _Build:
    def __init__(self, plan: KernelPlan, repeated: frozenset[tuple[sympy.Basic, Kind]]) -> None:
        self._plan = plan
        self._head = Scope("terms.")
        self._repeated = repeated
        self._levels: list[Levels] = []
        mask = plan.mask.derivation
        score = self._score() if plan.score.expr != SCORE else None
        keep = self._keep() if mask.route == "map" else None
        segments = tuple(self._segment(self._head, bounds) for bounds in mask.segments)
        self.elements = Elements(
            inputs=_inputs(plan),
            head_variables=tuple(self._head.values.values()),
            head_terms=tuple(self._head.members.values()),
            score=score,
            keep=keep,
            segments=segments,
            ranges=None if mask.ranges is None else self._ranges(mask.ranges),
            listed=plan.mask.listed,
            over=mask.over,
        )

    def repeated(self) -> frozenset[tuple[sympy.Basic, Kind]]:
        """What was needed more than once."""
        return frozenset(key for levels in self._levels for key, uses in levels.uses.items() if uses > 1)

    def _printer(self, head: Scope, query: Scope, row: Scope, *, pairs: bool = False) -> ElementPrinter:
        levels = Levels(head, query, row, self._repeated)
        self._levels.append(levels)
        plan = self._plan
        reads = Reads(plan.tensors, align=plan.align, pairs=pairs)
        extents = Extents(plan.parameters, plan.tensors)
        return ElementPrinter(levels, reads, extents, plan.parameters, plan.group)

    def _function(
        self,
        printer: ElementPrinter,
        name: str,
        returns: Kind,
        kind: str,
        expr: sympy.Basic,
        diagonals: tuple[Diagonal, ...] = (),
    ) -> Function:
        scope = printer.levels.begin_function()
        result = printer.value(expr, returns)
        variables = tuple(scope.values.values())
        text = " ".join([result, *(value.text for value in variables)])
        text = re.sub(r"\.\w+", "", text)  # members are no parameters
        parameters = [
            declaration.format(query=f"{kind}Query", row=f"{kind}Row")
            for pattern, declaration in _PARAMETERS
            if re.search(pattern, text)
        ]
        parameters += [
            f"{diagonal.function.returns} {diagonal.name}"
            for diagonal in diagonals
            if re.search(rf"\b{diagonal.name}\b", text)
        ]
        return Function(name, returns, tuple(parameters), variables, result)

    def _score(self) -> Score:
        printer = self._printer(self._head, Scope("query."), Scope("row."), pairs=True)
        expr, diagonals = self._diagonals(printer, self._plan.score.expr)
        argument, tanh, element, capped = None, None, None, False
        if (split := _split_tanh(expr)) is not None:
            inner, slope, factor, expr = split
            if inner != PRODUCT:
                argument = self._function(printer, "score_argument", "float", "Score", inner, diagonals)
            with printer.levels.inside("head"):
                text = f"scaled_tanh({printer.value(factor, 'float')}, {printer.value(slope, 'float')})"
            tanh = self._head.export("ScaledTanh", text, "bend")
            capped = inner == PRODUCT and expr == TANH and _is_positive(slope * factor)
        if expr != TANH:
            element = self._function(printer, "score_element", "float", "Score", expr, diagonals)
        return Score(
            text=to_text(self._plan.score.expr),
            query=_of_level(printer, "query"),
            row=_of_level(printer, "row"),
            pairs=tuple(pointer.removeprefix("row.") for pointer in printer.reads.paired),
            argument=argument,
            tanh=tanh,
            capped=capped,
            diagonals=diagonals,
            early=getattr(self._plan.schedule, "distance_terms", "late") == "early",
            element=element,
        )

    def _diagonals(self, printer: ElementPrinter, expr: Expr) -> tuple[Expr, tuple[Diagonal, ...]]:
        """The score, levelled, with symbols for its diagonals. Packed rows are not eight positions apart."""
        diagonals: list[Diagonal] = []
        symbols: dict[Expr, sympy.Symbol] = {}  # replaced together: a part may stand within another
        packed = getattr(self._plan.schedule, "pack_gqa", False)
        for found in () if packed else distance_parts(expr):
            part = levelled(found)
            name = f"diagonal{len(diagonals) + 1 if diagonals else ''}"
            whole: Kind = "int64_t" if printer.extents.wide(part) else "int"
            kind: Kind = whole if is_whole(part) else "float"
            printer.least_column = -8  # of the row above: see parts.Diagonal
            function = self._function(printer, f"score_{name}", kind, "Score", part)
            printer.least_column = 0
            diagonals.append(Diagonal(name, function))
            symbols[found] = sympy.Symbol(f"{name}'", **{"real" if kind == "float" else "integer": True})
            if kind != "float":
                printer.extents.define(symbols[found], part)
        return levelled(expr.xreplace(symbols)), tuple(diagonals)

    def _keep(self) -> Keep:
        printer = self._printer(self._head, Scope("query."), Scope("row."))
        residual = self._plan.mask.derivation.residual
        element = self._function(printer, "keep_element", "bool", "Keep", levelled(residual))
        return Keep(
            text=to_text(residual),
            query=_of_level(printer, "query"),
            row=_of_level(printer, "row"),
            element=element,
        )

    def _segment(self, head: Scope, bounds: RowBounds) -> Segment:
        ends = (None if end is None else self._end(head, end) for end in (bounds.first, bounds.last))
        return Segment(*ends)

    def _end(self, head: Scope, end: Expr) -> str:
        printer = self._printer(head, Inlined(""), Inlined(""))
        printer.row_leaves |= {SEQLEN_Q: "seqlen_q", SEQLEN_KV: "seqlen_kv"}
        with printer.levels.inside("row"):
            return printer.clamped(end, "int")

    def _ranges(self, ranges: derivation.Ranges) -> Ranges:
        head = Scope("")
        searches = tuple(
            Search(
                search.result.name,
                self._end(head, search.read.xreplace({KV: FIRST_KV})),
                search.relation,
                head.define("int", self._end(head, search.value), "value"),
            )
            for search in ranges.searches
        )
        interval = self._segment(head, ranges.bounds)
        return Ranges(tuple(head.values.values()), searches, interval)


def _of_level(printer: ElementPrinter, level: Level) -> Shared:
    scope = printer.levels.scopes[level]
    return Shared(tuple(scope.values.values()), tuple(scope.members.values()))


def _is_positive(factor: Expr) -> bool:
    """For every positive scale."""
    return bool(factor.xreplace({SCALE: sympy.Dummy(positive=True)}).is_positive)


def _split_tanh(expr: Expr) -> tuple[Expr, Expr, Expr, Expr] | None:
    """(x, k, a, rest) where ``expr`` is `rest` with ``a * tanh(k * x)`` for `TANH`; k and a are of the head.

    None unless there is one tanh of the score, and no score outside of it.
    """
    nodes = [node for node in expr.atoms(sympy.tanh) if node.has(PRODUCT)]
    if len(nodes) != 1:
        return None
    rest = expr.xreplace({nodes[0]: TANH})
    if rest.has(PRODUCT):
        return None
    outer, inner = _of_head(Mul.make_args(nodes[0].args[0]))
    terms = [term for term in Add.make_args(rest) if term.has(TANH)]
    if len(terms) == 1 and TANH in Mul.make_args(terms[0]):
        factors, others = _of_head(Mul.make_args(terms[0]))
        if others == [TANH]:
            return Mul(*inner), Mul(*outer), Mul(*factors), rest - terms[0] + TANH
    return Mul(*inner), Mul(*outer), S.One, rest


def _of_head(factors: tuple[Expr, ...]) -> tuple[list[Expr], list[Expr]]:
    """`factors` in those that all elements of a head share, and the others."""
    shared = [factor for factor in factors if level_of(factor) in ("constant", "head")]
    return shared, [factor for factor in factors if factor not in shared]


def _inputs(plan: KernelPlan) -> tuple[str, ...]:
    """Members of `Inputs`: pointers, strides, integers, floats; what the launch writes, in that order."""
    route = plan.mask.derivation.route
    members = [_pointer(tensor) for tensor in plan.tensors]
    if plan.sink:
        members.append("const float *sink;  // [heads_q]")
    if route == "ranges":
        members.append("int *key_first, *key_last;  // of each row, prepared")
    if route == "map":
        members.append("int *tile_counts;  // key tiles that each q tile visits, prepared")
        members.append("int *tile_list;  // and which: 2 * tile + masked, ascending")
    for tensor in plan.tensors:
        if len(tensor.index) > 1:
            stride = identifier(tensor.name + "_stride")
            members.append(f"int64_t {stride}[{len(tensor.index) - 1}];")
    members += [f"int {identifier(p.name)};" for p in plan.parameters if p.kind == "int"]
    members += [f"float {identifier(p.name)};" for p in plan.parameters if p.kind == "float"]
    return tuple(members)


def _pointer(tensor: TensorInput) -> str:
    axes = ", ".join(map(str, tensor.index))
    return f"const {C_TYPES[tensor.dtype]} *{identifier(tensor.name)};  // [{axes}]"


__all__ = ["PREPARE_THREADS", "elements"]
