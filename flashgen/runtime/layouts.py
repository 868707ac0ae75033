"""Which layouts a kernel reads as they are, and the calls that copy first or have nothing to launch."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from flashgen.plan.model import KernelPlan
from flashgen.runtime.inputs import Inputs

Outputs = tuple[Tensor, Tensor | None]


class Run(Protocol):
    """A call with everything decided but the addresses and the numbers: o, and lse or None.

    `inputs` is None for a kernel whose mask and score read nothing.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, return_lse: bool,
        inputs: Inputs | None = None, /,
    ) -> Outputs: ...  # fmt: skip


ALIGNMENT = 16  # bytes that one copy instruction moves, and what TMA asks of addresses and strides


def taken_as_is(tensor: Tensor, plan: KernelPlan) -> bool:
    """Whether the kernel can read this layout: head_dim contiguous, rows that start at 16 bytes.

    TMA cannot step by zero, so an expanded tensor is copied for the sm90 family.
    """
    *outer, last = tensor.stride()
    steps = [stride for stride, length in zip(outer, tensor.shape[:3], strict=True) if length > 1]
    aligned = all(stride * tensor.element_size() % ALIGNMENT == 0 for stride in steps)
    return last == 1 and aligned and not (plan.family == "sm90" and 0 in steps)


def with_copies(copies: tuple[bool, ...], again: Run) -> Run:
    def run(
        q: Tensor, k: Tensor, v: Tensor, scale: float | None, return_lse: bool,
        inputs: Inputs | None = None, /,
    ) -> Outputs:  # fmt: skip
        tensors = [
            tensor.clone(memory_format=torch.contiguous_format) if copy else tensor
            for copy, tensor in zip(copies, (q, k, v), strict=True)
        ]
        return again(tensors[0], tensors[1], tensors[2], scale, return_lse, inputs)

    return run


def _steps_by_one(tensor: Tensor) -> bool:
    """Whether the kernel can read a mask's or a score's tensor as it is: its last axis must be contiguous."""
    return tensor.dim() == 0 or tensor.stride(-1) == 1 or tensor.shape[-1] == 1


def readable(inputs: Inputs) -> Inputs:
    """Inputs with copies of the tensors, the sink among them, that cannot be read as they are."""
    sink = () if inputs.sink is None else (inputs.sink,)
    if all(map(_steps_by_one, (*inputs.tensors, *sink))):
        return inputs
    return replace(
        inputs,
        tensors=tuple(map(_stepping_by_one, inputs.tensors)),
        sink=None if inputs.sink is None else _stepping_by_one(inputs.sink),
    )


def _stepping_by_one(tensor: Tensor) -> Tensor:
    return tensor if _steps_by_one(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def with_readable(again: Run) -> Run:
    """The call `again`, with copies of the inputs that cannot be read as they are."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, scale: float | None, return_lse: bool,
        inputs: Inputs | None = None, /,
    ) -> Outputs:  # fmt: skip
        return again(q, k, v, scale, return_lse, None if inputs is None else readable(inputs))

    return run


def without_keys(shape: tuple[int, int, int, int]) -> Run:
    """No work for a GPU: an empty output, or no key at all, which is a row with every key masked."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, scale: float | None, return_lse: bool,
        inputs: Inputs | None = None, /,
    ) -> Outputs:  # fmt: skip
        o = q.new_zeros(shape)
        if not return_lse:
            return o, None
        lse = q.new_full((shape[0], shape[2], shape[1]), -torch.inf, dtype=torch.float32)
        if inputs is not None and inputs.sink is not None:
            lse.copy_(inputs.sink[:, None])
        return o, lse

    return run


__all__ = [
    "ALIGNMENT",
    "Outputs",
    "Run",
    "readable",
    "taken_as_is",
    "with_copies",
    "with_readable",
    "without_keys",
]
