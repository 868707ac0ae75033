"""The gallery: every entry means what it says, is documented, can be tried, and has a spec that plans."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashgen.arch import arch
from flashgen.plan import plan_from_dict, solve
from flashgen.spec import load_spec
from flashgen.spec.attention import Attention
from flashgen.spec.evaluation import evaluate
from flashgen.spec.gallery import GALLERY, SAMPLES, Entry
from flashgen.spec.inputs import TensorInput
from flashgen.spec.sample import sample_tensor

ROOT = Path(__file__).resolve().parent.parent
SPECS = sorted((ROOT / "specs").glob("*.yaml"))
SIZES = {"batch": 2, "heads_q": 4, "heads_kv": 2, "seqlen_q": 90, "seqlen_kv": 130}
Array = np.ndarray[Any, Any]


def attention(entry: Entry) -> Attention:
    return Attention(heads={"q": 4, "kv": 2}, head_dim=64, **{entry.kind: entry.sample})


def tensors(inputs: tuple[TensorInput, ...]) -> dict[str, Array]:
    made = {tensor.name: sample_tensor(tensor, **SIZES) for tensor in inputs}
    return {name: array for name, array in made.items() if array is not None}


# -- what each mask keeps, said again by hand, for one query at position q and one key -----------------------

Keeps = Callable[[int, int, int, dict[str, Array]], bool]

BY_HAND: dict[str, Keeps] = {
    "full": lambda q, kv, batch, t: True,
    "causal": lambda q, kv, batch, t: q >= kv,
    "window": lambda q, kv, batch, t: kv in range(q - 39, q + 1),
    "band": lambda q, kv, batch, t: kv in range(q - 40, q + 41),
    "longformer": lambda q, kv, batch, t: min(q, kv) < 5 or kv in range(q - 40, q + 41),
    "sink_window": lambda q, kv, batch, t: kv in [k for k in range(q + 1) if k < 4 or k > q - 40],
    "dilated": lambda q, kv, batch, t: kv in [q - 3 * step for step in range(40)],
    "chunked": lambda q, kv, batch, t: kv in range(q - q % 40, q + 1),
    "block_causal": lambda q, kv, batch, t: kv < q - q % 40 + 40,
    "prefix_lm": lambda q, kv, batch, t: kv in range(max(q + 1, 40)),
    "natten_2d": lambda q, kv, batch, t: (
        kv // 16 in neighbours(q // 16, 12, 2) and kv % 16 in neighbours(q % 16, 16, 2)
    ),
    "document": lambda q, kv, batch, t: bool(t["doc"][batch, q] == t["doc"][batch, kv]),
    "padding": lambda q, kv, batch, t: bool(kv < t["kv_len"][batch]),
}


def neighbours(at: int, length: int, radius: int) -> range:
    """NATTEN's window: always 2 radius + 1 long, moved inside at the edges."""
    start = min(max(at - radius, 0), length - 2 * radius - 1)
    return range(start, start + 2 * radius + 1)


def by_hand(entry: Entry, given: dict[str, Array]) -> Array:
    offset = SIZES["seqlen_kv"] - SIZES["seqlen_q"]
    shape = (SIZES["batch"], SIZES["seqlen_q"], SIZES["seqlen_kv"])
    keeps = BY_HAND[entry.name]
    return np.array(
        [keeps(row + offset, kv, batch, given) for batch, row, kv in np.ndindex(shape)], bool
    ).reshape(shape)


def on_a_grid(expr: Any, given: dict[str, Array], score: Array | None = None) -> Array:
    """An expression at every (batch, head, row, key)."""
    offset = SIZES["seqlen_kv"] - SIZES["seqlen_q"]
    starts = {"batch": 0, "head": 0, "q": offset, "kv": 0, "q - kv": offset - SIZES["seqlen_kv"] + 1}

    def reader(tensor: TensorInput, array: Array) -> Callable[..., Array]:
        def read(*subscripts: Any) -> Array:
            indices = [
                np.clip(np.asarray(subscript) - starts.get(str(axis), 0), 0, length - 1)
                for subscript, axis, length in zip(subscripts, tensor.index, array.shape, strict=True)
            ]
            return array[tuple(np.broadcast_arrays(*indices))]

        return read

    inputs = {tensor.name: tensor for entry in GALLERY.values() for tensor in entry.tensors}
    values: dict[str, Any] = {name: reader(inputs[name], array) for name, array in given.items()}
    values |= {"seqlen_q": SIZES["seqlen_q"], "seqlen_kv": SIZES["seqlen_kv"], "score": score}
    lengths = (SIZES["batch"], SIZES["heads_q"], SIZES["seqlen_q"], SIZES["seqlen_kv"])
    for place, name in enumerate(("batch", "head", "q", "kv")):
        span = np.arange(lengths[place]) + starts[name]
        values[name] = span.reshape([-1 if other == place else 1 for other in range(4)])
    return np.broadcast_to(np.asarray(evaluate(expr, values)), lengths)


def of_kind(kind: str) -> list[Entry]:
    return [entry for entry in GALLERY.values() if entry.kind == kind]


@pytest.mark.parametrize("entry", of_kind("mask"), ids=lambda entry: entry.name)
def test_masks_keep_what_they_say(entry: Entry) -> None:
    told = attention(entry)
    given = tensors(told.inputs)
    kept = on_a_grid(told.condition, given)
    expected = by_hand(entry, given)[:, None]
    assert (kept == expected).all()
    assert expected.any() and (entry.name == "full" or not expected.all())


# -- scores --------------------------------------------------------------------------------------------------


