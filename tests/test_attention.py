"""What a spec's mask, score, parameters and tensors mean, and every mistake in them at its place."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import sympy
from click.testing import CliRunner

from flashgen.cli import main
from flashgen.errors import Location, SpecError
from flashgen.spec import AttentionSpec, dump_spec, mathematics, parse_spec
from flashgen.spec.attention import Attention
from flashgen.spec.functions import modulo
from flashgen.spec.gallery import GALLERY, Entry
from flashgen.spec.inputs import RuntimeParameter, TensorInput
from flashgen.spec.symbols import BATCH, HEAD, HEAD_KV, KV, SCALE, SCORE, SEQLEN_KV, SEQLEN_Q, Q

ROOT = Path(__file__).resolve().parent.parent
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
        ("not keep[q, kv] or keep[kv, q] == 0", sympy.Or(sympy.Eq(keep(BATCH, Q, KV), 0), sympy.Eq(keep(BATCH, KV, Q), 0))),
        ("kv < least", KV < least()),
    ],
)  # fmt: skip
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
        ("score + bias[kv, q]", SCORE + bias(HEAD, KV, Q)),
        ("score + near", SCORE + near(HEAD_KV, Q - KV)),
        ("score + near[q - kv // 2]", SCORE + near(HEAD_KV, Q - sympy.floor(KV / 2))),
        ("score + table[floor(score)]", SCORE + table(HEAD, sympy.floor(SCORE))),
        ("score + table[head, 3]", SCORE + table(HEAD, 3)),
        ("alibi + softcap(1)", SCORE + slope(HEAD) * (KV - Q) + sympy.tanh(SCORE)),
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
        ({"mask": "kv < n", "score": "score * n", "params": {"n": "runtime"}}, RuntimeParameter("n", "int", 1)),
        ({"mask": "causal", "params": {"n": "runtime"}}, None),
    ],
)  # fmt: skip
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


# -- mistakes ----------------------------------------------------------------------------------------------

BASE = """\
flashgen: 1
name: a
attention:
  heads: 4
  head_dim: 64
  mask: causal
  score: score
  params: {size: 64, cap: runtime}
  tensors:
    slope: {index: [head], dtype: fp32}
    bias: {index: [head, q, kv], dtype: bf16}
    doc: {index: [batch, kv], dtype: int32}
    table: {index: [head, 32], dtype: fp32}
    keep: {index: [kv], dtype: bool}
