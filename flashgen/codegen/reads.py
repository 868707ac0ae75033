"""Elements of the tensors that masks and scores read: addresses split by level, subscripts kept inside.

The last axis is contiguous. Where it is walked along the row, the row holds a pointer to its first column,
and an element is a load at a constant distance from it, or half of one of two neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import sympy
from sympy import Expr, S
from sympy.core.function import AppliedUndef

from flashgen.codegen.identifiers import identifier
from flashgen.codegen.levels import COLUMN, FIRST_KV, LEVELS, Level, level_of
from flashgen.codegen.printer import bracketed
from flashgen.spec.inputs import TensorInput
from flashgen.spec.symbols import BATCH, HEAD, HEAD_KV, SEQLEN_KV, SEQLEN_Q, Q

if TYPE_CHECKING:
    from flashgen.codegen.exact import LevelPrinter

PREPARED = ("key_first", "key_last")  # int32 [batch, head, seqlen_q], contiguous, of the axes that matter
C_TYPES = {"fp32": "float", "fp16": "fp16", "bf16": "bf16", "int32": "int", "bool": "unsigned char"}
_PAIRED = ("fp32", "fp16", "bf16")

Leaves = Literal["never", "after", "edges", "anywhere"]
"""Where a subscript may leave its axis: only past the end, only in tiles at an edge."""


@dataclass(frozen=True)
class _Subscript:
    """Where an axis is read. `index` counts from the start of the axis; None for length: always inside."""

    index: Expr
    length: Expr | None
    leaves: Leaves


@dataclass(frozen=True)
class _Walk:
    """From a row's pointer to column c, up to the last one inside; backwards from the first one inside."""

    most: str
    least: str | None = None

    @property
    def step(self) -> str:
        if self.least is None:
            return f"+ (kEdge ? min(c, {self.most}) : c)"
        return f"- (kEdge ? min(max(c, {self.least}), {self.most}) : c)"


