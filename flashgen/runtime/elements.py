"""Masks and scores element by element: the expressions of a spec or a plan, on the tensors of one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import Tensor

from flashgen.runtime.evaluate import Values, evaluate
from flashgen.runtime.inputs import Declarations, Inputs, Sizes


@dataclass(frozen=True)
class Box:
    """A part of the scores: [batches, heads, rows, columns], each a range of indices."""

    batches: range
    heads: range  # of the queries
    rows: range
    columns: range  # keys; may pass the last one, where tensors read their nearest element

    @classmethod
    def whole(cls, sizes: Sizes) -> Box:
        """All scores of a call."""
        return cls(range(sizes.batch), range(sizes.heads_q), range(sizes.seqlen_q), range(sizes.seqlen_kv))


class Elements:
    """Evaluates expressions at boxes of one call. Results broadcast to [batches, heads, rows, columns]."""

    def __init__(
        self,
        declared: Declarations,
        inputs: Inputs,
        sizes: Sizes,
        *,
        scale: float,
        real: torch.dtype,
        device: torch.device,
    ) -> None:
        """`real` is the dtype of everything that is not an integer: float64, or float32 as in a kernel."""
        self.sizes = sizes
        self._real = real
        self.device = device
        self._tensors = {
            tensor.name: (tensor.index, value)
            for tensor, value in zip(declared.tensors, inputs.tensors, strict=True)
        }
        self._constants = {
            "seqlen_q": torch.tensor(sizes.seqlen_q, device=device),
            "seqlen_kv": torch.tensor(sizes.seqlen_kv, device=device),
            "scale": torch.tensor(scale, dtype=real, device=device),
        }
        for parameter, number in zip(declared.parameters, inputs.params, strict=True):
            dtype = torch.int64 if parameter.kind == "int" else real
            self._constants[parameter.name] = torch.tensor(number, dtype=dtype, device=device)

    def at(self, expr: sympy.Basic, box: Box, values: Values | None = None) -> Tensor:
        """The value of an expression, which may speak of `values` too: "score", say, [batches, heads,
        rows, columns].
        """
        return evaluate(expr, {**self.values(box), **(values or {})}, read=self._read, real=self._real)

    def values(self, box: Box) -> dict[str, Tensor]:
        """What the symbols stand for at a box."""
        heads = self._along(box.heads)[None, :, None, None]
        group = self.sizes.heads_q // max(self.sizes.heads_kv, 1)
        return {
            **self._constants,
            "batch": self._along(box.batches)[:, None, None, None],
            "head": heads,
            "head_kv": heads // max(group, 1),
            "q": self._along(box.rows)[:, None] + self.sizes.q_offset,
            "kv": self._along(box.columns),
        }

    def indices(self, read: AppliedUndef, box: Box) -> tuple[Tensor, ...]:
        """Which elements of its tensor a read takes at a box: an index for each axis."""
        values = self.values(box)
        subscripts = (evaluate(arg, values, read=self._read, real=self._real) for arg in read.args)
        return self._stored(read.func.__name__, tuple(subscripts))

    def _read(self, name: str, subscripts: tuple[Tensor, ...]) -> Tensor:
        _, tensor = self._tensors[name]
        indices = self._stored(name, subscripts)
        if tensor.numel() == 0:  # without keys, say: there is no nearest element, and nobody to read it
            shape = torch.broadcast_shapes(*(index.shape for index in indices))  # type: ignore[no-untyped-call]
            return tensor.new_zeros(shape)
        return tensor[indices] if indices else tensor

    def _stored(self, name: str, subscripts: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Positions as indices. A subscript outside of its axis reads the nearest element."""
        index, _ = self._tensors[name]
        return tuple(
            (torch.as_tensor(subscript, device=self.device) - self.sizes.first(axis)).clamp(
                0, max(self.sizes.length(axis) - 1, 0)
            )
            for axis, subscript in zip(index, subscripts, strict=True)
        )

    def _along(self, indices: range) -> Tensor:
        return torch.arange(indices.start, indices.stop, device=self.device)


__all__ = ["Box", "Elements"]
