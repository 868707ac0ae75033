"""`ShapedAttention`: one formula, and a kernel for each kind of tensors that it meets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashgen.errors import LaunchError
from flashgen.runtime import ops
from flashgen.runtime.arguments import DTYPES, check_layout, signature
from flashgen.runtime.formula import Formula
from flashgen.runtime.inputs import NO_INPUTS, Inputs, arrange, check_parameters
from flashgen.runtime.kernel import Kernel
from flashgen.runtime.launch import LAUNCHES_MAX
from flashgen.runtime.layouts import Outputs, Run
from flashgen.spec import AttentionSpec

_SEQLEN_BUCKETS = (128, 32768)  # tiles follow the length, by powers of two between these
_BATCH_BUCKETS = (1, 64)
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Order = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a kernel's tensors, and its parameters, stand among the formula's."""


class ShapedAttention:
    """One formula; a kernel for each head_dim, dtype, ratio of heads and magnitude of the lengths."""

    def __init__(self, formula: Formula) -> None:
        self.key = formula.key
        self._formula = formula
        self._kernels: dict[tuple[object, ...], Kernel] = {}
        self._launches: dict[tuple[object, ...], Run] = {}
        ops.register(self.key, self)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, return_lse: bool,
        inputs: Inputs | None = None, /,
    ) -> Outputs:  # fmt: skip
        """The op without its dispatcher: o, and lse or `None`. `inputs` are in the formula's order."""
        key: tuple[object, ...] = signature(q, k, v)
        if inputs is not None:
            key = (key, inputs.signature())
        launch = self._launches.get(key)
        if launch is None:
            launch = self._launch(q, k, v, inputs)
            if len(self._launches) >= LAUNCHES_MAX:
                self._launches.clear()
            self._launches[key] = launch
        return launch(q, k, v, scale, return_lse, inputs)

    def kernel_for(self, q: Tensor, k: Tensor, v: Tensor) -> Kernel:
        """The kernel for tensors like these; planned on first use. Raises `SpecError` and `LaunchError`."""
        check_layout(q, k, v)
        heads, head_dims = (q.shape[2], k.shape[2]), (q.shape[3], v.shape[3])
        batch = _bucket(q.shape[0], _BATCH_BUCKETS)
        seqlens = (_bucket(q.shape[1], _SEQLEN_BUCKETS), _bucket(k.shape[1], _SEQLEN_BUCKETS))
        key = (q.dtype, heads, head_dims, batch, seqlens)
        if key not in self._kernels:
            self._kernels[key] = Kernel(self._spec(q.dtype, heads, head_dims, batch, seqlens))
        return self._kernels[key]

    def order_of(self, kernel: str) -> Order:
        """How the kernel of a key takes the formula's inputs.

        Raises `LaunchError` for the kernel of another formula.
        """
        for known in self._kernels.values():
            if known.key == kernel:
                return self._order(known)
        raise LaunchError(
            "`prepared` was made for another mask or score",
            hint="prepare it with what it is called with: flashgen.prepare(q, k, v, ...)",
        )

    def _order(self, kernel: Kernel) -> Order:
        tensors = [name for name, _, _ in self._formula.tensors]
        return (
            tuple(tensors.index(tensor.name) for tensor in kernel.declared.tensors),
            tuple(self._formula.params.index(parameter.name) for parameter in kernel.declared.parameters),
        )

    def _launch(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs | None) -> Run:
        """A kernel's launch, for inputs in the formula's order. Here names meet the spec."""
        kernel = self.kernel_for(q, k, v)
        # all that is given was declared: what counts is whether the texts speak of it
        declared = replace(kernel.declared, unread=tuple(kernel.spec.attention.unread))
        given = inputs or NO_INPUTS
        names = [name for name, _, _ in self._formula.tensors]
        tensors = dict(zip(names, given.tensors, strict=True))
        params = dict(zip(self._formula.params, given.params, strict=True))
        arranged = arrange(declared, tensors, params, given.sink, name="this attention")
        launch = kernel.launch_for(q, k, v, arranged if inputs is not None else None)
        if inputs is None:
            return launch
        tensor_order, number_order = self._order(kernel)

        def run(
            q: Tensor, k: Tensor, v: Tensor, scale: float | None, return_lse: bool,
            inputs: Inputs | None = None, /,
        ) -> Outputs:  # fmt: skip
            assert inputs is not None
            arranged = replace(
                inputs,
                tensors=tuple(inputs.tensors[index] for index in tensor_order),
                params=tuple(inputs.params[index] for index in number_order),
            )
            check_parameters(declared, arranged)
            return launch(q, k, v, scale, return_lse, arranged)

        return run

    def _spec(
        self,
        dtype: torch.dtype,
        heads: tuple[int, int],
        head_dims: tuple[int, int],
        batch: int,
        seqlens: tuple[int, int],
    ) -> AttentionSpec:
        # The language's short forms, so that what is wrong is told in its words.
        parts: dict[str, Any] = {
            "attention": {
                "heads": {"q": max(heads[0], 1), "kv": max(heads[1], 1)},
                "head_dim": {"qk": head_dims[0], "v": head_dims[1]},
                "dtype": _DTYPE_NAMES[dtype],
                **self._formula.fields(),
            },
            "workload": {"batch": batch, "seqlen": {"q": seqlens[0], "kv": seqlens[1]}},
        }
        return AttentionSpec(name="attention", **parts)


def _bucket(length: int, limits: tuple[int, int]) -> int:
    """The next power of two, within limits."""
    low, high = limits
    return min(max(1 << max(length - 1, 0).bit_length(), low), high)


__all__ = ["Order", "ShapedAttention"]