class Reads:
    """The tensors of a plan, and which of their rows are read in pairs of columns."""

    def __init__(self, tensors: tuple[TensorInput, ...], *, align: str, pairs: bool) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._q_offset: Expr = SEQLEN_KV - SEQLEN_Q if align == "bottom_right" else S.Zero
        self._pairs = pairs  # print loads of two columns, for the rows that allow them
        self.paired: dict[str, None] = {}  # pointers to rows that are loaded so

    def element(self, printer: LevelPrinter, read: AppliedUndef) -> str:
        """The value of one element, at the printer's present level."""
        tensor = self._tensors.get(str(read.func)) or _prepared(read)
        if not tensor.index:
            return f"read(params.inputs.{identifier(tensor.name)})"
        subscripts = [self._subscript(axis, at) for axis, at in zip(tensor.index, read.args, strict=True)]
        *strided, last = subscripts
        levels = printer.levels
        parts: dict[Level, list[str]] = {level: [] for level in LEVELS}

        def level_of_subscript(index: Expr) -> Level:
            level = levels.outermost(level_of(index))
            return "head" if level == "constant" else level

        for position, subscript in enumerate(strided):
            level = level_of_subscript(subscript.index)
            with levels.inside(level):
                index = bracketed(self._clamped(printer, subscript))
                parts[level].append(f"{index} * {_stride(tensor, position)}")
        walk = self._walk(printer, tensor, last)
        if walk is None:
            level = level_of_subscript(last.index)
            with levels.inside(level):
                parts[level].append(self._clamped(printer, last))
        else:
            with levels.inside("row"):
                start = printer.affine(last.index)
                assert start is not None
                parts["row"].append(bracketed(printer.value(start[0], "int")))
        pointer = f"params.inputs.{identifier(tensor.name)}"
        type = f"const {C_TYPES[tensor.dtype]} *"
        at = levels.at
        outer: tuple[Level, ...] = ("head", "query", "row")
        for level in outer:
            if parts[level]:
                pointer = " + ".join([pointer, *parts[level]])
                if level == at:
                    break
                pointer = levels.scopes[level].export(type, pointer, tensor.name)
        if at == "element":
            pointer = " + ".join([pointer, *parts["element"]])
        if walk is None:
            return f"read({pointer})"
        if self._pairs and tensor.dtype in _PAIRED and walk.least is None and not parts["element"]:
            self.paired.setdefault(pointer)
            text = f"read_column<kEdge, kPairs>({pointer}, c, {walk.most})"
            return levels.scopes[at].define("float", text, tensor.name)
        return f"read({pointer} {walk.step})"

    def _subscript(self, axis: str | int, at: Expr) -> _Subscript:
        if axis in ("batch", "head", "head_kv"):
            return _Subscript({"batch": BATCH, "head": HEAD, "head_kv": HEAD_KV}[str(axis)], None, "never")
        if axis == "q":
            return _Subscript(at - self._q_offset, SEQLEN_Q, "after" if at == Q else "anywhere")
        if axis == "kv":
            # A lone FIRST_KV is the key that a search looks at, and exists.
            within: dict[Expr, Leaves] = {FIRST_KV + COLUMN: "edges", FIRST_KV: "never"}
            return _Subscript(at, SEQLEN_KV, within.get(at, "anywhere"))
        if axis == "q - kv":
            walks = sympy.expand(at - (Q - FIRST_KV - COLUMN)) == 0
            start = self._q_offset - (SEQLEN_KV - 1)
            return _Subscript(
                sympy.expand(at - start), SEQLEN_Q + SEQLEN_KV - 1, "edges" if walks else "anywhere"
            )
        length = sympy.Integer(axis)
        inside = at.is_Integer and 0 <= at < length
        return _Subscript(at, length, "never" if inside else "anywhere")

    def _clamped(self, printer: LevelPrinter, subscript: _Subscript) -> str:
        """The subscript, inside its axis, at the printer's present level."""
        index = printer.clamped(subscript.index, "int")
        if subscript.length is None or subscript.leaves == "never":
            return index
        if subscript.leaves == "after":
            return f"min({index}, {printer.value(subscript.length - 1, 'int')})"
        return f"min(max({index}, 0), {printer.value(subscript.length - 1, 'int')})"

    def _walk(self, printer: LevelPrinter, tensor: TensorInput, last: _Subscript) -> _Walk | None:
        if last.leaves != "edges" or printer.levels.at != "element":
            return None
        affine = printer.affine(last.index)
        if affine is None:
            return None
        start, slope = affine
        with printer.levels.inside("row"):
            assert last.length is not None
            row = printer.levels.scopes["row"]
            front, back = last.length - 1 - start, start
            most = printer.value(front if slope == 1 else back, "int")
            most = row.export("int", most, f"{tensor.name}_last", "last column inside")
            if slope == 1:
                return _Walk(most)
            least = printer.value(-front, "int")
            return _Walk(most, row.export("int", least, f"{tensor.name}_first", "first column inside"))


def _stride(tensor: TensorInput, position: int) -> str:
    """Elements between neighbours on an axis before the last."""
    if tensor.name not in PREPARED:
        return f"params.inputs.{identifier(tensor.name + '_stride')}[{position}]"
    extents = {"head": "params.heads_q", "q": "params.seqlen_q"}
    inner = [extents[str(axis)] for axis in tensor.index[position + 1 :]]
    return " * ".join([f"static_cast<int64_t>({inner[0]})", *inner[1:]])


def _prepared(read: AppliedUndef) -> TensorInput:
    """What the preparation kernel has written, by the axes that it is read at."""
    axes: dict[Expr, str] = {BATCH: "batch", HEAD: "head", Q: "q"}
    return TensorInput(str(read.func), tuple(axes[at] for at in read.args), "int32")


__all__ = ["C_TYPES", "Reads"]
