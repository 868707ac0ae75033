"""Masks and scores as Python functions: what they become, and that nothing is lost on the way."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from stopwatch import within

from flashgen.errors import SpecError
from flashgen.spec.attention import Attention
from flashgen.spec.trace import (
    exp,
    floor,
    log,
    maximum,
    minimum,
    sigmoid,
    sqrt,
    tanh,
    trace,
    where,
)

TENSORS = {
    "slope": {"index": ["head"], "dtype": "fp32"},
    "bias": {"index": ["head", "q", "kv"], "dtype": "bf16"},
    "doc": {"index": ["batch", "kv"], "dtype": "int32"},
    "keep": {"index": ["kv"], "dtype": "bool"},
}
PARAMS = {"size": "runtime", "cap": {"runtime": "float"}}
WIDTH = 4096


def traced(function: Callable[..., Any], kind: Any = "mask") -> str:
    return trace(function, kind=kind, tensors=TENSORS, params=PARAMS)


def attention(**fields: str) -> Attention:
    return Attention(heads=4, head_dim=64, tensors=TENSORS, params=PARAMS, **fields)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda q, kv: kv <= q, "kv <= q"),
        (lambda kv, q: (kv <= q) & (q - kv < WIDTH), "kv <= q and q - kv < 4096"),
        (lambda q, kv: ~(kv > q) | (kv == 0) & (q != 3), "not kv > q or (kv == 0 and q != 3)"),
        (lambda q, kv: (q - kv) // 2 % 3 == -(q % 5), "(q - kv) // 2 % 3 == -(q % 5)"),
        (lambda q, kv: 2 * q - (kv - 1) >= 7 - q, "2 * q - (kv - 1) >= 7 - q"),
        (lambda q, kv: abs(q - kv) > -7, "abs(q - kv) > -7"),
        (lambda q, kv, w=7: q - kv < w, "q - kv < 7"),
        (lambda q, kv, window=7: q - kv < window, "q - kv < 7"),
        (lambda q, *, kv: q > kv, "q > kv"),
        (lambda q, kv, size: q - kv < size * 2, "q - kv < size * 2"),
        (lambda q, kv, doc: doc[q] == doc[kv], "doc[q] == doc[kv]"),
        (lambda keep, causal: keep & causal, "keep and causal"),
        (lambda q, kv, window, document: window(64) | document, "window(64) or document"),
        (lambda q, kv: where(q < 4, kv < 4, kv <= q), "where(q < 4, kv < 4, kv <= q)"),
        (lambda q, kv: minimum(q, 4) < maximum(kv, q, 3), "min(q, 4) < max(kv, q, 3)"),
        (lambda q, kv: math.floor(sqrt(q)) < kv, "floor(sqrt(q)) < kv"),
        (lambda q, kv: (kv < np.int64(3)) & np.True_.item(), "kv < 3 and true"),
        (
            lambda q_index, seqlen_q, head_kv, batch: q_index < seqlen_q - head_kv + batch,
            "q_index < seqlen_q - head_kv + batch",
        ),
        (lambda: True, "true"),
    ],
)
def test_masks(function: Callable[..., Any], text: str) -> None:
    assert traced(function) == text
    assert attention(mask=text).condition == attention(mask=traced(function)).condition


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda score: 50 * tanh(score / 50), "50 * tanh(score / 50)"),
        (lambda score, cap: cap * tanh(score / cap), "cap * tanh(score / cap)"),
        (lambda score, slope, head, q, kv: score + slope[head] * (kv - q), "score + slope[head] * (kv - q)"),
        (lambda score, bias, head, q, kv: score + bias[head, q, kv], "score + bias[head, q, kv]"),
        (lambda score, bias: score + 0.125 * bias, "score + 0.125 * bias"),
        (lambda score: -(score**2) + 2**-1, "-score ** 2 + 0.5"),
        (lambda score: (-score) ** 2 * np.float64(0.5), "(-score) ** 2 * 0.5"),
        (lambda score, scale: exp(log(sigmoid(score))) / scale, "exp(log(sigmoid(score))) / scale"),
        (
            lambda score, q, kv: score * where(kv <= q, 1, floor(0.5 * q)),
            "score * where(kv <= q, 1, floor(0.5 * q))",
        ),
    ],
)
def test_scores(function: Callable[..., Any], text: str) -> None:
    assert traced(function, "score") == text
    assert attention(score=text).score_expr == attention(score=traced(function, "score")).score_expr


def chained(q: Any, kv: Any) -> Any:
    return q - 4 < kv <= q


def branching(q: Any, kv: Any) -> Any:
    if kv < 4:
        return kv <= q
    return q < 3


@pytest.mark.parametrize(
    ("function", "message", "hint"),
    [
        # what asks a symbol whether it is true
        (lambda q, kv: kv <= q and q - kv < 4, "'kv <= q' is asked whether it is true", "write & | ~"),
        (lambda q, kv: kv <= q or kv < 4, "'kv <= q' is asked whether it is true", "write & | ~"),
        (lambda q, kv: not kv <= q, "asked whether it is true", "write & | ~"),
        (chained, "'q - 4 < kv' is asked whether it is true", "(a < b) & (b < c)"),
        (branching, "'kv < 4' is asked whether it is true", "where(c, a, b) for if"),
        (lambda q, kv: q in (kv, 3), "'kv == q' is asked whether it is true", ""),
        (lambda q, kv: min(q, kv) < 3, "asked whether it is true", "minimum(a, b)"),
        (lambda q, kv: kv < 3 if q < 3 else kv < 4, "asked whether it is true", "where(c, a, b)"),
        # precedence, and the operators that the language lacks
        (lambda q, kv: kv <= q & q - kv < 4, "'&' takes conditions, but 'q' is a number", "binds tighter"),
        (lambda q, kv: (kv <= q) | 3, "'|' takes conditions, but '3' is a number", ""),
        (lambda q, kv: ~q < kv, "'~' takes conditions, but 'q' is a number", "write ~(kv <= q)"),
        (lambda q, kv: (kv <= q) ^ (q < 3), "^ is not part of the language", "(a | b) & ~(a & b)"),
        (
            lambda q, kv: (kv <= q) == (q < 3),
            "'kv <= q' is a condition, where a number is due",
            "not compared",
        ),
        (lambda q, kv: (kv <= q) + 1 < 3, "'kv <= q' is a condition, where a number is due", "where("),
        # symbols taken for values
        (lambda q, kv: math.exp(q) < kv, "a symbol has no value", "exp, log"),
        (lambda q, kv: kv < int(q), "a symbol has no value", ""),
        (lambda q, kv: kv < [1, 2, 3][q], "a symbol has no value", ""),
        (lambda q, kv: kv < round(q), "a symbol has no value", ""),
        (lambda q, kv: torch.tanh(q) < kv, "torch's tanh cannot take symbols", "functions of flashgen"),
        (
            lambda q, kv: torch.ones(4)[q] < kv,
            "torch's __getitem__ cannot take symbols",
            "passed in `tensors`",
        ),
        (lambda q, kv: torch.ones(4) + q < kv, "cannot take symbols", ""),
        (lambda q, kv: {q: 1}[kv] < 3, "'q' cannot be a key of a dict", "where(a == 0, b, c)"),
        (lambda q, kv: kv in {q, 3}, "or part of a set", ""),
        (lambda q, kv: list(q), "'q' stands for one value", "seqlen_q"),
        (lambda doc: len(doc) < 3, "'doc' stands for one value", "seqlen_kv"),
        (lambda q, doc: q in doc, "'doc' stands for one value", ""),
        (lambda q, doc: q < doc.shape[0], "'doc' has no attributes, and no \"shape\"", "seqlen_q"),
        (lambda q, kv: divmod(q, 3)[1] < kv, "divmod is not part of", "a // b and a % b"),
        (lambda q, kv: divmod(7, q)[1] < kv, "divmod is not part of", "a // b and a % b"),
        (lambda q, kv: q << 1 < kv, "<< and >> are not part of", "a * 2**n"),
        (lambda q, kv: 9 >> q < kv, "<< and >> are not part of", "a // 2**n"),
        (lambda q, kv: q @ kv < 3, "@ is not part of the language", "write *"),
        (lambda q, window: window(size=3), "'window' takes no named arguments", "in their order"),
        (lambda q, kv: np.abs(q) < kv, "numpy's absolute cannot take symbols", "use abs, and the functions"),
        (lambda q, kv: np.minimum(q, kv) < 3, "numpy's minimum cannot take symbols", "minimum, maximum"),
        (lambda q, kv: np.add(q, kv, out=np.ones(3)) < 3, "numpy's add cannot take symbols", ""),
        (lambda q, kv: np.clip(q, 0, 3) < kv, "numpy's clip cannot take symbols", ""),
        (lambda q, kv: np.where(q < 3, q, kv) < 3, "numpy's where cannot take symbols", "where"),
        (lambda q, kv: kv < np.ones(3) + q, "a ndarray has no place in a mask or score", ""),
        (lambda q, kv: kv < q + np.ones(3), "a ndarray has no place in a mask or score", ""),
        (lambda q, kv: kv < "q", "a str has no place in a mask or score", ""),
        (lambda q, kv: kv < q + math.inf, "inf is no number that a mask or score can hold", ""),
        (lambda q, kv: kv < q[3], "'q' is no tensor", ""),
        (lambda q, kv: kv < q(3), "'q' cannot be called", ""),
        # signatures and results
        (lambda q, k: k <= q, 'a mask cannot take "k"', "did you mean 'kv'?"),
        (
            lambda b, h, q_idx, kv_idx: kv_idx <= q_idx,
            'a mask cannot take "b"',
            "batch, head, q_index, kv here",
        ),
        (lambda q, kv, score: score < 3, 'a mask cannot take "score"', ""),
        (lambda *args: True, 'a mask cannot take "args"', ""),
        (max, '"max" is no Python function that a mask can be', "lambda q, kv: kv <= q"),
        (dict, '"dict" is no Python function that a mask can be', "lambda q, kv: kv <= q"),
        (torch.tanh, '"tanh" is no Python function that a mask can be', "lambda q, kv: kv <= q"),
        (lambda q, casual: casual, 'a mask cannot take "casual"', "did you mean 'causal'? allowed: q, kv"),
        (lambda q, nothing: q < 3, 'a mask cannot take "nothing"', "full, causal, window"),
        (lambda q, kv: None, "the mask returns nothing", ""),
        (lambda q, kv: [kv <= q], "the mask returns a list", ""),
    ],
)
def test_traps_are_refused(function: Callable[..., Any], message: str, hint: str) -> None:
    with pytest.raises(SpecError) as caught:
        traced(function)
    (problem,) = caught.value.problems
    assert message in problem.message
    assert hint in (problem.hint or "")


def doubling(q: Any, kv: Any) -> Any:
    for _ in range(10_000):
        q = q + q
    return kv <= q


def adding(q: Any, kv: Any) -> Any:
    for step in range(100_000):
        q = q + step
    return kv <= q


@pytest.mark.parametrize("function", [doubling, adding])
def test_loops_end_at_the_limit(function: Callable[..., Any]) -> None:
    with within(1), pytest.raises(SpecError, match="more than 300 terms"):
        traced(function)


def test_messages_stay_short() -> None:
    def deep(q: Any, kv: Any) -> Any:
        for _ in range(200):
            q = -q
        return q < kv and kv < 3

    with pytest.raises(SpecError) as caught:
        traced(deep)
    assert len(caught.value.problems[0].message) < 150


def test_symbols_lack_what_protocols_may_ask_for() -> None:
    def asking(q: Any, kv: Any) -> Any:
        assert not hasattr(q, "__array__") and not hasattr(q, "_repr_html_")
        assert copy.copy(q) is not None
        return kv <= q

    assert traced(asking) == "kv <= q"


def test_numbers_of_numpy_may_stand_on_the_left() -> None:
    three = np.int64(3)
    assert traced(lambda q, kv: three + q < kv) == "3 + q < kv"
    assert traced(lambda q, kv: three <= (three - q) // 2 * (three % kv)) == "3 <= (3 - q) // 2 * (3 % kv)"
    assert traced(lambda q, kv: np.float32(0.5) * q != kv) == "0.5 * q != kv"
