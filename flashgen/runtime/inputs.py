"""What a mask or score is given besides q, k and v: tensors, runtime parameters, the sink.

From names, as a caller has them, to the order in which a kernel takes them, with everything checked on the
way.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashgen.errors import LaunchError, Problem
from flashgen.plan.model import KernelPlan
from flashgen.plan.tiles import row_shift
from flashgen.runtime.arguments import check_tensors, rank_problems
from flashgen.spec import AttentionSpec
from flashgen.spec.inputs import DType, RuntimeParameter, TensorInput
from flashgen.spec.suggest import did_you_mean, quoted

INPUT_DTYPES: Mapping[DType, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int32": torch.int32,
    "bool": torch.bool,
}
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Declarations:
    """What a kernel, or the reference of a spec, takes besides q, k and v; in this order.

    `unread` may be given too: the spec names it, and the mathematics does without.
    """

    tensors: tuple[TensorInput, ...] = ()
    parameters: tuple[RuntimeParameter, ...] = ()
    sink: bool = False
    unread: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: AttentionSpec | KernelPlan) -> Declarations:
        """What a spec's formulas read: its plan's kernel takes the same."""
        if isinstance(source, KernelPlan):
            return cls(source.tensors, source.parameters, source.sink)
        attention = source.attention
        passed = {name for name, parameter in attention.params.items() if parameter.runtime}
        read = {tensor.name for tensor in attention.inputs} | {number.name for number in attention.runtime}
        unread = attention.unread | (passed | {*attention.tensors}) - read
        return cls(attention.inputs, attention.runtime, attention.sink, tuple(sorted(unread)))

    @property
    def are_none(self) -> bool:
        """Whether there are none; so that torch.compile 2.11 traces it, without `__bool__` and ``not ()``."""
        return len(self.tensors) == 0 and len(self.parameters) == 0 and not self.sink


@dataclass(frozen=True)
class Inputs:
    """The values of `Declarations`, in their order. An integer parameter is a float of integral value."""

    tensors: tuple[Tensor, ...] = ()
    params: tuple[float, ...] = ()
    sink: Tensor | None = None  # fp32 [heads_q]
    prepared: tuple[Tensor, ...] = ()  # see `flashgen.runtime.preparation`; empty: each call prepares

    def signature(self) -> tuple[object, ...]:
        """Everything that a prepared launch depends on, apart from addresses and numbers."""
        return (
            *((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in self.all_tensors()),
            self.sink is None,
        )

    def all_tensors(self) -> Iterator[Tensor]:
        """Those of the mask and score, the sink, and what was prepared."""
        yield from self.tensors
        if self.sink is not None:
            yield self.sink
        yield from self.prepared


NO_INPUTS = Inputs()


@dataclass(frozen=True)
class Sizes:
    """The lengths of one call's dimensions."""

    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_kv: int
    q_offset: int  # position of the first row

    @classmethod
    def of(cls, q: Tensor, k: Tensor, align: str) -> Sizes:
        """Of a call with q [batch, seqlen_q, heads_q, ...] and k [batch, seqlen_kv, heads_kv, ...].

        Raises `LaunchError` for what has no such dimensions.
        """
        try:
            batch, seqlen_q, heads_q, _ = q.shape
            _, seqlen_kv, heads_kv, _ = k.shape
        except (AttributeError, ValueError):
            raise LaunchError(list(rank_problems({"q": q, "k": k}))) from None
        q_offset = row_shift("top_left" if align == "top_left" else "bottom_right", seqlen_q, seqlen_kv)
        return cls(batch, heads_q, heads_kv, seqlen_q, seqlen_kv, q_offset)

    def length(self, axis: str | int) -> int:
        """Elements along an axis of a tensor that a formula reads."""
        if isinstance(axis, int):
            return axis
        return {
            "batch": self.batch,
            "head": self.heads_q,
            "head_kv": self.heads_kv,
            "q": self.seqlen_q,
            "kv": self.seqlen_kv,
            "q - kv": self.seqlen_q + self.seqlen_kv - 1,
        }[axis]

    def first(self, axis: str | int) -> int:
        """The subscript of an axis' first element: subscripts are positions on the key timeline."""
        if axis == "q":
            return self.q_offset
        return self.q_offset - (self.seqlen_kv - 1) if axis == "q - kv" else 0


