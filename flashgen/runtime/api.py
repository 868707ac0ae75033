"""`load` and `attention`: the two ways to a kernel from Python."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from flashgen.build import artifact
from flashgen.errors import LaunchError, SpecError
from flashgen.plan import KernelPlan, plan_from_dict
from flashgen.runtime import ops
from flashgen.runtime.arguments import DTYPES, Signature, bypasses_dispatcher, check_layout, signature
from flashgen.runtime.kernel import Kernel
from flashgen.runtime.launch import LAUNCHES_MAX
from flashgen.runtime.layouts import Outputs, Run
from flashgen.spec import AttentionSpec, load_spec, parse_spec

Mask = str | Mapping[str, Any]

_SEQLEN_BUCKETS = (128, 32768)  # tiles follow the length, by powers of two between these
_BATCH_BUCKETS = (1, 64)
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def load(source: str | os.PathLike[str] | AttentionSpec) -> Kernel:
    """A spec as a callable op.

    Args:
        source: an `AttentionSpec`; the path of a YAML spec; or a folder that ``flashgen build`` wrote, whose
        plan is
            taken as it is and whose cubin is used if it is there and whole.

    Raises `SpecError` and `PlanError` for what is wrong with the spec. Nothing is compiled before the first
    call.
    """
    if isinstance(source, AttentionSpec):
        return Kernel(source)
    path = Path(source)
    return _load_folder(path) if path.is_dir() else Kernel(load_spec(path))


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    causal: bool = ..., mask: Mask | None = ..., window: int | None = ..., scale: float | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    causal: bool = ..., mask: Mask | None = ..., window: int | None = ..., scale: float | None = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    causal: bool = False, mask: Mask | None = None, window: int | None = None, scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(scale * Q K^T + mask) V with a kernel made for these tensors.

    The first call with new head dims, dtype, mask or order of magnitude of the lengths solves and compiles a
    kernel (seconds; the cubin is cached on disk). Every other call finds it by shape.

    Args:
        q: [batch, seqlen_q, heads_q, head_dim_qk], bf16 or fp16; head dims are multiples of 8 up to 256.
        k: [batch, seqlen_kv, heads_kv, head_dim_qk]; heads_q is a multiple of heads_kv (GQA, MQA).
        v: [batch, seqlen_kv, heads_kv, head_dim_v].
        causal: keep the keys up to each query; the last query is aligned with the last key.
        window: of those, keep the last `window`; implies `causal`.
        mask: any mask of the spec language, instead of the two.
        scale: positive; 1/sqrt(head_dim_qk) where `None`.
        return_lse: also return the logarithm of the softmax's denominators.

    Returns:
        o [batch, seqlen_q, heads_q, head_dim_v] in q's dtype, contiguous; with `return_lse` also lse
        [batch, heads_q, seqlen_q], fp32, natural logarithm. A row with every key masked gives 0 and -inf.

    Raises `SpecError` for a mask or head_dim that there is no kernel for, `LaunchError` for tensors that do
    not fit or where a gradient is needed.
    """
    if bypasses_dispatcher(q, k, v):
        o, lse = _shaped(causal, mask, window).run(q, k, v, scale, return_lse)
    else:
        o, lse = torch.ops.flashgen.forward(
            q, k, v, scale, _key(causal, mask, window), return_lse, (), (), None, ()
        )
    return (o, lse) if return_lse else o  # type: ignore[return-value]


class ShapedAttention:
    """One mask; a kernel for each head_dim, dtype, ratio of heads and order of magnitude of the lengths."""

    def __init__(self, mask: Mask) -> None:
        self.key = f"attention/{json.dumps(mask, sort_keys=True)}"
        self._mask = mask
        self._kernels: dict[tuple[object, ...], Kernel] = {}
        self._launches: dict[Signature, Run] = {}
        ops.register(self.key, self)

    def run(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, return_lse: bool) -> Outputs:
        """The op without its dispatcher: o, and lse or `None`."""
        key = signature(q, k, v)
        launch = self._launches.get(key)
        if launch is None:
            launch = self.kernel_for(q, k, v).launch_for(q, k, v)
            if len(self._launches) >= LAUNCHES_MAX:
                self._launches.clear()
            self._launches[key] = launch
        return launch(q, k, v, scale, return_lse)

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
                "mask": self._mask,
            },
            "workload": {"batch": batch, "seqlen": {"q": seqlens[0], "kv": seqlens[1]}},
        }
        return AttentionSpec(name="attention", **parts)


def _shaped(causal: bool, mask: Mask | None, window: int | None) -> ShapedAttention:
    try:
        return _of_mask(causal, mask, window)
    except TypeError:  # a mapping cannot be hashed
        return _of_text(json.dumps(_chosen_mask(causal, mask, window), sort_keys=True))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _key(causal: bool, mask: Mask | None, window: int | None) -> str:
    """torch.compile runs this while tracing, and keeps the key."""
    return _shaped(causal, mask, window).key


@cache
def _of_mask(causal: bool, mask: Mask | None, window: int | None) -> ShapedAttention:
    return _of_text(json.dumps(_chosen_mask(causal, mask, window), sort_keys=True))


@cache
def _of_text(mask: str) -> ShapedAttention:
    return ShapedAttention(json.loads(mask))


def _chosen_mask(causal: bool, mask: Mask | None, window: int | None) -> Mask:
    if mask is not None and (causal or window is not None):
        raise LaunchError("`mask` says it all; `causal` and `window` cannot be given beside it")
    if mask is not None:
        return mask
    if window is not None:
        return {"window": window}
    return "causal" if causal else "full"


def _bucket(length: int, limits: tuple[int, int]) -> int:
    """The next power of two, within limits."""
    low, high = limits
    return min(max(1 << max(length - 1, 0).bit_length(), low), high)


def _load_folder(folder: Path) -> Kernel:
    path = folder / artifact.MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        spec, plan = _from_manifest(manifest, str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(
            f"{folder} is not a folder that `flashgen build` wrote: {type(error).__name__}: {error}",
            hint="load a YAML spec, or a folder with a manifest.json",
        ) from None
    try:
        cubin = artifact.read(folder)
    except artifact.DamagedArtifactError:  # cubins are not committed; a damaged one is built again
        cubin = None
    return Kernel(spec, plan=plan, cubin=cubin)


def _from_manifest(manifest: Mapping[str, Any], filename: str) -> tuple[AttentionSpec, KernelPlan]:
    # JSON is YAML: the spec is read by the one parser, with its messages.
    return parse_spec(json.dumps(manifest["spec"]), filename), plan_from_dict(manifest["plan"])


__all__ = ["ShapedAttention", "attention", "load"]
