"""The mathematics of a plan as a template prints it: inputs, terms of a head, scores and masks of elements."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import sympy
from sympy import Expr, Mul, S
from sympy.core.function import AppliedUndef

from flashgen.codegen.expression import LevelPrinter
from flashgen.codegen.levels import (
    FIRST_KV,
    PRODUCT,
    TANH,
    Kind,
    Levels,
    Scope,
    Value,
    distance_only,
    identifier,
    level_of,
    levelled,
)
from flashgen.codegen.reads import C_TYPES, Reads
from flashgen.codegen.printer import bracketed
from flashgen.plan.model import KernelPlan
from flashgen.spec import derivation
from flashgen.spec.affine import is_whole
from flashgen.spec.bounds import RowBounds
from flashgen.spec.functions import sigmoid
from flashgen.spec.inputs import TensorInput
from flashgen.spec.symbols import KV, SCORE, SEQLEN_KV, SEQLEN_Q

PREPARE_THREADS = {"map": 512, "ranges": 128}
"""Threads of a block of the preparation kernel."""

_COLUMNS = 110  # of a line of printed code

_COSTLY = (AppliedUndef, sympy.tanh, sympy.exp, sympy.log, sigmoid, sympy.Pow, sympy.floor)
_HEADERS = {  # by the functions that they hold
    "elementary.cuh": r"\b(scaled_tanh|tanh_approx|log2_approx|r?sqrt_approx)\b",
    "read.cuh": r"\bread\(",
}
_PARAMETERS = (  # of a printed function, by what its text holds
    (r"\bparams\b", "const AttentionParams &params"),
    (r"\bterms\b", "const HeadTerms &terms"),
    (r"\brow\b", "const {row} &row"),
    (r"\bs\b", "float s"),
    (r"\bt\b", "float t"),
    (r"\bc\b", "int c"),
)


@dataclass(frozen=True)
class Function:
    """A printed function of one element: `variables`, then the value it returns."""

    name: str
    returns: str
    parameters: tuple[str, ...]  # declarations
    variables: tuple[Value, ...]
    result: str

    @property
    def edges(self) -> bool:
        """Whether it is a template over kEdge: tiles at an edge keep their reads inside of the tensors."""
        return any("kEdge" in text for text in (self.result, *(value.text for value in self.variables)))

    def call(self, **arguments: str) -> str:
        """The call with `arguments` for the parameters of those names; the others are passed under their own."""
        names = [re.split(r"[ &]", parameter)[-1] for parameter in self.parameters]
        passed = ", ".join(arguments.get(name, name) for name in names)
        return f"{self.name}{'<kEdge>' if self.edges else ''}({passed})"


@dataclass(frozen=True)
class Row:
    """The struct of what is known of one row in one tile, and the variables it is computed with."""

    variables: tuple[Value, ...]
    members: tuple[Value, ...]


@dataclass(frozen=True)
class Diagonal:
    """A part of a score that depends on q - kv alone: row r + 8 has at column c what row r has at column c - 8."""

    name: str  # of the score's parameter
    function: Function

    @property
    def array(self) -> str:
        """The variable that holds it for four elements."""
        return f"{self.name}s"


@dataclass(frozen=True)
class Score:
    """A score function. Where it holds one tanh of the score, that is computed for all elements at once."""

    text: str  # as in the spec
    row: Row
    argument: Function | None  # what a tanh is taken of, but for a factor; None: of Q . K, or there is none
    tanh: str | None  # the `ScaledTanh` of the head
    diagonals: tuple[Diagonal, ...]
    element: Function | None  # None: the tanh is all there is

    @property
    def edges(self) -> bool:
        functions = (self.argument, self.element, *(diagonal.function for diagonal in self.diagonals))
        return any(function is not None and function.edges for function in functions)

    def call(self, function: Function) -> str:
        """`function` of element e of column tile j."""
        diagonals = {diagonal.name: f"{diagonal.array}[e]" for diagonal in self.diagonals}
        return function.call(row="rows[e / 2]", s="s[j][e]", t="s[j][e]", c="8 * j + e % 2", **diagonals)

    def diagonals_of(self, function: Function) -> list[Diagonal]:
        """Those that `function` is given."""
        return [d for d in self.diagonals if f"{d.function.returns} {d.name}" in function.parameters]


@dataclass(frozen=True)
class Keep:
    """What the intervals leave of a mask, to be tested element by element."""

    text: str
    row: Row
    element: Function


@dataclass(frozen=True)
class Segment:
    """The ends of one interval of kept keys, printed as functions of `q`; None for no bound."""

    first: str | None
    last: str | None


@dataclass(frozen=True)
class Search:
    """`result` is the first key `kv` with ``read <relation> value``."""

    result: str
    read: str
    relation: str
    value: str


@dataclass(frozen=True)
class Ranges:
    """What the preparation kernel finds for each row."""

    variables: tuple[Value, ...]  # of the head
    searches: tuple[Search, ...]
    interval: Segment


@dataclass(frozen=True)
class Elements:
    """What `templates/kernels/elements.cuh.j2` prints of a plan."""

    inputs: tuple[str, ...]  # members of `Inputs`, in the order of the launch's arguments
    head_variables: tuple[Value, ...]
    head_terms: tuple[Value, ...]
    score: Score | None
    keep: Keep | None
    segments: tuple[Segment, ...]
    ranges: Ranges | None
    listed: bool  # the tiles of a q tile come from a list: of memory, or of several intervals
    over: frozenset[str]  # "batch", "head": what the mask depends on

    @property
    def terms(self) -> str:
        """The argument that hands the terms of a head on, where there are any."""
        return ", terms" if self.head_terms else ""

    @property
    def terms_parameter(self) -> str:
        return ", const HeadTerms &terms" if self.head_terms else ""

    @property
    def list_index(self) -> str:
        """Which of the lists of a map is that of `q_tile`, of `q_tiles` for each head that has its own."""
        batch_head = {
            frozenset({"batch", "head"}): "batch * params.heads_q + head",
            frozenset({"batch"}): "batch",
            frozenset({"head"}): "head",
        }.get(self.over)
        return "q_tile" if batch_head is None else f"{bracketed(batch_head)} * q_tiles + q_tile"

    @property
    def headers(self) -> list[str]:
        """Device headers that the printed text needs beyond those of every kernel."""
        functions = [] if self.score is None else [self.score.argument, self.score.element]
        functions += [] if self.score is None else [diagonal.function for diagonal in self.score.diagonals]
        functions += [] if self.keep is None else [self.keep.element]
        rows = [part.row for part in (self.score, self.keep) if part is not None]
        values = [*self.head_variables, *(value for row in rows for value in row.variables)]
        values += [value for function in functions if function is not None for value in function.variables]
        texts = [value.text for value in values] + [f.result for f in functions if f is not None]
        texts += [end for segment in self.segments for end in (segment.first, segment.last) if end is not None]
        needed = {
            header for header, words in _HEADERS.items() for text in texts if re.search(words, text)
        }
        return sorted(needed)

    @property
    def end_parameters(self) -> str:
        """Parameters of a function that prints an end of a segment, beside `q`, `seqlen_q` and `seqlen_kv`."""
        declared = {"params": "const AttentionParams &params", "terms": "const HeadTerms &terms"}
        return "".join(f", {declared[name]}" for name in self._end_needs)

    @property
    def end_arguments(self) -> str:
        """What is passed for `end_parameters`."""
        return "".join(f", {name}" for name in self._end_needs)

    @property
    def end_lengths(self) -> list[str]:
        """Those of `seqlen_q` and `seqlen_kv` that the clamped ends of the segments hold; the latter always."""
        return ["seqlen_q", "seqlen_kv"] if re.search(r"\bseqlen_q\b", self._ends) else ["seqlen_kv"]

    @property
    def _end_needs(self) -> list[str]:
        return [name for name in ("params", "terms") if re.search(rf"\b{name}\.", self._ends)]

    @property
    def _ends(self) -> str:
        return " ".join(end for segment in self.segments for end in (segment.first, segment.last) if end)


@lru_cache(maxsize=256)
def elements(plan: KernelPlan) -> Elements:
    """Print the mathematics of a plan, in two passes: the first finds what is needed more than once."""
    first = _Build(plan, frozenset())
    repeated = frozenset(key for key, uses in first.uses().items() if uses > 1)
    return _Build(plan, repeated).elements


class _Build:
    def __init__(self, plan: KernelPlan, repeated: frozenset[tuple[sympy.Basic, Kind]]) -> None:
        self._plan = plan
        self._head = Scope("terms.")
        self._repeated = repeated
        self._levels: list[Levels] = []
        mask = plan.mask.derivation
        listed = mask.route == "map" or len(mask.segments) > 1
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
            listed=listed,
            over=mask.over,
        )

    def uses(self) -> dict[tuple[sympy.Basic, Kind], int]:
        return {key: uses for levels in self._levels for key, uses in levels.uses.items()}

    def _printer(self, *, split_edges: bool = False, head: Scope | None = None) -> LevelPrinter:
        levels = Levels(head or self._head, self._repeated)
        self._levels.append(levels)
        reads = Reads(self._plan.tensors, align=self._plan.align, split_edges=split_edges)
        return LevelPrinter(levels, reads, self._plan.parameters, self._plan.group)

    def _function(
        self,
        printer: LevelPrinter,
        name: str,
        returns: Kind,
        row: str,
        expr: sympy.Basic,
        diagonals: tuple[Diagonal, ...] = (),
    ) -> Function:
        scope = printer.levels.begin_function()
        result = printer.value(expr, returns)
        variables = tuple(scope.values.values())
        text = " ".join([result, *(value.text for value in variables)])
        text = re.sub(r"\.\w+", "", text)  # members are no parameters
        parameters = [
            declaration.format(row=row) for pattern, declaration in _PARAMETERS if re.search(pattern, text)
        ]
        parameters += [
            f"{diagonal.function.returns} {diagonal.name}"
            for diagonal in diagonals
            if re.search(rf"\b{diagonal.name}\b", text)
        ]
        return Function(name, returns, tuple(parameters), variables, result)

    def _score(self) -> Score:
        printer = self._printer(split_edges=True)
        expr, diagonals = self._diagonals(printer, levelled(self._plan.score.expr))
        argument, tanh, element = None, None, None
        if (split := _split_tanh(expr)) is not None:
            inner, slope, factor, expr = split
            if inner != PRODUCT:
                argument = self._function(printer, "score_argument", "float", "ScoreRow", inner, diagonals)
            with printer.levels.inside("head"):
                text = f"scaled_tanh({printer.value(factor, 'float')}, {printer.value(slope, 'float')})"
            tanh = self._head.export("ScaledTanh", text, "bend")
        if expr != TANH:
            element = self._function(printer, "score_element", "float", "ScoreRow", expr, diagonals)
        return Score(
            text=str(self._plan.score.expr),
            row=_row(printer),
            argument=argument,
            tanh=tanh,
            diagonals=diagonals,
            element=element,
        )

    def _diagonals(self, printer: LevelPrinter, expr: Expr) -> tuple[Expr, tuple[Diagonal, ...]]:
        """The score with symbols for its diagonals. Packed rows are no eight positions apart, and have none."""
        diagonals: list[Diagonal] = []
        packed = getattr(self._plan.schedule, "pack_gqa", False)
        for part in [] if packed else _diagonals(expr):
            name = f"diagonal{len(diagonals) + 1 if diagonals else ''}"
            kind: Kind = "int" if is_whole(part) else "float"
            function = self._function(printer, f"score_{name}", kind, "ScoreRow", part)
            diagonals.append(Diagonal(name, function))
            symbol = sympy.Symbol(f"{name}'", **{"integer" if kind == "int" else "real": True})
            expr = expr.xreplace({part: symbol})
        return expr, tuple(diagonals)

    def _keep(self) -> Keep:
        printer = self._printer()
        residual = self._plan.mask.derivation.residual
        element = self._function(printer, "keep_element", "bool", "KeepRow", levelled(residual))
        return Keep(text=str(residual), row=_row(printer), element=element)

    def _segment(self, head: Scope, bounds: RowBounds) -> Segment:
        ends = (None if end is None else self._end(head, end) for end in (bounds.first, bounds.last))
        return Segment(*ends)

    def _end(self, head: Scope, end: Expr) -> str:
        printer = self._printer(head=head)
        printer.row_leaves |= {SEQLEN_Q: "seqlen_q", SEQLEN_KV: "seqlen_kv"}
        with printer.levels.inside("row"):
            return str(printer.doprint(end))

    def _ranges(self, ranges: derivation.Ranges) -> Ranges:
        head = Scope("")
        searches = tuple(
            Search(
                search.result.name,
                self._end(head, search.read.xreplace({KV: FIRST_KV})),
                search.relation,
                self._end(head, search.value),
            )
            for search in ranges.searches
        )
        interval = self._segment(head, ranges.bounds)
        return Ranges(tuple(head.values.values()), searches, interval)


def _row(printer: LevelPrinter) -> Row:
    scope = printer.levels.scopes["row"]
    return Row(tuple(scope.values.values()), tuple(scope.members.values()))


def _split_tanh(expr: Expr) -> tuple[Expr, Expr, Expr, Expr] | None:
    """(x, k, a, rest) where ``expr`` is `rest` with ``a * tanh(k * x)`` for `TANH`; None unless there is one tanh of
    the score, and no score outside of it. k and a are of the head."""
    nodes = [node for node in expr.atoms(sympy.tanh) if node.has(PRODUCT)]
    if len(nodes) != 1:
        return None
    rest = expr.xreplace({nodes[0]: TANH})
    if rest.has(PRODUCT):
        return None
    factors = Mul.make_args(nodes[0].args[0])
    outer = [factor for factor in factors if level_of(factor) in ("constant", "head")]
    inner = Mul(*[factor for factor in factors if factor not in outer])
    slope = sympy.diff(rest, TANH)
    if not slope.has(TANH) and level_of(slope) in ("constant", "head"):
        return inner, Mul(*outer), slope, TANH + rest.xreplace({TANH: S.Zero})
    return inner, Mul(*outer), S.One, rest


def _diagonals(expr: Expr) -> list[Expr]:
    """The largest parts that cost something for each element and depend on q and kv only through q - kv."""
    if level_of(expr) != "element":
        return []
    costly = any(level_of(node) == "element" for node in expr.atoms(*_COSTLY))
    if costly and isinstance(expr, Expr) and not expr.has(PRODUCT) and distance_only(expr):
        return [expr]
    found: list[Expr] = []
    for arg in expr.args:
        found += [part for part in _diagonals(arg) if part not in found]
    return found


def _inputs(plan: KernelPlan) -> tuple[str, ...]:
    """Members of `Inputs`: pointers, strides, integers, floats; what the launch writes, in that order."""
    route = plan.mask.derivation.route
    members = [f"const {C_TYPES[tensor.dtype]} *{identifier(tensor.name)};{_shape(tensor)}" for tensor in plan.tensors]
    if plan.sink:
        members.append("const float *sink;  // [heads_q]")
    if route == "ranges":
        members.append("int *key_first, *key_last;  // of each row, written by the preparation kernel")
    if route == "map":
        members.append("int *tile_counts;  // key tiles that a q tile visits, written by the preparation kernel")
        members.append("int *tile_list;  // and which: 2 * tile + masked, ascending")
    for tensor in plan.tensors:
        if len(tensor.index) > 1:
            stride = identifier(tensor.name + "_stride")
            members.append(f"int64_t {stride}[{len(tensor.index) - 1}];")
    members += [f"int {identifier(p.name)};" for p in plan.parameters if p.kind == "int"]
    members += [f"float {identifier(p.name)};" for p in plan.parameters if p.kind == "float"]
    return tuple(members)


def wrapped(text: str) -> str:
    """Printed code with its long lines broken where a space allows it, continued four columns to the right."""
    return "\n".join(part for line in text.split("\n") for part in _broken(line))


def _broken(line: str) -> list[str]:
    if len(line) <= _COLUMNS:
        return [line]
    margin = " " * (len(line) - len(line.lstrip()))
    comment = line.lstrip().startswith("//")
    words = re.split(r"(?<!\bconst)(?<!\bint)(?<!\bfloat) (?!\{$)", line.lstrip())
    parts = [margin + words[0]]
    for word in words[1:]:
        if len(parts[-1]) + 1 + len(word) <= _COLUMNS:
            parts[-1] += f" {word}"
        else:
            parts.append(f"{margin}// {word}" if comment else f"{margin}    {word}")
    return parts


def _shape(tensor: TensorInput) -> str:
    return f"  // [{', '.join(str(axis) for axis in tensor.index)}]"


__all__ = ["PREPARE_THREADS", "Elements", "elements", "wrapped"]