def arrange(
    declared: Declarations,
    tensors: Mapping[str, Tensor] | None,
    params: Mapping[str, float] | None,
    sink: Tensor | None,
    *,
    name: str,
) -> Inputs:
    """A caller's names in the order of the declarations. Raises `LaunchError` with all that is wrong.

    `name` is the spec's, for the messages.
    """
    tensors, params = tensors or {}, params or {}
    if declared.are_none and not (tensors or params or sink is not None):
        return NO_INPUTS
    problems = [
        *_name_problems("tensor", tensors, [tensor.name for tensor in declared.tensors], declared, name),
        *_name_problems("parameter", params, [number.name for number in declared.parameters], declared, name),
        *_number_problems(params),
    ]
    if declared.sink and sink is None:
        problems.append(Problem(f"{name} has a sink, and none is given", hint="sink=<fp32 tensor [heads_q]>"))
    if sink is not None and not declared.sink:
        problems.append(Problem(f"{name} has no sink", hint="write 'sink: true' in the spec's attention"))
    if problems:
        raise LaunchError(problems)
    return Inputs(
        tuple(tensors[tensor.name] for tensor in declared.tensors),
        _floats(params, [parameter.name for parameter in declared.parameters]),
        sink,
    )


def numbers(params: Mapping[str, float]) -> tuple[float, ...]:
    """Parameters as a kernel is given them. Raises `LaunchError` for what is no number."""
    if problems := list(_number_problems(params)):
        raise LaunchError(problems)
    return _floats(params, params)


def check_inputs(declared: Declarations, inputs: Inputs, sizes: Sizes, device: torch.device) -> None:
    """Whether values fit their declarations: number, shapes, dtypes, device, ranges.

    Raises `LaunchError` with all that is wrong.
    """
    check_extents(declared, inputs, sizes)
    problems = []
    sink = [] if inputs.sink is None else [("sink", inputs.sink, torch.float32)]
    dtypes = [
        (tensor.name, value, INPUT_DTYPES[tensor.dtype])
        for tensor, value in zip(declared.tensors, inputs.tensors, strict=True)
    ]
    for name, value, dtype in (*dtypes, *sink):
        if value.dtype != dtype and not (dtype is torch.bool and value.dtype is torch.uint8):
            message = f"{name} is {value.dtype}, and is declared as {dtype}"
            problems.append(Problem(message, hint=f"cast it: {name}.to({dtype})"))
        if value.device != device:
            problems.append(
                Problem(f"{name} is on {value.device}, q is on {device}", hint=f"{name}.to(q.device)")
            )
    if problems:
        raise LaunchError(problems)


def check_extents(declared: Declarations, inputs: Inputs, sizes: Sizes) -> None:
    """The part of `check_inputs` that holds in any precision and on any device."""
    check_parameters(declared, inputs)
    tensors = {tensor.name: value for tensor, value in zip(declared.tensors, inputs.tensors, strict=True)}
    check_tensors(tensors if inputs.sink is None else {**tensors, "sink": inputs.sink})
    problems = [
        problem
        for tensor, value in zip(declared.tensors, inputs.tensors, strict=True)
        for problem in _shape_problems(tensor.name, value, tensor.index, sizes)
    ]
    if inputs.sink is not None:
        problems.extend(_shape_problems("sink", inputs.sink, ("head",), sizes))
    if problems:
        raise LaunchError(problems)


def check_sorted(declared: Declarations, inputs: Inputs) -> None:
    """Whether tensors keep the promise of ``sorted: true``. Raises `LaunchError`; reads all of them."""
    problems = [
        Problem(
            f"{tensor.name} falls along kv, and is declared as sorted",
            hint="declare it without `sorted: true`; for the gallery's document write doc[q] == doc[kv], or "
            "number padding at the end above all documents",
        )
        for tensor, value in zip(declared.tensors, inputs.tensors, strict=True)
        if tensor.sorted and bool((value[..., 1:] < value[..., :-1]).any())
    ]
    if problems:
        raise LaunchError(problems)


