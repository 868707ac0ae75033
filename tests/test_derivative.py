"""Gradients in float64: sympy's derivatives of the scores against torch's autograd."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import sympy
import torch
from attention_cases import GALLERY_CASES, Case
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from flashgen.errors import SpecError
from flashgen.runtime.derivative import reference_gradients
from flashgen.runtime.elements import Box, Elements
from flashgen.runtime.evaluate import evaluate
from flashgen.runtime.inputs import Declarations, Sizes, arrange
from flashgen.runtime.reference import reference
from flashgen.spec import AttentionSpec
from flashgen.spec.derivative import derivative, score_derivatives
from flashgen.spec.expression import Kind, parse_expression
from flashgen.spec.functions import sigmoid
from flashgen.spec.inputs import TensorInput
from flashgen.spec.printer import to_text
from flashgen.spec.symbols import HEAD, KV, SCORE, SCORE_VARIABLES, Q

SCORED = {name: parts for name, parts in GALLERY_CASES.items() if "score" in parts or parts.get("sink")}


def learned(parts: dict[str, Any]) -> dict[str, Any]:
    """The case with a gradient wanted of every tensor that can have one."""
    tensors = {
        name: {**tensor, "grad": tensor["dtype"] not in ("int32", "bool")}
        for name, tensor in parts.get("inputs", {}).items()
    }
    return {**parts, "inputs": tensors}


def case_of(name: str, **changes: Any) -> Case:
    sizes = {"head_dim_qk": 16, "head_dim_v": 24, "heads_kv": 2, "group": 2, "batch": 2}
    return Case(**{**sizes, "seqlen_q": 37, "seqlen_kv": 53, **learned(dict(SCORED[name])), **changes})


def autograd_output(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Any, params: Any, sink: Tensor | None
) -> Tensor:
    """The textbook, once more, in a form that autograd has no trouble with: nothing is infinite."""
    declared, sizes = Declarations.of(spec), Sizes.of(q, k, spec.attention.align)
    inputs = arrange(declared, tensors, params, sink, name="autograd")
    elements = Elements(declared, inputs, sizes, scale=spec.scale, real=torch.float64, device=q.device)
    group = sizes.heads_q // sizes.heads_kv
    queries, keys, values = (
        q.transpose(1, 2), *(t.transpose(1, 2).repeat_interleave(group, 1) for t in (k, v)),
    )  # fmt: skip
    score, box = queries @ keys.mT * spec.scale, Box.whole(sizes)
    kept = elements.at(spec.attention.condition, box).expand(score.shape)
    logits = elements.at(spec.attention.score_expr, box, {"score": score}).masked_fill(~kept, -1e300)
    if sink is not None:
        logits = torch.cat([logits, sink[None, :, None, None].expand(*logits.shape[:3], 1)], -1)
    p = torch.softmax(logits, -1)[..., : score.shape[-1]].masked_fill(~kept, 0.0)
    return (p @ values).transpose(1, 2)


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("lengths", [(37, 53), (53, 37)], ids=["more keys", "more queries"])
def test_gradients_are_those_of_autograd(name: str, lengths: tuple[int, int]) -> None:
    case = case_of(name, seqlen_q=lengths[0], seqlen_kv=lengths[1])
    spec, qkv, inputs = case.spec(), case.tensors(), case.given()
    wanted = [tensor.name for tensor in spec.attention.inputs if tensor.grad]
    do = torch.randn(2, lengths[0], 4, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = reference_gradients(spec, *qkv, do, **inputs)

    leaves = [tensor.double().requires_grad_() for tensor in qkv]
    tensors = {
        key: value.double().requires_grad_() if key in wanted else value
        for key, value in inputs["tensors"].items()
    }
    sink = None if inputs["sink"] is None else inputs["sink"].double().requires_grad_()
    o = autograd_output(spec, *leaves, tensors, inputs["params"], sink)
    torch.testing.assert_close(o.detach(), reference(spec, *qkv, **inputs)[0])
    o.backward(do)
    for leaf, gradient in zip(leaves, (found.q, found.k, found.v), strict=True):
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-9, atol=1e-11)
    assert list(found.tensors) == wanted
    for key in wanted:
        torch.testing.assert_close(found.tensors[key], tensors[key].grad, rtol=1e-9, atol=1e-11)
    assert (found.sink is None) == (sink is None)
    if sink is not None:
        torch.testing.assert_close(found.sink, sink.grad, rtol=1e-9, atol=1e-11)


def test_every_kind_of_tensor_is_differentiated() -> None:
    learned_tensors = {
        (tensor.index, tensor.dtype)
        for name in SCORED
        for tensor in case_of(name).spec().attention.inputs
        if tensor.grad
    }
    assert {axis for index, _ in learned_tensors for axis in index if isinstance(axis, str)} == {
        "batch", "head", "head_kv", "q", "kv", "q - kv",
    }  # fmt: skip
    assert {dtype for _, dtype in learned_tensors} == {"fp32", "fp16", "bf16"}


def test_rows_without_a_key_have_no_gradient() -> None:
    case = case_of("softcap", seqlen_q=40, seqlen_kv=10)
    q, k, v = case.tensors()
    do = torch.ones(2, 40, 4, 24)
    gradients = reference_gradients(case.spec(), q, k, v, do)
    assert not gradients.q[:, :30].any() and gradients.q[:, 31:].any()
    for gradient in (gradients.q, gradients.k, gradients.v):
        assert gradient.isfinite().all()


def test_rows_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("relative_bias")
    do = torch.ones(2, 37, 4, 24)
    whole = reference_gradients(case.spec(), *case.tensors(), do, **case.given())
    monkeypatch.setattr(sys.modules["flashgen.runtime.reference"], "_ROWS", 8)  # not the function
    parts = reference_gradients(case.spec(), *case.tensors(), do, **case.given())
    for name in ("q", "k", "v"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name))
    torch.testing.assert_close(whole.tensors["distance_bias"], parts.tensors["distance_bias"])


# -- derivatives themselves --------------------------------------------------------------------------------

X = sympy.Symbol("x", real=True)


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        (SCORE, 1),
        (SCORE * Q - KV, Q),
        (50 * sympy.tanh(SCORE / 50), 1 - sympy.tanh(SCORE / 50) ** 2),
        (sympy.exp(2 * SCORE), 2 * sympy.exp(2 * SCORE)),
        (sympy.log(1 + SCORE**2), 2 * SCORE / (1 + SCORE**2)),
        (sympy.sqrt(X) * SCORE, sympy.sqrt(X)),
        (sigmoid(SCORE), sigmoid(SCORE) * (1 - sigmoid(SCORE))),
        (sympy.floor(SCORE) * SCORE, sympy.floor(SCORE)),
        (KV + sympy.Max(Q, 3), 0),
        (SCORE + sympy.Function("table", real=True)(HEAD, sympy.floor(SCORE)), 1),
    ],
    ids=str,
)
def test_closed_forms(expr: sympy.Expr, expected: Any) -> None:
    assert sympy.simplify(derivative(expr, SCORE) - expected) == 0


def test_reads_are_told_apart() -> None:
    table, other = (sympy.Function(name, real=True) for name in ("table", "other"))
    score = SCORE * table(HEAD, 3) + table(HEAD, 3) ** 2 + table(HEAD, Q) * other(KV)
    found = score_derivatives(score, {"table"})
    assert found.score == table(HEAD, 3)
    assert dict(found.reads) == {table(HEAD, 3): SCORE + 2 * table(HEAD, 3), table(HEAD, Q): other(KV)}


def test_no_derivative_of_what_the_language_lacks() -> None:
    with pytest.raises(TypeError, match="no derivative of besselj"):
        derivative(sympy.besselj(SCORE, SCORE), SCORE)


@pytest.mark.parametrize("name", SCORED)
def test_derivatives_are_of_the_language(name: str) -> None:
    """They print as text that is read back to the same, so that they can be printed as CUDA too."""
    attention = case_of(name).spec().attention
    found = score_derivatives(
        attention.score_expr, {tensor.name for tensor in attention.inputs if tensor.grad}
    )
    names = {**SCORE_VARIABLES, **{parameter.name: parameter.symbol for parameter in attention.runtime}}
    tensors = {tensor.name: tensor for tensor in attention.inputs}
    for slope in (found.score, *(slope for _, slope in found.reads)):
        again = parse_expression(to_text(slope), names=names, tensors=tensors, expect=Kind.REAL)
        assert to_text(again) == to_text(slope)


NUMBERS = st.sampled_from(["score", "score", "0.5", "q", "kv / 8", "bias[head]", "(q - kv)", "2"])


def _larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pair = st.tuples(inner, inner)
    return st.one_of(
        pair.map(lambda ab: f"({ab[0]} + {ab[1]})"),
        pair.map(lambda ab: f"({ab[0]} - {ab[1]})"),
        pair.map(lambda ab: f"({ab[0]} * {ab[1]})"),
        pair.map(lambda ab: f"{ab[0]} / (1 + abs({ab[1]}))"),
        pair.map(lambda ab: f"max({ab[0]}, {ab[1]})"),
        pair.map(lambda ab: f"min({ab[0]}, {ab[1]}, score)"),
        pair.map(lambda ab: f"where({ab[0]} < {ab[1]} + 0.3, {ab[1]}, {ab[0]} * score)"),
        inner.map(lambda a: f"tanh({a} / 4)"),
        inner.map(lambda a: f"sigmoid({a})"),
        inner.map(lambda a: f"exp(-abs({a}))"),
        inner.map(lambda a: f"log(1 + ({a}) ** 2)"),
        inner.map(lambda a: f"sqrt(2 + ({a}) ** 2)"),
        inner.map(lambda a: f"({a}) * floor({a})"),
    )


@settings(max_examples=150, deadline=None)
@given(text=st.recursive(NUMBERS, _larger, max_leaves=5), seed=st.integers(0, 2**31))
def test_composed_scores_against_autograd(text: str, seed: int) -> None:
    bias = TensorInput("bias", ("head",), "fp32")
    names = {"names": dict(SCORE_VARIABLES), "tensors": {"bias": bias}}
    try:
        expr = parse_expression(text, expect=Kind.REAL, **names)
    except SpecError as error:  # products with floors double what stands in them, up to the limits
        assert re.search("are read|in one comparison or score|in all|in each other|nested deeper", str(error))
        reject()
    element = bias.function(HEAD)
    generator = torch.Generator().manual_seed(seed)
    # Off the integers and halves, where floors and choices have kinks.
    score, value = (torch.randn(40, generator=generator, dtype=torch.float64) * 3 + 0.0123 for _ in range(2))
    rows, keys = (torch.randint(0, 30, (40,), generator=generator) for _ in range(2))
    values = {"q": rows, "kv": keys, "head": rows % 4}

    def at(expr: sympy.Expr) -> Tensor:
        return evaluate(expr, {**values, "score": score}, read=lambda *_: value).double()

    score.requires_grad_()
    value.requires_grad_()
    result = at(expr)
    wanted = [score, value]
    if result.requires_grad:
        gradients = torch.autograd.grad(result.sum(), wanted, allow_unused=True)
    else:
        gradients = (None, None)
    for variable, gradient in zip((SCORE, element), gradients, strict=True):
        slope = at(derivative(expr, variable)).detach().expand(40)
        expected = torch.zeros(40).double() if gradient is None else gradient
        torch.testing.assert_close(slope, expected, rtol=1e-7, atol=1e-9)
