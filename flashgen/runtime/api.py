"""`load` and `attention`, the two ways to a kernel from Python; and `prepare`, for the second."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from operator import index
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from flashgen.build import artifact
from flashgen.errors import LaunchError, SpecError
from flashgen.plan import KernelPlan, plan_from_dict
from flashgen.runtime import ops
from flashgen.runtime.arguments import bypasses_dispatcher, check_call, is_plain
from flashgen.runtime.formula import (
    Expression,
    Formula,
    Given,
    GivenTensor,
    bare,
    formula_of,
    given_tensor,
    json_text,
    tables,
    texts_of,
)
from flashgen.runtime.inputs import Inputs, Sizes, numbers
from flashgen.runtime.kernel import Kernel
from flashgen.runtime.preparation import Prepared, check_is_prepared, check_use
from flashgen.runtime.shaped import Order, ShapedAttention
from flashgen.spec import AttentionSpec, load_spec, parse_spec

Mask = str | Mapping[str, Any]

_of_key: dict[str, ShapedAttention] = {}


def load(source: str | os.PathLike[str] | AttentionSpec) -> Kernel:
    """A spec as a callable op.

    Args:
        source: an `AttentionSpec`; the path of a YAML spec; or a folder that ``flashgen build`` wrote, whose
            plan is taken as it is and whose cubin is used if it is there and whole.

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
    causal: bool = ..., mask: Expression | None = ..., window: int | None = ...,
    score: Expression | None = ..., tensors: Mapping[str, GivenTensor] | None = ...,
    params: Mapping[str, float] | None = ..., sink: Tensor | None = ..., scale: float | None = ...,
    prepared: Prepared | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    causal: bool = ..., mask: Expression | None = ..., window: int | None = ...,
    score: Expression | None = ..., tensors: Mapping[str, GivenTensor] | None = ...,
    params: Mapping[str, float] | None = ..., sink: Tensor | None = ..., scale: float | None = ...,
    prepared: Prepared | None = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    causal: bool = False, mask: Expression | None = None, window: int | None = None,
    score: Expression | None = None, tensors: Mapping[str, GivenTensor] | None = None,
    params: Mapping[str, float] | None = None, sink: Tensor | None = None, scale: float | None = None,
    prepared: Prepared | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(score(scale * Q K^T), masked) V with a kernel made for these tensors.

    The first call with new head dims, dtype, formula or order of magnitude of the lengths solves and compiles
    a kernel (seconds; the cubin is cached on disk). Every other call finds it by shape.

        attention(q, k, v, mask="causal and document", tensors={"doc": doc})
        attention(q, k, v, mask=lambda q, kv: (kv <= q) & (q - kv < 4096), score="softcap(50)")
        attention(q, k, v, score="score + slope[head] * (kv - q)", tensors={"slope": slope}, causal=True)

    Args:
        q: [batch, seqlen_q, heads_q, head_dim_qk], bf16 or fp16; head dims are multiples of 8 up to 256.
        k: [batch, seqlen_kv, heads_kv, head_dim_qk]; heads_q is a multiple of heads_kv (GQA, MQA).
        v: [batch, seqlen_kv, heads_kv, head_dim_v].
        causal: keep the keys up to each query; the last query is aligned with the last key.
        window: of those, keep the last `window`; implies `causal`.
        mask: any mask of the spec language, instead of the two: text, ``{"window": 4096}``, or a Python
            function of the language's variables (see `flashgen.spec.trace`). What a function reads from
            around it counts as it is at the call; under torch.compile, its globals as they are at tracing.
        score: what becomes of ``score = scale * (Q . K)`` before the softmax; text or function likewise.
        tensors: what mask and score read, by name: fp32, fp16, bf16, int32 or bool. The axes are those that
            its subscripts name (``bias[head, q, kv]``; one or two leading dimensions more are the batch and
            the head), or the gallery's, or given: ``{"bias": (bias, ["head", "q", "kv"])}``. The gallery's
            ``document`` promises that `doc` never falls; of others write ``doc[q] == doc[kv]``.
        params: numbers that mask and score name. Another value needs no other kernel; a number written in the
            text makes a kernel of its own, which may be faster.
        sink: logits that join the softmax's denominator, fp32 [heads_q].
        scale: positive; 1/sqrt(head_dim_qk) where `None`.
        prepared: what `prepare` returned for the same arguments: layers that share a mask prepare it once.
        return_lse: also return the logarithm of the softmax's denominators.

    Returns:
        o [batch, seqlen_q, heads_q, head_dim_v] in q's dtype, contiguous; with `return_lse` also lse
        [batch, heads_q, seqlen_q], fp32, natural logarithm. A row with every key masked gives 0 and -inf (the
        sink, where there is one).

    Raises `SpecError` for a mask, score or head_dim that there is no kernel for, `LaunchError` for tensors
    that do not fit or where a gradient is needed.
    """
    if score is not None or tensors or params or sink is not None or prepared is not None or callable(mask):
        chosen = _chosen_mask(causal, mask, window)
        key, inputs = _resolved(chosen, score, tensors or {}, params or {}, sink)
        if prepared is not None:
            check_is_prepared(prepared)
            key, inputs = prepared.kernel, _with_prepared(key, inputs, prepared)
            check_use(prepared, key, Sizes.of(q, k, "bottom_right"), inputs.params)
        if bypasses_dispatcher(q, k, v) and is_plain(inputs.all_tensors()):
            o, lse = ops.registered(key).run(q, k, v, scale, return_lse, inputs)
        else:
            check_call(q, k, v, inputs.sink)
            o, lse = torch.ops.flashgen.forward(
                q, k, v, scale, key, return_lse, inputs.tensors, inputs.params, inputs.sink, inputs.prepared
            )
    elif bypasses_dispatcher(q, k, v):
        o, lse = _shaped(causal, mask, window).run(q, k, v, scale, return_lse)
    else:
        check_call(q, k, v)
        key = _key(causal, mask, window)
        o, lse = torch.ops.flashgen.forward(q, k, v, scale, key, return_lse, (), (), None, ())
    return (o, lse) if return_lse else o  # type: ignore[return-value]


def prepare(
    q: Tensor, k: Tensor, v: Tensor, *,
    causal: bool = False, mask: Expression | None = None, window: int | None = None,
    score: Expression | None = None, tensors: Mapping[str, GivenTensor] | None = None,
    params: Mapping[str, float] | None = None, sink: Tensor | None = None,
) -> Prepared:  # fmt: skip
    """What a mask needs besides its tensors (ranges of keys, lists of tiles), for calls of `attention` with
    the same arguments: layers that share a mask, or the replays of a CUDA graph.

        prepared = prepare(q, k, v, mask="document", tensors={"doc": doc})
        attention(q, k, v, mask="document", tensors={"doc": doc}, prepared=prepared)

    Arguments as for `attention`; of q, k and v only dtypes, shapes and strides matter. That the tensors hold
    the same values is the caller's promise. Nothing is computed where the mask needs nothing.

    Raises as `attention` does.
    """
    chosen = _chosen_mask(causal, mask, window)
    key, inputs = _resolved(chosen, score, tensors or {}, params or {}, sink)
    named = dict(zip(tensors or {}, inputs.tensors, strict=True))
    return _of_key[key].kernel_for(q, k, v).prepare(q, k, v, tensors=named, params=params, sink=sink)


def _resolved(
    mask: Expression, score: Expression | None, tensors: Mapping[str, GivenTensor],
    params: Mapping[str, float], sink: Tensor | None,
) -> tuple[str, Inputs]:  # fmt: skip
    """The key of a formula, and what it reads, in its order."""
    texts = _texts(mask, score, tuple(tensors), tuple(params))
    given = tuple(given_tensor(name, tensor) for name, tensor in tensors.items())
    values = tuple(bare(tensor) for tensor in tensors.values())
    # under torch.compile, index() makes a number of a symbolic length
    lengths = tuple(index(values[at].shape[dim]) for at, dim in _tables(texts, given))
    key = _formula_key(texts, given, lengths, tuple(params), sink is not None)
    return key, Inputs(values, numbers(params), sink)


def _with_prepared(key: str, inputs: Inputs, prepared: Prepared) -> Inputs:
    """A formula's inputs in the order of the kernel that something was prepared for, and that beside them."""
    tensors, params = _order(key, prepared.kernel)
    return Inputs(
        tuple(inputs.tensors[at] for at in tensors),
        tuple(inputs.params[at] for at in params),
        inputs.sink,
        prepared.tensors,
    )