def check_parameters(declared: Declarations, inputs: Inputs) -> None:
    """The part of `check_inputs` that shapes do not tell: all is given, numbers are finite and in range."""
    given = (len(inputs.tensors), len(inputs.params), inputs.sink is not None)
    if given != (len(declared.tensors), len(declared.parameters), declared.sink):
        tensors = ", ".join(tensor.name for tensor in declared.tensors)
        parameters = ", ".join(parameter.name for parameter in declared.parameters)
        raise LaunchError(
            f"this kernel takes the tensors [{tensors}], the parameters [{parameters}] and "
            f"{'a' if declared.sink else 'no'} sink; given are {given[0]} tensors, {given[1]} parameters and "
            f"{'a' if given[2] else 'no'} sink"
        )
    problems = [
        problem
        for parameter, number in zip(declared.parameters, inputs.params, strict=True)
        if (problem := _value_problem(parameter, number))
    ]
    if problems:
        raise LaunchError(problems)


def _name_problems(
    kind: str, given: Mapping[str, object], wanted: Sequence[str], declared: Declarations, name: str
) -> Iterator[Problem]:
    for missing in wanted:
        if missing not in given:
            argument = "tensors" if kind == "tensor" else "params"
            yield Problem(
                f"{name} reads the {kind} '{missing}', which is not given",
                hint=f"{argument}={{'{missing}': ...}}",
            )
    for unknown in given:
        if unknown not in wanted and unknown not in declared.unread:
            hint = did_you_mean(str(unknown), wanted, list(wanted)) if wanted else f"it takes no {kind}s"
            yield Problem(f"{name} reads no {kind} {quoted(str(unknown))}", hint=hint)


def _number_problems(params: Mapping[str, object]) -> Iterator[Problem]:
    for name, value in params.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            yield Problem(
                f"parameter '{name}' must be a number, but this is {value!r}",
                hint="an int or a float of Python, which is known without waiting for a GPU",
            )


def _floats(params: Mapping[str, float], names: Iterable[str]) -> tuple[float, ...]:
    try:
        return tuple([float(params[name]) for name in names])
    except OverflowError:
        large = [name for name in names if abs(params[name]) > sys.float_info.max]
        what = "is an integer beyond the range of floats"
        raise LaunchError([Problem(f"parameter '{name}' {what}") for name in large]) from None


def _value_problem(parameter: RuntimeParameter, number: float) -> Problem | None:
    what = f"parameter '{parameter.name}' must be"
    if parameter.kind == "float":
        if abs(number) <= torch.finfo(torch.float32).max:
            return None
        return Problem(f"{what} finite in fp32, but this is {number}")
    least = -_INT32_MAX - 1 if parameter.least is None else parameter.least
    if least <= number <= _INT32_MAX and number == int(number):
        return None
    return Problem(f"{what} an integer from {least} to 2^31 - 1, but this is {number:g}")


def _shape_problems(name: str, value: Tensor, index: Sequence[str | int], sizes: Sizes) -> Iterator[Problem]:
    layout = f"its axes are [{', '.join(map(str, index))}]"
    if value.dim() != len(index):
        yield Problem(f"{name} has shape {tuple(value.shape)}", hint=layout)
        return
    for position, axis in enumerate(index):
        wanted = sizes.length(axis)
        if value.shape[position] != wanted:
            what = f"axis {axis}" if isinstance(axis, str) else f"axis {position}"
            yield Problem(
                f"{name} has {value.shape[position]} elements along {what}, not {wanted}", hint=layout
            )


__all__ = [
    "INPUT_DTYPES",
    "NO_INPUTS",
    "Declarations",
    "Inputs",
    "Sizes",
    "arrange",
    "check_extents",
    "check_inputs",
    "check_parameters",
    "check_sorted",
    "numbers",
]
