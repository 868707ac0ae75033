"""What a template prints of a plan's mathematics, in parts."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flashgen.codegen.levels import Value
from flashgen.codegen.printer import bracketed

_HEADERS = {  # by the functions that they hold
    "elementary.cuh": r"\b(scaled_tanh|tanh_approx|log2_approx|r?sqrt_approx)\b",
    "read.cuh": r"\bread(_column<[^>]*>)?\(",
}


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
        return self._holds("kEdge")

    @property
    def pairs(self) -> bool:
        """Whether it is one over kPairs too: two columns of a row are one load, where the row allows it."""
        return self._holds("kPairs")

    def _holds(self, word: str) -> bool:
        return any(word in text for text in (self.result, *(value.text for value in self.variables)))

    @property
    def reads_row(self) -> bool:
        return any(parameter.endswith(" &row") for parameter in self.parameters)

    def call(self, **arguments: str) -> str:
        """The call with `arguments` for parameters of those names; others are passed under their own."""
        names = [re.split(r"[ &]", parameter)[-1] for parameter in self.parameters]
        passed = ", ".join(arguments.get(name, name) for name in names)
        template_arguments = "<kEdge, kPairs>" if self.pairs else "<kEdge>" if self.edges else ""
        return f"{self.name}{template_arguments}({passed})"


@dataclass(frozen=True)
class Shared:
    """The struct of what elements of a query, or of its row in one tile, share, and what it is made with."""

    variables: tuple[Value, ...]
    members: tuple[Value, ...]


@dataclass(frozen=True)
class Diagonal:
    """A part of a score that depends on q - kv alone: row r + 8 has at column c what row r has at c - 8."""

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
    query: Shared
    row: Shared
    pairs: tuple[str, ...]  # of the row: pointers to what is loaded in pairs of columns where that is aligned
    argument: Function | None  # what a tanh is taken of, but for a factor; None: of Q . K, or there is none
    tanh: str | None  # the `ScaledTanh` of the head
    capped: bool  # it is that tanh alone, and rises with Q . K: the softmax takes it (capped_softmax.cuh)
    diagonals: tuple[Diagonal, ...]
    early: bool  # the diagonals are computed for all elements beforehand
    element: Function | None  # None: the tanh is all there is

    @property
    def edges(self) -> bool:
        own = any(function is not None and function.edges for function in (self.argument, self.element))
        return own or (not self.early and self.diagonal_edges)

    @property
    def diagonal_edges(self) -> bool:
        """The same of the diagonals."""
        return any(diagonal.function.edges for diagonal in self.diagonals)

    @property
    def rows(self) -> int:
        """How many rows of a thread are looked at: the diagonals of both are those of the first."""
        reads = any(function is not None and function.reads_row for function in (self.argument, self.element))
        return 2 if reads else self.diagonal_rows if not self.early else 0

    @property
    def diagonal_rows(self) -> int:
        """The same for the diagonals alone."""
        return 1 if self.row.members else 0

    def call(self, function: Function) -> str:
        """`function` of element e of column tile j."""
        at = "distances.{}[j + 1 - e / 2][e % 2]" if self.early else "{}s[e]"
        diagonals = {diagonal.name: at.format(diagonal.name) for diagonal in self.diagonals}
        return function.call(
            query="queries[e / 2]",
            row="rows[e / 2]",
            s="s[j][e]",
            t="s[j][e]",
            c="8 * j + e % 2",
            **diagonals,
        )

    def diagonals_of(self, function: Function) -> list[Diagonal]:
        """Those that `function` is given."""
        return [d for d in self.diagonals if f"{d.function.returns} {d.name}" in function.parameters]


@dataclass(frozen=True)
class Keep:
    """What the intervals leave of a mask, to be tested element by element."""

    text: str
    query: Shared
    row: Shared
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
    value: str  # the name of a variable


@dataclass(frozen=True)
class Ranges:
    """What the preparation kernel finds for each row."""

    variables: tuple[Value, ...]  # of the head, and what the searches look for
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
    def score_queries(self) -> str:
        """The argument that hands on what the score knows of a thread's two queries."""
        return ", score_queries" if self.score is not None and self.score.query.members else ""

    @property
    def keep_queries(self) -> str:
        """The same of a mask that is tested element by element."""
        return ", keep_queries" if self.keep is not None and self.keep.query.members else ""

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
        score = self.score
        functions = [] if self.keep is None else [self.keep.element]
        if score is not None:
            functions += [diagonal.function for diagonal in score.diagonals]
            functions += [function for function in (score.argument, score.element) if function is not None]
        shared = [
            level for part in (score, self.keep) if part is not None for level in (part.query, part.row)
        ]
        values = [*self.head_variables, *(value for level in shared for value in level.variables)]
        values += [value for function in functions for value in function.variables]
        texts = [self._ends, *(value.text for value in values), *(f.result for f in functions)]
        needed = [
            header for header, words in _HEADERS.items() if any(re.search(words, text) for text in texts)
        ]
        if score is not None and score.capped:
            needed.append("capped_softmax.cuh")
        return sorted(needed)

    @property
    def end_parameters(self) -> str:
        """Parameters of a function that prints an end, beside `q`, `seqlen_q` and `seqlen_kv`."""
        declared = {"params": "const AttentionParams &params", "terms": "const HeadTerms &terms"}
        return "".join(f", {declared[name]}" for name in self._end_needs)

    @property
    def end_arguments(self) -> str:
        """What is passed for `end_parameters`."""
        return "".join(f", {name}" for name in self._end_needs)

    @property
    def end_lengths(self) -> list[str]:
        """Those of `seqlen_q` and `seqlen_kv` that the clamped ends hold; the latter always."""
        return ["seqlen_q", "seqlen_kv"] if re.search(r"\bseqlen_q\b", self._ends) else ["seqlen_kv"]

    @property
    def _end_needs(self) -> list[str]:
        return [name for name in ("params", "terms") if re.search(rf"\b{name}\.", self._ends)]

    @property
    def _ends(self) -> str:
        return " ".join(end for segment in self.segments for end in (segment.first, segment.last) if end)


__all__ = [
    "Diagonal",
    "Elements",
    "Function",
    "Keep",
    "Ranges",
    "Score",
    "Search",
    "Segment",
    "Shared",
]