# torch.compile runs the next five while tracing, and keeps what they return.


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _texts(
    mask: Expression, score: Expression | None, tensors: tuple[str, ...], params: tuple[str, ...]
) -> tuple[str, str]:
    return texts_of(mask, score, tensors, params)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _tables(texts: tuple[str, str], given: tuple[Given, ...]) -> tuple[tuple[int, int], ...]:
    return tables(texts, given)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _formula_key(
    texts: tuple[str, str],
    given: tuple[Given, ...],
    lengths: tuple[int, ...],
    params: tuple[str, ...],
    sink: bool,
) -> str:
    return _of_formula(formula_of(texts, given, lengths, params, sink)).key


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _order(key: str, kernel: str) -> Order:
    return _of_key[key].order_of(kernel)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _key(causal: bool, mask: Mask | None, window: int | None) -> str:
    return _shaped(causal, mask, window).key


def _shaped(causal: bool, mask: Mask | None, window: int | None) -> ShapedAttention:
    try:
        return _of_mask(causal, mask, window)
    except TypeError:  # a mapping cannot be hashed
        return _of_formula(Formula(json_text(_chosen_mask(causal, mask, window), "mask")))


@cache
def _of_mask(causal: bool, mask: Mask | None, window: int | None) -> ShapedAttention:
    return _of_formula(Formula(json_text(_chosen_mask(causal, mask, window), "mask")))


@cache
def _of_formula(formula: Formula) -> ShapedAttention:
    attention = ShapedAttention(formula)
    _of_key[attention.key] = attention
    return attention


def _chosen_mask(causal: bool, mask: Any, window: int | None) -> Any:
    if mask is not None and (causal or window is not None):
        raise LaunchError("`mask` says it all; `causal` and `window` cannot be given beside it")
    if mask is not None:
        return mask
    if window is not None:
        return {"window": window}
    return "causal" if causal else "full"


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


__all__ = ["attention", "load", "prepare"]
