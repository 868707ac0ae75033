"""Every mistake in masks, scores, parameters and tensors: refused at its place, at once, with exit code 2."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from stopwatch import within

from flashgen.cli import main
from flashgen.errors import Location, SpecError
from flashgen.spec import mathematics, parse_spec
from flashgen.spec.gallery import GALLERY, Entry

ROOT = Path(__file__).resolve().parent.parent

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


def assert_refused(text: str, line: int, column: int, message: str, hint: str) -> None:
    with within(1), pytest.raises(SpecError) as caught:
        parse_spec(text, "a.yaml")
    (problem,) = caught.value.problems
    assert problem.location == Location("a.yaml", line, column), str(problem)
    assert message in problem.message
    assert hint in (problem.hint or "")


@pytest.mark.parametrize(
    ("mask", "column", "message", "hint"),
    [
        ("casual", 1, 'unknown name "casual"', "did you mean 'causal'? allowed: q, kv"),
        ("casual", 1, 'unknown name "casual"', "full, causal, window, band"),
        ("windw(3)", 1, 'unknown function "windw"', "floor, full, causal, window, band"),
        ("kv <= q and q - kv < siz", 22, 'unknown name "siz"', "'size'?"),
        ("windw(3)", 1, 'unknown function "windw"', "did you mean 'window'?"),
        ("{windw: 3}", 1, 'unknown function "windw"', "did you mean 'window'?"),
        ("score < 3", 1, 'unknown name "score"', ""),
        ("alibi", 1, "'alibi' is a score", ""),
        ("true and softcap(3)", 10, "'softcap' is a score", ""),
        ("doc[q] == docs[kv]", 11, 'unknown tensor "docs"', "did you mean 'doc'?"),
        ("size[q] < 3", 1, "'size' is no tensor", ""),
        ("(q + kv)[q] < 3", 1, "a subscript of anything but a tensor", ""),
        ("__import__('os').system('id')", 12, "is not part of the expression language", ""),
        ("__import__(q)", 1, 'unknown function "__import__"', ""),
        ("q.__class__ < kv", 1, "attribute access", ""),
        ("kv", 1, "expected a condition, but this is an integer", ""),
        ("kv < causal", 6, "expected a number, but this is a condition", "where("),
        ("kv < keep", 6, "expected a number, but this is a condition", ""),
        ("keep == (kv < q)", 1, "expected a number, but this is a condition", ""),
        ("causal(3)", 1, "'causal' takes no values, not 1", "write causal"),
        ("{causal: 3}", 1, "'causal' takes no values, not 1", "write causal"),
        ("window", 1, "'window' takes 1 value, not 0", "write window(size)"),
        ("window(1, 2)", 1, "'window' takes 1 value, not 2", "write window(size)"),
        ("{window: 0}", 10, "size of 'window' must be at least 1, but this is 0", ""),
        ("{window: 2.5}", 10, "size of 'window' must be an integer", ""),
        ("{window: wide}", 10, 'unknown name "wide"', ""),
        ("causal and window(q < 3)", 19, "expected a number", ""),
        ("{window: 3, causal: 1}", 1, "one name is due here, not 2", "expression"),
        ("{window: '3) or (true'}", 10, "window takes numbers: ')' closes nothing", ""),
        ("{window: ''}", 10, "window takes numbers: the expression is empty", ""),
        ("{window: [true]}", 10, "window takes numbers, but this is true", ""),
        ("q <", 4, "cannot be read from here on", ""),
        ("kv <= q and", 12, "cannot be read from here on", ""),
        ("'kv <= q and  '", 13, "cannot be read from here on", ""),
        ("''", 1, "the expression is empty", ""),
        ("True", 1, "'True' is no name of the language", "write 'true'"),
        ("causal and not False", 16, "'False' is no name of the language", "write 'false'"),
        ("[causal]", 1, "an expression or {name: value} is due here", ""),
        ("3", 1, "an expression or {name: value} is due here", ""),
        (
            "abs(q - max(q, kv, 3, 5, 7, 9, 11, 13, 15)) < min(q, kv, 1, 2, 3, 4, size)",
            47,
            "more than 16",
            "",
        ),
        (" and ".join(["max(q, 3, kv) < min(q, kv, 3)"] * 9), 273, "more than 48", ""),
        ("kv <= " + "max(1 + " * 6 + "q" + ", kv)" * 6, 47, "in each other more than 5 deep", ""),
    ],
)
def test_mistakes_in_masks(mask: str, column: int, message: str, hint: str) -> None:
    """The column counts in the value."""
    assert_refused(BASE.replace("mask: causal", f"mask: {mask}", 1), 6, 8 + column, message, hint)


@pytest.mark.parametrize(
    ("score", "column", "message", "hint"),
    [
        ("scor + 1", 1, 'unknown name "scor"', "did you mean 'score'?"),
        ("scor + 1", 1, 'unknown name "scor"', "alibi, softcap, t5_bias"),
        ("softcp(3)", 1, 'unknown function "softcp"', "floor, alibi, softcap"),
        ("score + where(casual, 1, 2)", 15, 'unknown name "casual"', "did you mean 'causal'?"),
        ("score < 3", 1, "expected a number, but this is a condition", ""),
        ("score + (kv < q)", 10, "expected a number, but this is a condition", ""),
        ("score + causal", 9, "expected a number, but this is a condition", ""),
        ("score // 2", 1, "'//' divides integers, but this is a number", "floor"),
        ("slope[head] * kv", 1, "the score leaves 'score' out", "score + bias"),
        ("score + slope[q]", 15, "out of its place", "only that name may stand"),
        ("score + bias[q]", 9, "a subscript is missing: the axes of 'bias'", ""),
        ("score + bias[q, head, kv]", 23, "out of its place", ""),
        ("score + bias[kv, q, q]", 21, "one subscript too many", ""),
        (
            "score + bias[kv, q]",
            14,
            "not in the order of the axes: the axes of 'bias'",
            "the other way round",
        ),
        ("score + bias[score, kv]", 14, "a subscript must be an integer", "floor"),
        ("score + bias[q < 3, kv]", 14, "expected a number", ""),
        ("score + table", 9, "'table' needs a subscript: its axes are [head, 32]", ""),
        ("score + bias[q:kv]", 15, "is not part of the expression language", ""),
        ("score + bias[*q, kv]", 14, "this is not part", ""),
    ],
)
def test_mistakes_in_scores(score: str, column: int, message: str, hint: str) -> None:
    """The column counts in the value."""
    assert_refused(BASE.replace("score: score", f"score: {score}", 1), 7, 9 + column, message, hint)


@pytest.mark.parametrize(
    ("score", "column", "message", "hint"),
    [
        (
            "alibi + softcap(30)",
            9,
            "the sum counts 'score' twice: it is part of 'alibi' and 'softcap'",
            "- score",
        ),
        ("t5_bias + alibi", 11, "it is part of 't5_bias' and 'alibi'", "alibi is score + slope * (kv - q)"),
        ("t5_bias + 0.5 * alibi", 11, "it is part of 't5_bias' and 'alibi'", "with one 'score' in all"),
        ("3 + (alibi - 2) + relative_bias", 19, "it is part of 'alibi' and 'relative_bias'", ""),
        ("alibi + alibi + softcap(9)", 9, "counts 'score' 3 times", "add '- 2 * score'"),
        ("30 * tanh((alibi + t5_bias) / 30)", 20, "it is part of 'alibi' and 't5_bias'", ""),
        ("score + alibi", 9, "it is part of 'alibi'", "leave 'score' out"),
        ("alibi + sink", 9, "it is part of 'alibi' and 'sink'", "write 'sink: true' beside the score"),
    ],
)
def test_a_sum_of_named_scores_is_refused(score: str, column: int, message: str, hint: str) -> None:
    assert_refused(BASE.replace("score: score", f"score: {score}", 1), 7, 9 + column, message, hint)


@pytest.mark.parametrize(
    "score",
    [
        "alibi + t5_bias - score",
        "softcap(30) + (alibi - score)",
        "alibi + 1 + slope[head] * kv",
        "where(q < 3, alibi, softcap(3)) + 2",
        "alibi * 2",
        "max(alibi, softcap(30) + 1)",
        "score + tanh(score)",
    ],
)
def test_a_sum_that_counts_the_score_once_is_read(score: str) -> None:
    parse_spec(BASE.replace("score: score", f"score: {score}", 1), "a.yaml")


@pytest.mark.parametrize(
    ("value", "column", "message", "hint"),
    [
        ("wide", 1, "a parameter is a number or 'runtime': unknown name \"wide\"", ""),
        ("cap", 1, "a parameter is a number or 'runtime'", ""),
        ("[64]", 1, "a parameter is a number or 'runtime', but this is a list", "runtime"),
        ("true", 1, "a parameter is a number or 'runtime', but this is true", ""),
        ("{}", 1, "a parameter is a number or 'runtime'", "{runtime: float}"),
        ("{runtime: int, mim: 3}", 16, 'unknown key "mim"', "did you mean 'min'?"),
        ("{runtime: real}", 11, "params.size.runtime must be one of int, float", ""),
        ("{runtime: float, min: 3}", 1, "only an integer can be held", ""),
        ("{runtime: int, value: 3}", 1, "not both", ""),
        ("{runtime: int, min: 0.5}", 21, "params.size.min must be an integer", ""),
        ("{runtime: int, min: 2147483648}", 21, "params.size.min must be at most 2147483647", ""),
        ("1/0", 3, "division by zero", ""),
    ],
)
def test_mistakes_in_parameters(value: str, column: int, message: str, hint: str) -> None:
    """The column counts in the value."""
    assert_refused(BASE.replace("size: 64", f"size: {value}", 1), 8, 17 + column, message, hint)


@pytest.mark.parametrize(
    ("declared", "column", "message", "hint"),
    [
        ("{index: [head], dtyp: fp32}", 17, 'unknown key "dtyp"', "'dtype'?"),
        ("{index: [head]}", 1, "key 'dtype' is missing", ""),
        ("{index: head, dtype: fp32}", 9, "index must be a list", ""),
        ("{index: [hed], dtype: fp32}", 10, 'there is no axis "hed"', "'head'?"),
        ("{index: [0], dtype: fp32}", 10, "there is no axis 0", "a length"),
        ("{index: [kv, kv], dtype: fp32}", 14, "axis 'kv' stands twice", ""),
        ("{index: [head], dtype: f32}", 24, "one of fp32, fp16, bf16", "'fp32'?"),
        ("{index: [head], dtype: int32, sorted: true}", 39, "can be sorted", ""),
    ],
)
def test_mistakes_in_tensors(declared: str, column: int, message: str, hint: str) -> None:
    """The column counts in the value."""
    assert_refused(BASE.replace("{index: [head], dtype: fp32}", declared, 1), 10, 11 + column, message, hint)


@pytest.mark.parametrize(
    ("old", "new", "line", "column", "message", "hint"),
    [
        ("mask: causal", "mask: >\n    kv <= q and\n    kv < siz", 8, 10, 'unknown name "siz"', "'size'?"),
        ("size: 64", "q: 64", 8, 15, "'q' is a word of the language", ""),
        ("size: 64", "max: 64", 8, 17, "'max' is a word of the language", ""),
        ("size: 64", "lambda: 64", 8, 20, "'lambda' is a word of the generated code", ""),
        ("size: 64", "key_first: 64", 8, 23, "'key_first' is a word of the generated code", ""),
        ("size: 64", "Size: 64", 8, 18, '"Size" cannot name a parameter', "a-z"),
        ("size: 64", "'a;b': 64", 8, 19, '"a;b" cannot name a parameter', "a-z"),
        ("params: {size: 64, cap: runtime}", "params: [size]", 8, 11, "params must be a mapping", ""),
        (
            "{index: [kv], dtype: bool}",
            "{index: [kv], dtype: bool, grad: true}",
            14,
            44,
            "a tensor of bool has no gradient",
            "",
        ),
        ("    slope:", "    size:", 10, 11, "'size' is a parameter already", ""),
        ("    slope:", "    bias_stride:", 10, 18, "'bias_stride' is a word of the generated code", ""),
        ("mask: causal", "mask: causal\n  sink: 1", 7, 9, "attention.sink must be true or false", ""),
    ],
)
def test_mistakes_elsewhere(old: str, new: str, line: int, column: int, message: str, hint: str) -> None:
    assert BASE.count(old) == 1
    assert_refused(BASE.replace(old, new), line, column, message, hint)


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
    "entries in entries": "score: " + "softcap(" * 30 + "score" + ")" * 30,
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
    with within(1):
        result = CliRunner().invoke(main, ["plan", str(path)])
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


@pytest.mark.parametrize(
    ("line", "column", "message"),
    [
        ("haed_dim: 64", 3, 'unknown key "haed_dim"'),
        ("head_dim: 100", 13, "head_dim must be a multiple of 8"),
        ("head_dim: 64\n  algn: top_left", 3, 'unknown key "algn"'),
        ("head_dim: 64\n  align: top", 10, "align must be one of"),
    ],
)
def test_mask_and_score_are_read_beside_other_mistakes(line: str, column: int, message: str) -> None:
    text = (
        BASE.replace("head_dim: 64", line)
        .replace("mask: causal", "mask: casual")
        .replace("score: score", "score: scor")
    )
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "a.yaml")
    other, mask, score = caught.value.problems
    assert message in other.message and other.location is not None and other.location.column == column
    assert 'mask: unknown name "casual"' in mask.message and 'score: unknown name "scor"' in score.message


def test_the_command_ends_with_2(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(BASE.replace("mask: causal", "mask: kv <= qq"))
    command = [sys.executable, "-m", "flashgen", "plan", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {path}:6:15: mask: unknown name \"qq\"\n    did you mean 'q'?")
