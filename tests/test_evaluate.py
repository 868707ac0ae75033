"""Masks and scores on torch tensors, against Python's own arithmetic; and the reference against torch's."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import sympy
import torch
from attention_cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgen.arch import arch
from flashgen.errors import LaunchError
from flashgen.plan import solve
from flashgen.runtime import interpret, reference
from flashgen.runtime.elements import Box, Elements
from flashgen.runtime.evaluate import evaluate
from flashgen.runtime.inputs import Declarations, Inputs, Sizes, arrange, check_inputs
from flashgen.spec.expression import Kind, parse_expression
from flashgen.spec.functions import modulo, sigmoid
from flashgen.spec.inputs import RuntimeParameter, TensorInput
from flashgen.spec.symbols import BATCH, HEAD, HEAD_KV, KV, SCORE, SCORE_VARIABLES, Q

ROWS, KEYS = torch.arange(-5, 35)[:, None], torch.arange(30)[None, :]


def parsed(text: str, kind: Kind) -> sympy.Basic:
    return parse_expression(text, names=dict(SCORE_VARIABLES), expect=kind)


# -- integers and conditions -------------------------------------------------------------------------------

CONDITIONS = (
    "kv <= q and q // 8 == kv // 8",
    "not (q % 3 > 0 or abs(q - kv) >= max(2, min(kv, 5)))",
    "q / 3 <= kv and 2 * kv / 7 < q / 2 + 1/3",
    "(q - 7) // 3 == (kv - 7) % 3",
    "where(q < 9, kv, q - kv) % 4 == 1 or q == kv",
    "q != kv and (3 * q) % -5 < (kv * kv) // 7 - 2",
    "floor(q / 2 + kv / 3) < 9",
    "q / where(kv % 3 < 2, 3, 49) + kv / 49 >= where(q < 9, 1/49, 1)",
    "floor(q / where(kv % 3 < 2, where(q < 5, 7, 49), 3)) == kv // 49",
    "floor(sqrt(kv) / 2 + 0.01) <= 2 and q ** 2 >= kv ** 3",
    "true",
    "false",
)


def python_text(text: str) -> str:
    """The expression as Python reads it; the tests' own text, so that eval may be trusted with it."""
    return text.replace("true", "True").replace("false", "False")


@pytest.mark.parametrize("text", CONDITIONS)
def test_conditions_are_those_of_python(text: str) -> None:
    def where(test: bool, then: Any, otherwise: Any) -> Any:
        return then if test else otherwise

    functions = {"where": where, "floor": math.floor, "sqrt": math.sqrt}
    expected = [
        [
            eval(python_text(text), {**functions, "q": Fraction(q), "kv": Fraction(kv)})
            for kv in KEYS.flatten().tolist()
        ]
        for q in ROWS.flatten().tolist()
    ]
    value = evaluate(parsed(text, Kind.BOOLEAN), {"q": ROWS, "kv": KEYS})
    assert value.dtype == torch.bool
    assert torch.equal(value.expand(40, 30), torch.tensor(expected))


