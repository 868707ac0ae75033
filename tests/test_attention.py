"""What a spec's mask, score, parameters and tensors mean, what they are called, how they are written back."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
from stopwatch import within

from flashgen.spec import AttentionSpec, dump_spec, parse_spec
from flashgen.spec.attention import Attention
from flashgen.spec.functions import modulo
from flashgen.spec.inputs import RuntimeParameter, TensorInput
from flashgen.spec.symbols import BATCH, HEAD, HEAD_KV, KV, SCALE, SCORE, SEQLEN_KV, SEQLEN_Q, Q

TENSORS = {
    "slope": {"index": ["head"], "dtype": "fp32"},
    "bias": {"index": ["head", "q", "kv"], "dtype": "bf16", "grad": True},
    "near": {"index": ["head_kv", "q - kv"], "dtype": "fp16"},
    "doc": {"index": ["batch", "kv"], "dtype": "int32", "sorted": True},
    "keep": {"index": ["batch", "q", "kv"], "dtype": "bool"},
    "table": {"index": ["head", 32], "dtype": "fp32"},
    "least": {"index": [], "dtype": "int32"},
}
slope, bias, near, table = (sympy.Function(name, real=True) for name in ("slope", "bias", "near", "table"))
doc, keep, least = (sympy.Function(name, integer=True) for name in ("doc", "keep", "least"))


def attention(**fields: Any) -> Attention:
    return Attention(heads=4, head_dim=64, **{"tensors": TENSORS, **fields})


# -- what they mean ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "condition"),
    [
        ("kv <= q", KV <= Q),
        ("true", sympy.true),
        (True, sympy.true),
        ("causal", KV <= Q),
        ({"window": 7}, sympy.And(KV <= Q, Q - KV < 7)),
        ("window(2 * 3 + 1)", sympy.And(KV <= Q, Q - KV < 7)),
        ({"dilated": [5, 2]}, sympy.And(KV <= Q, Q - KV < 10, sympy.Eq(modulo(Q - KV, 2), 0))),
        ("causal and not window(4)", sympy.And(KV <= Q, sympy.Not(sympy.And(KV <= Q, Q - KV < 4)))),
        ("longformer(3, 1)", sympy.Or(sympy.Abs(Q - KV) <= 3, KV < 1, Q < 1)),
        ("where(head < 2, causal, full)", sympy.Or(sympy.And(HEAD < 2, KV <= Q), HEAD >= 2)),
        ("q_index < 4", Q - SEQLEN_KV + SEQLEN_Q < 4),
        ("kv < head_dim", KV < 64),
        ("head + head_kv == batch", sympy.Eq(HEAD + HEAD_KV, BATCH)),
        ("doc[q] == doc[kv]", sympy.Eq(doc(BATCH, Q), doc(BATCH, KV))),
        ("doc[batch, q + 1] == doc", sympy.Eq(doc(BATCH, Q + 1), doc(BATCH, KV))),
        ("document", sympy.Eq(doc(BATCH, Q), doc(BATCH, KV))),
        ("keep", sympy.Ne(keep(BATCH, Q, KV), 0)),
        ("not keep[q, kv]", sympy.Eq(keep(BATCH, Q, KV), 0)),
        ("keep[q, kv - 1] == 0", sympy.Eq(keep(BATCH, Q, KV - 1), 0)),
        ("kv < least", KV < least()),
    ],
)
def test_masks(mask: Any, condition: sympy.Basic) -> None:
    assert attention(mask=mask).condition == condition


def test_the_row_of_a_query_where_the_first_is_aligned_with_the_first_key() -> None:
    assert attention(mask="q_index < 4", align="top_left").condition == (Q < 4)


@pytest.mark.parametrize(
    ("score", "expr"),
    [
        ("score", SCORE),
        ("2 * score / scale", 2 * SCORE / SCALE),
        ("softcap(50)", 50 * sympy.tanh(SCORE / 50)),
        ({"softcap": "1/2"}, sympy.tanh(2 * SCORE) / 2),
        ("score + slope[head] * (kv - q)", SCORE + slope(HEAD) * (KV - Q)),
        ("score + slope * (kv - q)", SCORE + slope(HEAD) * (KV - Q)),
        ("score + bias", SCORE + bias(HEAD, Q, KV)),
        ("score + bias[q + 1, kv]", SCORE + bias(HEAD, Q + 1, KV)),
        ("score + near", SCORE + near(HEAD_KV, Q - KV)),
        ("score + near[q - kv // 2]", SCORE + near(HEAD_KV, Q - sympy.floor(KV / 2))),
        ("score + table[floor(score)]", SCORE + table(HEAD, sympy.floor(SCORE))),
        ("score + table[head, 3]", SCORE + table(HEAD, 3)),
        ("alibi + softcap(1) - score", slope(HEAD) * (KV - Q) + sympy.tanh(SCORE)),
        ("where(causal, score, -score)", sympy.Piecewise((SCORE, KV <= Q), (-SCORE, True))),
    ],
)
def test_scores(score: Any, expr: sympy.Expr) -> None:
    assert attention(score=score).score_expr == expr


def test_inputs_are_those_that_are_read_by_name() -> None:
    inputs = attention(mask="doc[q] == doc[kv] and padding", score="score + bias").inputs
    assert inputs == (
        TensorInput("bias", ("head", "q", "kv"), "bf16", grad=True),
        TensorInput("doc", ("batch", "kv"), "int32", sorted=True),
        TensorInput("kv_len", ("batch",), "int32"),
    )
    assert attention(mask="causal").inputs == ()


def test_a_declared_tensor_replaces_that_of_the_gallery() -> None:
    tensors = {"doc": {"index": ["kv"], "dtype": "int32"}}
    told = attention(mask="document", tensors=tensors)
    assert told.inputs == (TensorInput("doc", ("kv",), "int32"),)
    assert told.condition == sympy.Eq(doc(Q), doc(KV)) and told.mask_label == "document"


@pytest.mark.parametrize("index", [[], ["head"], ["q", "kv"], ["batch", "head_kv", "q", "kv"], ["q - kv"]])
def test_a_declared_tensor_may_have_other_axes_than_that_of_the_gallery(index: list[str]) -> None:
    tensors = {"bias": {"index": index, "dtype": "fp32"}}
    told = attention(score="dense_bias", tensors=tensors)
    assert told.score_expr == attention(score="score + bias", tensors=tensors).score_expr
    assert told.score_label == "dense_bias"


def test_a_tensor_may_have_a_name_of_the_gallery_and_nothing_else_of_it() -> None:
    tensors = {"doc": {"index": ["q", "kv"], "dtype": "int32"}, "t5_table": {"index": [], "dtype": "bool"}}
    told = attention(mask="doc[q, kv] == 1", score="where(t5_table, score, 2 * score)", tensors=tensors)
    assert told.mask_label.startswith("mask") and told.score_label.startswith("score")


def test_a_declared_name_comes_before_the_gallery() -> None:
    assert attention(mask="kv <= q and q - kv < window", params={"window": 9}).mask_label == "window9"
    assert attention(mask="window(window)", params={"window": 9}).mask_label == "window9"


@pytest.mark.parametrize(
    ("fields", "runtime"),
    [
        ({"mask": "window(n)", "params": {"n": "runtime"}}, RuntimeParameter("n", "int", 1)),
        ({"mask": "kv < n", "params": {"n": {"runtime": "int", "min": 0}}}, RuntimeParameter("n", "int", 0)),
        ({"mask": "kv < n * q", "params": {"n": {"runtime": "float"}}}, RuntimeParameter("n", "float")),
        ({"score": "softcap(n)", "params": {"n": "runtime"}}, RuntimeParameter("n", "float")),
        ({"score": "score * (q // n)", "params": {"n": "runtime"}}, RuntimeParameter("n", "int", 1)),
        ({"score": "score + table[n]", "params": {"n": "runtime"}}, RuntimeParameter("n", "int", 1)),
        ({"score": "score * n", "params": {"n": {"runtime": "int"}}}, RuntimeParameter("n", "int", 1)),
        (
            {"mask": "kv < n", "score": "score * n", "params": {"n": "runtime"}},
            RuntimeParameter("n", "int", 1),
        ),
        ({"mask": "causal", "params": {"n": "runtime"}}, None),
    ],
)
def test_runtime_parameters(fields: dict[str, Any], runtime: RuntimeParameter | None) -> None:
    told = attention(**fields)
    assert told.runtime == ((runtime,) if runtime else ())
    symbols = told.condition.free_symbols | told.score_expr.free_symbols
    assert runtime is None or runtime.symbol in symbols


def test_constants_are_exact() -> None:
    told = attention(score="score * a + b", params={"a": 0.1, "b": "1e-3"})
    assert told.score_expr == SCORE / 10 + sympy.Rational(1, 1000) and told.runtime == ()


def test_a_named_score_can_ask_for_a_sink() -> None:
    assert attention(score="sink").sink and attention(sink=True).sink and not attention().sink
    assert attention(score="sink").score_label == ""


# -- labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "label"),
    [
        ("true or kv < 3", "full"),
        ("q >= kv", "causal"),
        ("kv < q + 1", "causal"),
        ("full and causal", "causal"),
        ("kv <= q and kv > q - 4096", "window4096"),
        ("window(n)", "window_n"),
        ("abs(kv - q) < 5", "band4"),
        ("natten_2d(16, 8, 2)", "natten_2d_16_8_2"),
        ("document and causal", "causal_and_document"),
        ("causal or band(n + 1)", "band"),
        ("kv < 3 * q", "mask"),
        ("causal and band(1) and chunked(5) and full and padding", "mask"),
    ],
)
def test_mask_labels(mask: str, label: str) -> None:
    told = attention(mask=mask, params={"n": "runtime"}).mask_label
    assert told.isidentifier()
    assert told == label or (label in ("mask", "band") and told.startswith(label) and told != label)


@pytest.mark.parametrize(
    ("score", "label"),
    [
        ("score + 0", ""),
        ("50 * tanh(score / 50)", "softcap50"),
        ("softcap(0.5)", "softcap0p5"),
        ("softcap(n)", "softcap_n"),
        ("softcap(-1.5)", "softcap1p5"),
        ("score + slope * kv - slope * q", "score"),
        ("score * 3", "score"),
    ],
)
def test_score_labels(score: str, label: str) -> None:
    told = attention(score=score, params={"n": "runtime"}).score_label
    assert not told or told.isidentifier()
    assert told == label or (label == "score" and len(told) == len("score") + 8)


def test_labels_tell_masks_apart() -> None:
    texts = [f"kv < {n} * q" for n in range(2, 9)] + ["kv < least * q", "kv < n * q", "kv <= 2 * q"]
    assert len({attention(mask=t, params={"n": "runtime"}).mask_label for t in texts}) == len(texts)


# -- round trips -------------------------------------------------------------------------------------------

WRITTEN = """\
flashgen: 1
name: a
attention:
  heads: 4
  head_dim: 64
  dtype: bf16
  scale: 1/sqrt(head_dim)
  mask: kv <= q and doc[q] == doc[kv] and q - kv < n
  score: cap*tanh((score + bias)/cap)
  params: {cap: 0.5, n: {runtime: int, min: 0}, unused: runtime}
  tensors: {doc: {index: [batch, kv], dtype: int32, sorted: true}, bias: {index: [head, q - kv], dtype: bf16, grad: true}}
  sink: true
  align: bottom_right