"""


@pytest.mark.parametrize(
    ("old", "new", "line", "column", "message", "hint"),
    [
        # names
        ("mask: causal", "mask: casual", 6, 9, 'unknown name "casual"', "did you mean 'causal'? allowed: q, kv"),
        ("mask: causal", "mask: kv <= q and q - kv < siz", 6, 30, 'unknown name "siz"', "'size'?"),
        ("mask: causal", "mask: >\n    kv <= q and\n    kv < siz", 8, 10, 'unknown name "siz"', "'size'?"),
        ("mask: causal", "mask: windw(3)", 6, 9, 'unknown function "windw"', "did you mean 'window'?"),
        ("mask: causal", "mask: {windw: 3}", 6, 9, 'unknown function "windw"', "did you mean 'window'?"),
        ("mask: causal", "mask: score < 3", 6, 9, 'unknown name "score"', ""),
        ("mask: causal", "mask: alibi", 6, 9, "'alibi' is a score", ""),
        ("mask: causal", "mask: true and softcap(3)", 6, 18, "'softcap' is a score", ""),
        ("mask: causal", "mask: doc[q] == docs[kv]", 6, 19, 'unknown tensor "docs"', "did you mean 'doc'?"),
        ("mask: causal", "mask: size[q] < 3", 6, 9, "'size' is no tensor", ""),
        ("mask: causal", "mask: (q + kv)[q] < 3", 6, 9, "a subscript of anything but a tensor", ""),
        ("score: score", "score: scor + 1", 7, 10, 'unknown name "scor"', "did you mean 'score'?"),
        ("mask: causal", "mask: __import__('os').system('id')", 6, 20, "is not part of the expression language", ""),
        ("mask: causal", "mask: __import__(q)", 6, 9, 'unknown function "__import__"', ""),
        ("mask: causal", "mask: q.__class__ < kv", 6, 9, "attribute access", ""),
        # kinds
        ("mask: causal", "mask: kv", 6, 9, "expected a condition, but this is an integer", ""),
        ("mask: causal", "mask: kv < causal", 6, 14, "expected a number, but this is a condition", "where("),
        ("mask: causal", "mask: kv < keep", 6, 14, "expected a number, but this is a condition", ""),
        ("mask: causal", "mask: keep == (kv < q)", 6, 9, "expected a number, but this is a condition", ""),
        ("score: score", "score: score < 3", 7, 10, "expected a number, but this is a condition", ""),
        ("score: score", "score: score + (kv < q)", 7, 19, "expected a number, but this is a condition", ""),
        ("score: score", "score: score + causal", 7, 18, "expected a number, but this is a condition", ""),
        ("score: score", "score: score // 2", 7, 10, "'//' divides integers, but this is a number", "floor"),
        ("score: score", "score: slope[head] * kv", 7, 10, "the score leaves 'score' out", "score + bias"),
        # subscripts
        ("score: score", "score: score + slope[q]", 7, 24, "out of its place", "only that name may stand"),
        ("score: score", "score: score + bias[q]", 7, 18, "a subscript is missing: the axes of 'bias'", ""),
        ("score: score", "score: score + bias[q, head, kv]", 7, 32, "out of its place", ""),
        ("score: score", "score: score + bias[kv, q, q]", 7, 30, "one subscript too many", ""),
        ("score: score", "score: score + bias[score, kv]", 7, 23, "a subscript must be an integer", "floor"),
        ("score: score", "score: score + bias[q < 3, kv]", 7, 23, "expected a number", ""),
        ("score: score", "score: score + table", 7, 18, "'table' needs a subscript: its axes are [head, 32]", ""),
        ("score: score", "score: score + bias[q:kv]", 7, 24, "is not part of the expression language", ""),
        ("score: score", "score: score + bias[*q, kv]", 7, 23, "this is not part", ""),
        # the gallery
        ("mask: causal", "mask: causal(3)", 6, 9, "'causal' takes no values, not 1", "write causal"),
        ("mask: causal", "mask: {causal: 3}", 6, 9, "'causal' takes no values, not 1", "write causal"),
        ("mask: causal", "mask: window", 6, 9, "'window' takes 1 value, not 0", "write window(size)"),
        ("mask: causal", "mask: window(1, 2)", 6, 9, "'window' takes 1 value, not 2", "write window(size)"),
        ("mask: causal", "mask: {window: 0}", 6, 18, "size of 'window' must be at least 1, but this is 0", ""),
        ("mask: causal", "mask: {window: 2.5}", 6, 18, "size of 'window' must be an integer", ""),
        ("mask: causal", "mask: {window: wide}", 6, 18, 'unknown name "wide"', ""),
        ("mask: causal", "mask: causal and window(q < 3)", 6, 27, "expected a number", ""),
        ("mask: causal", "mask: {window: 3, causal: 1}", 6, 9, "one name is due here, not 2", "expression"),
        ("mask: causal", "mask: {window: [true]}", 6, 18, "window takes numbers, but this is true", ""),
        ("mask: causal", "mask: [causal]", 6, 9, "an expression or {name: value} is due here", ""),
        ("mask: causal", "mask: 3", 6, 9, "an expression or {name: value} is due here", ""),
        ("mask: causal", "mask: band(size) and natten_2d(size, 8, 2) and max(q, kv, 3) < min(q, kv, size)", 6, 66, "more than 16", ""),
        # parameters
        ("size: 64", "size: wide", 8, 18, """a parameter is a number or 'runtime': unknown name "wide\"""", ""),
        ("size: 64", "size: cap", 8, 18, "a parameter is a number or 'runtime'", ""),
        ("size: 64", "size: [64]", 8, 18, "a parameter is a number or 'runtime', but this is a list", "runtime"),
        ("size: 64", "size: true", 8, 18, "a parameter is a number or 'runtime', but this is true", ""),
        ("size: 64", "size: {}", 8, 18, "a parameter is a number or 'runtime'", "{runtime: float}"),
        ("size: 64", "size: {runtime: int, mim: 3}", 8, 33, 'unknown key "mim"', "did you mean 'min'?"),
        ("size: 64", "size: {runtime: real}", 8, 28, "params.size.runtime must be one of int, float", ""),
        ("size: 64", "size: {runtime: float, min: 3}", 8, 18, "only an integer can be held", ""),
        ("size: 64", "size: {runtime: int, value: 3}", 8, 18, "not both", ""),
        ("size: 64", "size: {runtime: int, min: 0.5}", 8, 38, "params.size.min must be an integer", ""),
        ("size: 64", "size: 1/0", 8, 20, "division by zero", ""),
        ("size: 64", "q: 64", 8, 15, "'q' is a word of the language", ""),
        ("size: 64", "max: 64", 8, 17, "'max' is a word of the language", ""),
        ("size: 64", "lambda: 64", 8, 20, "'lambda' is a word of the generated code", ""),
        ("size: 64", "key_first: 64", 8, 23, "'key_first' is a word of the generated code", ""),
        ("size: 64", "Size: 64", 8, 18, '"Size" cannot name a parameter', "a-z"),
        ("size: 64", "'a;b': 64", 8, 19, '"a;b" cannot name a parameter', "a-z"),
        ("params: {size: 64, cap: runtime}", "params: [size]", 8, 11, "params must be a mapping", ""),
        # tensors
        ("{index: [head], dtype: fp32}", "{index: [head], dtyp: fp32}", 10, 28, 'unknown key "dtyp"', "'dtype'?"),
        ("{index: [head], dtype: fp32}", "{index: [head]}", 10, 12, "key 'dtype' is missing", ""),
        ("{index: [head], dtype: fp32}", "{index: head, dtype: fp32}", 10, 20, "index must be a list", ""),
        ("{index: [head], dtype: fp32}", "{index: [hed], dtype: fp32}", 10, 21, 'there is no axis "hed"', "'head'?"),
        ("{index: [head], dtype: fp32}", "{index: [0], dtype: fp32}", 10, 21, "there is no axis 0", "a length"),
        ("{index: [head], dtype: fp32}", "{index: [kv, kv], dtype: fp32}", 10, 25, "axis 'kv' stands twice", ""),
        ("{index: [head], dtype: fp32}", "{index: [head], dtype: f32}", 10, 35, "one of fp32, fp16, bf16", "'fp32'?"),
        ("{index: [kv], dtype: bool}", "{index: [kv], dtype: bool, grad: true}", 14, 44, "a tensor of bool has no gradient", ""),
        ("{index: [head], dtype: fp32}", "{index: [head], dtype: int32, sorted: true}", 10, 50, "can be sorted", ""),
        ("    slope:", "    size:", 10, 11, "'size' is a parameter already", ""),
        ("    slope:", "    bias_stride:", 10, 18, "'bias_stride' is a word of the generated code", ""),
        ("mask: causal", "mask: causal\n  sink: 1", 7, 9, "attention.sink must be true or false", ""),
    ],
)  # fmt: skip
def test_mistakes(old: str, new: str, line: int, column: int, message: str, hint: str) -> None:
    assert BASE.count(old) == 1
    started = time.perf_counter()
    with pytest.raises(SpecError) as caught:
        parse_spec(BASE.replace(old, new), "a.yaml")
    assert time.perf_counter() - started < 1
    (problem,) = caught.value.problems
    assert problem.location is not None
    assert (problem.location.line, problem.location.column) == (line, column), str(problem)
    assert message in problem.message
    assert hint in (problem.hint or "")


