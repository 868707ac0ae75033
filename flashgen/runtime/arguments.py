"""What may be passed to a kernel: shapes, dtypes, devices, and which layouts are taken as they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.overrides import is_tensor_like

from flashgen.codegen.extents import HEADS, POSITIONS
from flashgen.errors import LaunchError, Problem
from flashgen.plan.model import KernelPlan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Signature = tuple[object, ...]

# Bound here: each is asked at every call, and looking it up costs as much as asking.
_is_grad_enabled = torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_function_mode_enabled = torch._C._is_torch_function_mode_enabled
_transform = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state

_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_LAYOUT = "[batch, seqlen, heads, head_dim]"


def signature(q: Tensor, k: Tensor, v: Tensor) -> Signature:
    """Everything that a prepared launch depends on, apart from the addresses. Cheap to make and to hash.

    Strides of contiguous tensors follow from their shapes, but for axes of one element, along which nothing
    steps.
    """
    dtype, device = q.dtype, q.device
    if k.dtype is dtype and v.dtype is dtype and k.device == device and v.device == device:
        if q.is_contiguous() and k.is_contiguous() and v.is_contiguous():
            return q.shape, k.shape, v.shape, dtype, device
        return q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), dtype, device
    return q.shape, k.shape, v.shape, dtype, k.dtype, v.dtype, device, k.device, v.device  # fits no kernel


def bypasses_dispatcher(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a call may go straight to the launch instead of through `torch.ops`.

    The dispatcher with its two Python kernels (Autograd, CUDA) costs more host time than all the rest of a
    call. It has nothing to do for plain CUDA tensors when nobody traces, transforms, records or
    differentiates.
    """
    return not (
        is_compiling()
        or type(q) not in _PLAIN
        or type(k) not in _PLAIN
        or type(v) not in _PLAIN
        or not q.is_cuda
        or (_is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        or forward_ad._current_level >= 0
        or _dispatch_modes()
        or _is_function_mode_enabled()
        or _transform() is not None
        or _tracing_state() is not None
    )


def is_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether a mask's or a score's tensors, too, leave nothing for the dispatcher to do."""
    grad = _is_grad_enabled()
    return all(type(tensor) in _PLAIN and not (grad and tensor.requires_grad) for tensor in tensors)


def check_call(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None = None, inputs: Iterable[tuple[str, Tensor]] = ()
) -> None:
    """Whether what goes to torch's dispatcher are tensors. Raises `LaunchError`."""
    check_tensors({"q": q, "k": k, "v": v, **dict(inputs), **({} if sink is None else {"sink": sink})})


def check_tensors(given: Mapping[str, object]) -> None:
    """Whether all are tensors, of which torch's dispatcher says less. Raises `LaunchError`."""
    if problems := list(type_problems(given)):
        raise LaunchError(problems)


def type_problems(given: Mapping[str, object]) -> Iterator[Problem]:
    """What is no tensor, by name."""
    for name, value in given.items():
        if not is_tensor_like(value):  # type: ignore[no-untyped-call]
            hint = None if value is None else f"torch.as_tensor({name}) makes one of an array or a list"
            yield Problem(f"{name} is a {type(value).__name__}, not a tensor", hint=hint)


def rank_problems(given: Mapping[str, Tensor]) -> Iterator[Problem]:
    """What has not the four dimensions of q, k and v, by name; what is no tensor has none."""
    if problems := list(type_problems(given)):
        yield from problems
        return
    for name, tensor in given.items():
        if tensor.dim() != 4:
            yield Problem(f"{name} has shape {tuple(tensor.shape)}; expected {_LAYOUT}")


def check_layout(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What must hold for every kernel. Raises `LaunchError` with all that is wrong."""
    if problems := list(_layout_problems(q, k, v)):
        raise LaunchError(problems)


def check_kernel(q: Tensor, k: Tensor, v: Tensor, plan: KernelPlan, *, name: str) -> None:
    """Whether the tensors are those that a plan is for. Raises `LaunchError` with all that is wrong.

    Batch, lengths and the number of heads are free; only the ratio of the heads belongs to the kernel.
    """
    check_layout(q, k, v)
    layout = f"the layout is {_LAYOUT}; or change the spec"
    problems = []
    if q.dtype != DTYPES[plan.dtype]:
        hint = f"cast them: q.to({DTYPES[plan.dtype]})"
        problems.append(Problem(f"{name} computes in {plan.dtype}; the tensors are {q.dtype}", hint=hint))
    for label, tensor, expected in (("q", q, plan.head_dim_qk), ("v", v, plan.head_dim_v)):
        if tensor.shape[3] != expected:
            message = f"{label} has head_dim {tensor.shape[3]}; {name} was built for {expected}"
            problems.append(Problem(message, hint=layout))
    if q.shape[2] != plan.group * k.shape[2]:
        ratio = f"{plan.group} query heads per K/V head"
        message = f"q has {q.shape[2]} heads and k has {k.shape[2]}; {name} was built for {ratio}"
        problems.append(Problem(message, hint=layout))
    if problems:
        raise LaunchError(problems)


def check_scale(scale: float) -> None:
    """The kernels take the row maximum before scaling, which needs a positive scale. Raises `LaunchError`."""
    if not 0 < scale < math.inf:
        raise LaunchError(
            f"scale must be positive and finite, not {scale!r}", hint="leave it out for 1/sqrt(head_dim)"
        )


def _layout_problems(q: Tensor, k: Tensor, v: Tensor) -> Iterator[Problem]:
    tensors = {"q": q, "k": k, "v": v}
    wrong_rank = list(rank_problems(tensors))
    yield from wrong_rank
    if list(type_problems(tensors)):
        return
    if q.dtype not in DTYPES.values():
        yield Problem(
            f"q is {q.dtype}; flashgen computes in bfloat16 and float16", hint="cast it: q.to(torch.bfloat16)"
        )
    for label in ("k", "v"):
        if tensors[label].dtype != q.dtype:
            yield Problem(
                f"{label} is {tensors[label].dtype}, q is {q.dtype}", hint=f"cast it: {label}.to(q.dtype)"
            )
        if tensors[label].device != q.device:
            yield Problem(
                f"{label} is on {tensors[label].device}, q is on {q.device}", hint=f"{label}.to(q.device)"
            )
    if wrong_rank:
        return
    for label in ("k", "v"):
        if tensors[label].shape[0] != q.shape[0]:
            yield Problem(
                f"{label} has batch {tensors[label].shape[0]}, q has {q.shape[0]}",
                hint=f"the layout is {_LAYOUT}",
            )
    if k.shape[1] != v.shape[1]:
        yield Problem(f"k has {k.shape[1]} keys, v has {v.shape[1]}", hint=f"the layout is {_LAYOUT}")
    if k.shape[2] != v.shape[2]:
        yield Problem(f"k has {k.shape[2]} heads, v has {v.shape[2]}", hint=f"the layout is {_LAYOUT}")
    if q.shape[3] != k.shape[3]:
        yield Problem(f"q has head_dim {q.shape[3]}, k has {k.shape[3]}", hint=f"the layout is {_LAYOUT}")
    if (q.shape[2] == 0) != (k.shape[2] == 0) or (k.shape[2] and q.shape[2] % k.shape[2]):
        yield Problem(
            f"q has {q.shape[2]} heads, which is no multiple of k's {k.shape[2]}",
            hint=f"the layout is {_LAYOUT}",
        )
    for label, tensor in tensors.items():
        sizes = (("batch", POSITIONS), ("seqlen", POSITIONS), ("heads", HEADS))
        for (name, limit), size in zip(sizes, tensor.shape, strict=False):
            if size >= limit:
                yield Problem(f"{label} has {name} {size:,}; kernels count to {limit - 1:,}")


__all__ = [
    "DTYPES",
    "Signature",
    "bypasses_dispatcher",
    "check_call",
    "check_kernel",
    "check_layout",
    "check_scale",
    "check_tensors",
    "is_plain",
    "rank_problems",
    "signature",
    "type_problems",
]