"""  # noqa: E501


def test_dump() -> None:
    spec = parse_spec(WRITTEN)
    assert dump_spec(spec).startswith(WRITTEN)
    assert parse_spec(dump_spec(spec)) == spec and hash(parse_spec(dump_spec(spec))) == hash(spec)
    other = parse_spec(WRITTEN.replace("min: 0", "min: 2"))
    assert other != spec and other.attention.runtime != spec.attention.runtime


def test_the_same_from_python() -> None:
    spec = parse_spec(WRITTEN)
    built = AttentionSpec(
        name="a",
        attention={
            "heads": 4,
            "head_dim": 64,
            "mask": spec.attention.mask,
            "score": "cap*tanh((score + bias)/cap)",
            "params": {"cap": 0.5, "n": {"runtime": "int", "min": 0}, "unused": "runtime"},
            "tensors": dict(spec.attention.tensors),
            "sink": True,
        },
    )
    assert built == spec
    with pytest.raises(TypeError):
        spec.attention.params["cap"] = 3  # type: ignore[index]


# -- limits ------------------------------------------------------------------------------------------------

LARGE = [
    "kv < max(" + ", ".join(f"(q + {i}) // {i + 2}" for i in range(16)) + ")",
    " and ".join(f"kv - {i} * q < {i % 5}" for i in range(16)),
    " or ".join(f"kv == q - {i * i}" for i in range(16)),
    "*".join(f"(q + kv + {i})" for i in range(25)) + " < 3",
    "(((q + 1)**16 + kv)**2 + kv)**2 < 3",
    "(q + kv)" + "".join(f" % {i + 3}" for i in range(25)) + " < 3",
]


@pytest.mark.parametrize("mask", LARGE)
def test_the_largest_masks_are_labelled_and_derived_in_time(mask: str) -> None:
    with within(5):
        told = attention(mask=mask)
        assert told.mask_label.startswith("mask") and told.derivation.route in ("bounds", "map")