HOSTILE = {
    "import": "mask: __import__('os').system('id')",
    "import call": "mask: __import__(q) < kv",
    "attribute": "mask: q.__class__ < kv",
    "unknown name": "mask: kv <= q and q - kv < windw",
    "boolean for a number": "mask: kv < (q < 3)",
    "index out of place": "score: score + slope[q]",
    "digits": "mask: q < " + "9" * 60_000,
    "brackets": "mask: " + "(" * 30_000 + ")" * 30_000,
    "names": "mask: " + "causal and " * 5_000 + "causal",
    "entries": "mask: " + " or ".join(["longformer(3, 1)"] * 200),
    "powers": "score: " + "score" + " ** 16" * 500,
    "params that name each other": "params: {a: b, b: a}",
    "parameter of itself": "params: {a: a + 1}",
    "tower in a parameter": "params: {a: 9**9**9}",
    "10 MB": "mask: q < " + "q + " * 2_500_000 + "q",
}


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_specs_are_refused_at_once(line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    kept = [given for given in BASE.splitlines() if not given.startswith(f"  {line.partition(':')[0]}:")]
    path.write_text("\n".join([*kept, f"  {line}", ""]))
    started = time.perf_counter()
    result = CliRunner().invoke(main, ["plan", str(path)])
    assert time.perf_counter() - started < 1
    assert result.exit_code == 2
    assert re.match(r"error: \S+a\.yaml:\d+:\d+: ", result.stderr)
    assert len(result.stderr) < 1000, "the message does not repeat the attack"


def test_entries_that_name_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    circle = {
        name: Entry(name, "mask", formula, "")
        for name, formula in (("one", "kv < 3 or two"), ("two", "causal and three"), ("three", "not one"))
    }
    monkeypatch.setattr(mathematics, "GALLERY", {**GALLERY, **circle})
    with pytest.raises(SpecError, match="'one' is defined by itself: one -> two -> three -> one") as caught:
        parse_spec(BASE.replace("mask: causal", "mask: q < 3 or one"), "a.yaml")
    (problem,) = caught.value.problems
    assert problem.location == Location("a.yaml", 6, 18)


def test_the_command_ends_with_2(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(BASE.replace("mask: causal", "mask: kv <= qq"))
    command = [sys.executable, "-m", "flashgen", "plan", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {path}:6:15: mask: unknown name \"qq\"\n    did you mean 'q'?")


LARGE = [
    "kv < max(" + ", ".join(f"(q + {i}) // {i + 2}" for i in range(16)) + ")",
    " and ".join(f"kv - {i} * q < {i % 5}" for i in range(16)),
    " or ".join(f"kv == q - {i * i}" for i in range(16)),
    "*".join(f"(q + kv + {i})" for i in range(25)) + " < 3",
    "((((q + 1)**16 + kv)**16 + kv)**16 + 1)**16 < 3",
    "(q + kv)" + "".join(f" % {i + 3}" for i in range(25)) + " < 3",
]


@pytest.mark.parametrize("mask", LARGE)
def test_the_largest_masks_are_labelled_and_derived_in_time(mask: str) -> None:
    started = time.perf_counter()
    told = attention(mask=mask)
    assert told.mask_label.startswith("mask") and told.derivation.route in ("bounds", "map")
    assert time.perf_counter() - started < 5