@settings(deadline=None, max_examples=60)
@given(a=st.integers(-50, 50), b=st.integers(-20, 20).filter(bool), c=st.integers(-50, 50))
def test_division_and_remainder_are_floored(a: int, b: int, c: int) -> None:
    quotient, rest = sympy.floor((a * Q + c) / b), modulo(a * Q + c, sympy.Integer(b))
    rows = torch.arange(-40, 40)
    expected = [((a * q + c) // b, (a * q + c) % b) for q in rows.tolist()]
    for expr, column in zip((quotient, rest), zip(*expected, strict=True), strict=True):
        assert evaluate(expr, {"q": rows}).expand(80).tolist() == list(column)


@pytest.mark.parametrize(
    "text", ["q // kv < 3", "q % kv < 3", "floor(q / (kv - 3)) < 3", "5 % kv + 7 // kv < 3"]
)
def test_a_divisor_of_0_leaves_the_others_as_they_are(text: str) -> None:
    """Its own element is not defined."""
    condition = parsed(text, Kind.BOOLEAN)
    whole = evaluate(condition, {"q": ROWS, "kv": KEYS}).expand(40, 30)
    for column in range(30):
        if column != (3 if "3)" in text else 0):
            alone = evaluate(condition, {"q": ROWS, "kv": KEYS[:, column : column + 1]}).expand(40, 1)
            assert torch.equal(whole[:, column : column + 1], alone)


@pytest.mark.parametrize(
    "mask", ["q // kv < 3", "(q + 40) % head < 3 or kv < 2", "q // (batch * kv_len) < kv"]
)
def test_the_interpreter_and_the_reference_outlast_a_divisor_of_0(mask: str) -> None:
    inputs = {"kv_len": {"index": ["batch"], "dtype": "int32"}} if "kv_len" in mask else {}
    case = Case(mask=mask, inputs=inputs, heads_kv=2, batch=2, seqlen_q=40, seqlen_kv=40)
    q, k, v = case.tensors()
    tensors = {name: torch.tensor([0, 20], dtype=torch.int32) for name in inputs}
    o, lse = reference(case.spec(), q, k, v, tensors=tensors)
    assert not o.isnan().any() and not lse.isnan().any()
    o, lse = interpret(solve(case.spec(), arch("sm_80")), q, k, v, tensors=tensors)
    assert not o.isnan().any() and not lse.isnan().any()


def test_large_integers_are_exact() -> None:
    big = 2**31 - 1
    value = evaluate(parsed(f"(q * {big}) % 1000003 == ({big} * q) % 1000003", Kind.BOOLEAN), {"q": ROWS})
    assert bool(value.all())
    assert evaluate(Q * big**2, {"q": torch.tensor(2)}).item() == 2 * big**2


def test_what_is_not_listed_is_refused() -> None:
    with pytest.raises(TypeError, match="sin"):
        evaluate(sympy.sin(Q) < KV, {"q": ROWS, "kv": KEYS})
    with pytest.raises(TypeError, match="reads a tensor"):
        evaluate(sympy.Function("bias", real=True)(Q), {"q": ROWS})


# -- numbers -----------------------------------------------------------------------------------------------

SCORES = {
    "50 * tanh(score / 50)": lambda s, q, kv: 50 * torch.tanh(s / 50),
    "score + (kv - q) / 16": lambda s, q, kv: s + (kv - q) / 16,
    "score * sigmoid(score) - exp(score / 3)": lambda s, q, kv: s * torch.sigmoid(s) - torch.exp(s / 3),
    "where(q - kv < 4, score, -abs(score))": lambda s, q, kv: torch.where(q - kv < 4, s, -s.abs()),
    "log(1 + score ** 2) - sqrt(abs(q - kv))": lambda s, q, kv: (
        (1 + s**2).log() - (q - kv).abs().double().sqrt()
    ),
    "max(score, min(q, kv), 0.5) / (1 + score ** 2)": lambda s, q, kv: (
        torch.maximum(torch.maximum(s, torch.minimum(q, kv).double()), torch.tensor(0.5).double())
        / (1 + s**2)
    ),
    "score + where(kv < q, 0.1, 0.7)": lambda s, q, kv: s + torch.where(kv < q, s * 0 + 0.1, s * 0 + 0.7),
    "exp(log(2) * score)": lambda s, q, kv: 2**s,
    "score * floor(log(max(q - kv, 1)))": lambda s, q, kv: s * (q - kv).clamp(1).double().log().floor(),
}  # fmt: skip


@pytest.mark.parametrize("text", SCORES)
@pytest.mark.parametrize("real", [torch.float64, torch.float32])
def test_scores_are_those_of_torch(text: str, real: torch.dtype) -> None:
    score = torch.randn(3, 40, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value = evaluate(parsed(text, Kind.REAL), {"q": ROWS, "kv": KEYS, "score": score.to(real)}, real=real)
    assert value.dtype == real
    expected = SCORES[text](score, ROWS, KEYS).double().expand(value.shape)
    tolerance = 1e-12 if real == torch.float64 else 1e-5
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)


def test_autograd_follows() -> None:
    score = torch.randn(20, 30, dtype=torch.float64, requires_grad=True)
    expr = parsed("where(kv <= q, 5 * tanh(score / 5), score / 2)", Kind.REAL)
    values = {"q": torch.arange(20)[:, None], "kv": torch.arange(30)}
    assert torch.autograd.gradcheck(lambda s: evaluate(expr, {**values, "score": s}), score)


# -- tensors -----------------------------------------------------------------------------------------------

SIZES = Sizes(batch=2, heads_q=4, heads_kv=2, seqlen_q=5, seqlen_kv=8, q_offset=3)
WHOLE = Box.whole(SIZES)


def elements(tensors: dict[str, tuple[tuple[str | int, ...], torch.Tensor]], **params: float) -> Elements:
    declared = Declarations(
        tuple(
            TensorInput(name, index, "fp32" if value.is_floating_point() else "int32")
            for name, (index, value) in tensors.items()
        ),
        tuple(RuntimeParameter(name, "float") for name in params),
    )
    inputs = Inputs(tuple(value for _, value in tensors.values()), tuple(params.values()))
    check_inputs(declared, inputs, SIZES, torch.device("cpu"))
    return Elements(declared, inputs, SIZES, scale=0.5, real=torch.float64, device=torch.device("cpu"))


def read(name: str, *subscripts: Any, integer: bool = False) -> sympy.Expr:
    kind = {"integer": True} if integer else {"real": True}
    return sympy.Function(name, **kind)(*subscripts)


def test_subscripts_are_positions() -> None:
    row, key, distance = torch.arange(5.0), torch.arange(8.0), torch.arange(12.0)
    scene = elements({"row": (("q",), row), "key": (("kv",), key), "far": (("q - kv",), distance)})
    for place in ((0, 0, 0, 0), (1, 3, 4, 7), (0, 2, 2, 5)):
        *_, i, j = place
        q = i + 3
        expected = {
            read("row", Q): i,
            read("key", KV): j,
            read("far", Q - KV): q - j - (3 - 7),  # the least distance is that of row 0 and key 7
            read("key", Q): q,
        }
        for expr, value in expected.items():
            assert scene.at(expr, WHOLE).expand(2, 4, 5, 8)[place] == value


def test_a_subscript_outside_reads_the_nearest_element() -> None:
    scene = elements({"key": (("kv",), torch.arange(8.0)), "table": ((4,), torch.arange(4.0))})
    assert scene.at(read("key", Q + 100), WHOLE).unique().tolist() == [7.0]
    assert scene.at(read("key", Q - 100), WHOLE).unique().tolist() == [0.0]
    assert scene.at(read("table", KV - 2), WHOLE).flatten().tolist() == [0, 0, 0, 1, 2, 3, 3, 3]


def test_heads_and_batches() -> None:
    values = torch.arange(2 * 4 * 5 * 8.0).reshape(2, 4, 5, 8)
    strided = values.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    index = ("batch", "head", "q", "kv")
    scene = elements({"dense": (index, strided), "shared": (("head_kv",), torch.tensor([10, 20]).int())})
    assert torch.equal(scene.at(read("dense", BATCH, HEAD, Q, KV), WHOLE), values.double())
    shared = scene.at(read("shared", HEAD_KV, integer=True), WHOLE)
    assert shared.flatten().tolist() == [10, 10, 20, 20] and shared.dtype == torch.int64


def test_a_box_is_a_part_of_the_whole() -> None:
    bias = torch.randn(4, 5, 8)
    scene = elements({"bias": (("head", "q", "kv"), bias)}, cap=3.0)
    cap = sympy.Symbol("cap", real=True)
    expr = cap * sympy.tanh(read("bias", HEAD, Q, KV) * (Q - KV) / cap) * (BATCH + 1)
    part = Box(range(1, 2), range(1, 3), range(2, 5), range(4, 8))
    whole = scene.at(expr, WHOLE).expand(2, 4, 5, 8)
    torch.testing.assert_close(scene.at(expr, part).expand(1, 2, 3, 4), whole[1:2, 1:3, 2:5, 4:8])


# -- what is given, and what is declared -------------------------------------------------------------------

DECLARED = Declarations(
    (TensorInput("bias", ("head", "q", "kv"), "bf16"), TensorInput("doc", ("batch", "kv"), "int32")),
    (RuntimeParameter("window", "int", 1), RuntimeParameter("cap", "float")),
    sink=True,
)
RIGHT: dict[str, Any] = {
    "tensors": {"bias": torch.zeros(4, 5, 8, dtype=torch.bfloat16), "doc": torch.zeros(2, 8).int()},
    "params": {"window": 3, "cap": 2.0},
    "sink": torch.zeros(4),
}


def given_and_checked(**changes: Any) -> Inputs:
    inputs = arrange(DECLARED, **{**RIGHT, **changes}, name="mine")
    check_inputs(DECLARED, inputs, SIZES, torch.device("cpu"))
    return inputs


def test_names_are_put_in_order() -> None:
    inputs = given_and_checked(tensors=dict(reversed(RIGHT["tensors"].items())))
    assert inputs.tensors[0] is RIGHT["tensors"]["bias"] and inputs.tensors[1] is RIGHT["tensors"]["doc"]
    assert inputs.params == (3.0, 2.0) and inputs.sink is RIGHT["sink"]


BIAS, DOC = RIGHT["tensors"]["bias"], RIGHT["tensors"]["doc"]
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing tensor": ({"tensors": {"bias": BIAS}}, r"mine reads the tensor 'doc', which is not given"),
    "unknown tensor": (
        {"tensors": {"bias": BIAS, "doc": DOC, "dok": DOC}},
        r"mine reads no tensor .dok.\n    did you mean 'doc'",
    ),
    "missing parameter": ({"params": {"cap": 1}}, r"the parameter 'window', which is not given"),
    "unknown parameter": ({"params": {"cap": 1, "window": 1, "x": 1}}, r"reads no parameter .x."),
    "no sink": ({"sink": None}, r"mine has a sink, and none is given"),
    "sink of other heads": ({"sink": torch.zeros(3)}, r"sink has 3 elements along axis head, not 4"),
    "sink of another dtype": ({"sink": torch.zeros(4).half()}, r"sink is torch.float16.*float32"),
    "shape": (
        {"tensors": {"bias": BIAS[:, :4], "doc": DOC}},
        r"bias has 4 elements along axis q, not 5\n    its axes are \[head, q, kv\]",
    ),
    "rank": ({"tensors": {"bias": BIAS[0], "doc": DOC}}, r"bias has shape \(5, 8\)\n.*head, q, kv"),
    "dtype": ({"tensors": {"bias": BIAS.float(), "doc": DOC}}, r"bias is torch.float32.*bfloat16"),
    "int64": (
        {"tensors": {"bias": BIAS, "doc": DOC.long()}},
        r"doc is torch.int64[^$]*doc.to\(torch.int32\)",
    ),
    "device": ({"tensors": {"bias": BIAS.to("meta"), "doc": DOC}}, r"bias is on meta, q is on cpu"),
    "fraction": ({"params": {"window": 2.5, "cap": 1}}, r"'window' must be an integer from 1 .* 2\.5"),
    "too small": ({"params": {"window": 0, "cap": 1}}, r"'window' must be an integer from 1 .* this is 0"),
    "too large": ({"params": {"window": 2**31, "cap": 1}}, r"'window' must be an integer from 1 to 2\^31"),
    "not finite": ({"params": {"window": 1, "cap": math.inf}}, r"'cap' must be finite in fp32"),
    "nan": ({"params": {"window": math.nan, "cap": math.nan}}, r"'window' must be an integer[^$]*'cap'"),
    "not a number": ({"params": {"window": "3", "cap": True}}, r"'window' must be a number[^$]*'cap'"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_is_told(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        given_and_checked(**change)


def test_nothing_declared_takes_nothing() -> None:
    with pytest.raises(LaunchError, match=r"reads no tensor .doc.[^$]*it takes no tensors"):
        arrange(Declarations(), {"doc": DOC}, None, None, name="plain")
    with pytest.raises(LaunchError, match=r"plain has no sink"):
        arrange(Declarations(), None, None, torch.zeros(4), name="plain")


# -- the reference -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_reference_agrees_with_torch(causal: bool) -> None:
    case = Case(mask="causal" if causal else "full", heads_kv=2, group=3, batch=2, seqlen_q=90, seqlen_kv=90)
    q, k, v = case.tensors()
    heads_first = (tensor.double().transpose(1, 2) for tensor in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, is_causal=causal, enable_gqa=True
    )
    torch.testing.assert_close(reference(case.spec(), q, k, v)[0], expected.transpose(1, 2))


def test_reference_agrees_with_torch_under_a_bias() -> None:
    case = Case(
        mask="doc[q] == doc[kv] and kv <= q",
        score="score + bias[head, q, kv]",
        inputs={
            "bias": {"index": ["head", "q", "kv"], "dtype": "fp32"},
            "doc": {"index": ["batch", "kv"], "dtype": "int32"},
        },
        heads_kv=2, group=2, batch=2, seqlen_q=50, seqlen_kv=50,
    )  # fmt: skip
    q, k, v = case.tensors()
    bias, doc = torch.randn(4, 50, 50), (torch.arange(100).reshape(2, 50) // 17).int()
    o, lse = reference(case.spec(), q, k, v, tensors={"bias": bias, "doc": doc})
    kept = (doc[:, :, None] == doc[:, None, :]).tril()[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.double().transpose(1, 2) for t in (q, k, v)),
        attn_mask=bias.double().masked_fill(~kept, -math.inf), enable_gqa=True,
    )  # fmt: skip
    torch.testing.assert_close(o, expected.transpose(1, 2))
    assert lse.isfinite().all()


def test_a_sink_is_a_key_without_a_value() -> None:
    case = Case(mask="causal", sink=True, heads_kv=2, group=2, seqlen_q=20, seqlen_kv=12)
    q, k, v = case.tensors()
    sink = torch.randn(4)
    o, lse = reference(case.spec(), q, k, v, sink=sink)
    plain, plain_lse = reference(
        Case(mask="causal", heads_kv=2, group=2, seqlen_q=20, seqlen_kv=12).spec(), q, k, v
    )
    torch.testing.assert_close(
        lse, torch.logaddexp(plain_lse, sink.double()[:, None].expand(plain_lse.shape))
    )
    torch.testing.assert_close(o, plain * (plain_lse - lse).exp().transpose(1, 2)[..., None])
    assert torch.equal(lse[..., :8], sink.double()[:, None].expand(1, 4, 8)) and not o[:, :8].any()


def test_the_sigmoid_is_torchs() -> None:
    x = torch.linspace(-90, 90, 181, dtype=torch.float64)
    assert torch.equal(evaluate(sigmoid(SCORE), {"score": x}), torch.sigmoid(x))
