"""The torch op: ``flashgen::forward``.

One op serves every kernel. Which one is named by a string that depends on nothing but the spec and its plan,
so that a graph that torch.compile has cached on disk finds the same kernel in another process. Registered
flat through `torch.library.Library`: the `custom_op` decorator costs 20 us of host time a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashgen.errors import LaunchError
from flashgen.runtime.arguments import check_layout
from flashgen.runtime.inputs import Inputs
from flashgen.runtime.layouts import Outputs

_SCHEMA = (
    "forward(Tensor q, Tensor k, Tensor v, float? scale, str kernel, bool return_lse, Tensor[] inputs, "
    "float[] params, Tensor? sink, Tensor[] prepared) -> (Tensor, Tensor)"
)


class Runnable(Protocol):
    """What the op needs of a kernel."""

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, return_lse: bool,
        inputs: Inputs | None = None, /,
    ) -> Outputs: ...  # fmt: skip


_kernels: dict[str, Runnable] = {}


def register(key: str, kernel: Runnable) -> None:
    """Let the op find `kernel` under `key`."""
    _kernels[key] = kernel


def registered(key: str) -> Runnable:
    """The kernel of a key. Raises `LaunchError` where there is none."""
    if key not in _kernels:
        raise LaunchError(
            f"no kernel {key!r} in this process",
            hint="a compiled graph needs the same flashgen.load(...) that it was compiled with",
        )
    return _kernels[key]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, kernel: str, return_lse: bool,
    inputs: Sequence[Tensor], params: Sequence[float], sink: Tensor | None, prepared: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    given = None
    if inputs or params or sink is not None or prepared:
        given = Inputs(tuple(inputs), tuple(params), sink, tuple(prepared))
    o, lse = registered(kernel).run(q, k, v, scale, return_lse, given)
    if lse is None or not return_lse:
        lse = q.new_empty(0, dtype=torch.float32)
    return o, lse


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, kernel: str, return_lse: bool,
    inputs: Sequence[Tensor], params: Sequence[float], sink: Tensor | None, prepared: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_layout(q, k, v)
    batch, seqlen_q, heads_q, _ = q.shape
    o = q.new_empty(batch, seqlen_q, heads_q, v.shape[3])
    lse_shape = (batch, heads_q, seqlen_q) if return_lse else (0,)
    return o, q.new_empty(lse_shape, dtype=torch.float32)


def _forward_autograd(
    keyset: torch._C.DispatchKeySet,
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, kernel: str, return_lse: bool,
    inputs: Sequence[Tensor], params: Sequence[float], sink: Tensor | None, prepared: Sequence[Tensor],
) -> Any:  # fmt: skip
    tensors = (q, k, v, *inputs, *(() if sink is None else (sink,)))
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if not wanted and forward_ad._current_level >= 0:
        wanted = any(_has_tangent(tensor) for tensor in tensors)
    if wanted:
        raise LaunchError(
            "flashgen has no backward for this kernel yet, and a gradient is needed",
            hint="call it under torch.no_grad(), or with q.detach(), k.detach(), v.detach()",
        )
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.flashgen.forward.default.redispatch(
            keyset & torch._C._after_autograd_keyset,
            q, k, v, scale, kernel, return_lse, inputs, params, sink, prepared,
        )  # fmt: skip


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


_library = torch.library.Library("flashgen", "DEF")  # type: ignore[no-untyped-call]
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
_library.impl("forward", _forward, "CPU")  # type: ignore[no-untyped-call]
_library.impl("forward", _forward, "CUDA")  # type: ignore[no-untyped-call]
_library.impl("forward", _forward_autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]
torch.library.register_fake("flashgen::forward", _forward_fake, lib=_library)

__all__ = ["Runnable", "register", "registered"]
