"""Tensors to try the gallery with: for tests, and for pictures of what a mask does."""

from __future__ import annotations

from typing import Any

import numpy as np
import sympy

from flashgen.spec.evaluation import evaluate
from flashgen.spec.expression import Kind, parse_expression
from flashgen.spec.gallery import SAMPLES
from flashgen.spec.inputs import TensorInput


def sample_tensor(
    tensor: TensorInput, *, batch: int, heads_q: int, heads_kv: int, seqlen_q: int, seqlen_kv: int
) -> np.ndarray[Any, Any] | None:
    """What a tensor of the gallery might hold; None where the gallery has none of its name.

    The array is int64 for integers and float64 for numbers: what the tensor's own dtype makes of it is for
    the caller to say.
    """
    if tensor.name not in SAMPLES:
        return None
    sizes = {"heads_q": heads_q, "heads_kv": heads_kv, "seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv}
    lengths = {
        "batch": batch,
        "head": heads_q,
        "head_kv": heads_kv,
        "q": seqlen_q,
        "kv": seqlen_kv,
        "q - kv": seqlen_q + seqlen_kv - 1,
    }
    shape = tuple(axis if isinstance(axis, int) else lengths[axis] for axis in tensor.index)
    values: dict[str, Any] = (
        dict.fromkeys(("batch", "head", "head_kv", "q", "kv", "distance", "i"), 0) | sizes
    )
    for place, (axis, length) in enumerate(zip(tensor.index, shape, strict=True)):
        name = "i" if isinstance(axis, int) else "distance" if axis == "q - kv" else axis
        values[name] = np.arange(length).reshape([-1 if other == place else 1 for other in range(len(shape))])
    names = {name: sympy.Symbol(name, integer=True) for name in values}
    element = evaluate(parse_expression(SAMPLES[tensor.name], names=names, expect=Kind.REAL), values)
    return np.array(np.broadcast_to(element, shape))


__all__ = ["sample_tensor"]
