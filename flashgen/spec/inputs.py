"""What a mask or score reads besides positions: tensors and runtime parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import sympy

from flashgen.spec.symbols import BATCH, HEAD, HEAD_KV, KV, Q

DType = Literal["fp32", "fp16", "bf16", "int32", "bool"]

AXES: dict[str, sympy.Expr] = {
    "batch": BATCH,
    "head": HEAD,
    "head_kv": HEAD_KV,
    "q": Q,
    "kv": KV,
    "q - kv": Q - KV,
}
"""The named axes, and the position on each at which a tensor is read where no subscript is written."""


@dataclass(frozen=True)
class TensorInput:
    """A tensor that a mask or score reads.

    `index` names an axis each: one of `AXES`, or the length of a table. Lengths: ``q`` seqlen_q, ``kv``
    seqlen_kv, ``q - kv`` seqlen_q + seqlen_kv - 1, ``head`` the query heads. `sorted`: nondecreasing along
    the last axis, as the caller promises. `grad`: the backward pass yields its gradient.
    """

    name: str
    index: tuple[str | int, ...]
    dtype: DType
    grad: bool = False
    sorted: bool = False

    @property
    def function(self) -> sympy.FunctionClass:
        """What stands for the tensor in expressions: applied to a subscript for every axis, it is an element.

        An element of a bool tensor is 0 or 1.
        """
        if self.dtype in ("int32", "bool"):
            return sympy.Function(self.name, integer=True)
        return sympy.Function(self.name, real=True)


@dataclass(frozen=True)
class RuntimeParameter:
    """A number that is passed at call time: an integer of at least `least`, or any finite float."""

    name: str
    kind: Literal["int", "float"]
    least: int | None = None

    @property
    def symbol(self) -> sympy.Symbol:
        """What stands for it in expressions."""
        return (
            sympy.Symbol(self.name, integer=True)
            if self.kind == "int"
            else sympy.Symbol(self.name, real=True)
        )


__all__ = ["AXES", "DType", "RuntimeParameter", "TensorInput"]