def t5_bucket(relative_position: int, *, bidirectional: bool) -> int:
    """As transformers' T5 has it, with 32 buckets up to a distance of 128; the logarithm by integers."""
    buckets, bucket = 32, 0
    if bidirectional:
        buckets //= 2
        bucket += buckets * (relative_position > 0)
        distance = abs(relative_position)
    else:
        distance = max(-relative_position, 0)
    exact = buckets // 2
    if distance < exact:
        return bucket + distance
    # floor(log(distance / exact) / log(128 / exact) * (buckets - exact)), the greatest k for which this holds
    rest = buckets - exact
    steps = max(k for k in range(200) if exact**rest * (128 // exact) ** k <= distance**rest)
    return bucket + min(exact + steps, buckets - 1)


def position(row: int) -> int:
    return row + SIZES["seqlen_kv"] - SIZES["seqlen_q"]


Scores = Callable[[float, int, int, int, dict[str, Array]], float]
SCORES_BY_HAND: dict[str, Scores] = {
    "alibi": lambda s, head, row, kv, t: s - t["slope"][head] * (position(row) - kv),
    "softcap": lambda s, head, row, kv, t: 30 * math.tanh(s / 30),
    "t5_bias": lambda s, head, row, kv, t: (
        s + t["t5_table"][head, t5_bucket(kv - position(row), bidirectional=False)]
    ),
    "t5_encoder_bias": lambda s, head, row, kv, t: (
        s + t["t5_table"][head, t5_bucket(kv - position(row), bidirectional=True)]
    ),
    "relative_bias": lambda s, head, row, kv, t: (
        s + t["distance_bias"][head, row - kv + SIZES["seqlen_kv"] - 1]
    ),
    "dense_bias": lambda s, head, row, kv, t: s + t["bias"][head, row, kv],
    "sink": lambda s, head, row, kv, t: s,
}


@pytest.mark.parametrize("entry", of_kind("score"), ids=lambda entry: entry.name)
def test_scores_are_what_they_say(entry: Entry) -> None:
    told = attention(entry)
    given = tensors(told.inputs)
    shape = (SIZES["batch"], SIZES["heads_q"], SIZES["seqlen_q"], SIZES["seqlen_kv"])
    scores = np.random.default_rng(0).normal(size=shape) * 20
    changed = on_a_grid(told.score_expr, given, scores)
    expected = SCORES_BY_HAND[entry.name]
    for index in np.ndindex(shape[1:]):
        assert changed[(1, *index)] == pytest.approx(expected(scores[(1, *index)], *index, given), abs=1e-9)
    assert told.sink is entry.sink


@pytest.mark.parametrize("bidirectional", [False, True])
def test_t5_buckets_are_those_of_its_float32(bidirectional: bool) -> None:
    """The formula of T5's code, in its own floats, at every distance: no rounding moves a bucket's first."""
    exact, rest = (8, 8) if bidirectional else (16, 16)
    distances = np.arange(exact, 4000)
    logs = np.log(distances.astype(np.float32) / np.float32(exact)) / np.float32(math.log(128 / exact))
    expected = np.minimum(exact + (logs * np.float32(rest)).astype(np.int64), exact + rest - 1)
    found = [t5_bucket(-int(distance), bidirectional=bidirectional) for distance in distances]
    assert found == expected.tolist()


# -- what an entry comes with --------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", GALLERY.values(), ids=GALLERY)
def test_entries_are_documented_and_can_be_tried(entry: Entry) -> None:
    assert entry.about and "\n" not in entry.about and not entry.about.endswith(".")
    assert entry.reference or entry.name in ("full", "causal")
    assert f"`{entry.call}`" in (ROOT / "docs" / "spec.md").read_text(), "docs/spec.md lists the gallery"
    told = attention(entry)
    label = told.mask_label if entry.kind == "mask" else told.score_label
    assert label.startswith(entry.name) or (entry.sink and not label)
    assert {tensor.name for tensor in told.inputs} == {tensor.name for tensor in entry.tensors}


def test_names_are_apart() -> None:
    """A tensor that a user declares must not hide an entry, nor two entries share a name for two tensors."""
    declared = {tensor for entry in GALLERY.values() for tensor in entry.tensors}
    names = [tensor.name for tensor in declared]
    assert len(set(names)) == len(names) and not set(names) & GALLERY.keys()
    assert set(names) == SAMPLES.keys()


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_hold_what_the_tensor_promises(name: str) -> None:
    tensor = next(t for entry in GALLERY.values() for t in entry.tensors if t.name == name)
    array = sample_tensor(tensor, **SIZES)
    assert array is not None
    lengths = {"batch": 2, "head": 4, "q": 90, "kv": 130, "q - kv": 219, 32: 32}
    assert array.shape == tuple(lengths[axis] for axis in tensor.index)
    assert np.issubdtype(array.dtype, np.integer) == (tensor.dtype == "int32")
    assert len(np.unique(array)) > 1
    if tensor.sorted:
        assert (np.diff(array, axis=-1) >= 0).all()
    assert sample_tensor(TensorInput("unheard_of", ("q",), "fp32"), **SIZES) is None


@pytest.mark.parametrize("entry", GALLERY.values(), ids=GALLERY)
def test_entries_have_a_spec(entry: Entry) -> None:
    used = [load_spec(path).attention for path in SPECS]
    texts = " ".join(f"{told.mask.text} {told.score.text} {'sink' if told.sink else ''}" for told in used)
    assert entry.name in re.findall(r"\w+", texts), "an entry comes with a spec that shows it"


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_specs_plan(path: Path, target: str) -> None:
    spec = load_spec(path)
    plan = solve(spec, arch(target))
    assert plan.kernel.isidentifier()
    assert plan_from_dict(plan.to_dict()) == plan
    assert (plan.tensors, plan.parameters) == (spec.attention.inputs, spec.attention.runtime)
