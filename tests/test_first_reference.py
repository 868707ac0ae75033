"""Exponentials relative to the maximum of the first key tile: as exact as the running maximum, or noticed."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from host_kernel import COMPILER, compile_device_code

# One thread and its two rows: eight keys of each in a key tile. Without `finish`, which sums over a quad.
_ROWS = """
extern "C" int run(int key_tiles, const float *scores, const float *values, int running_from, float *o_out,
                   float *lse) {
  OnlineSoftmax softmax;
  float o[1][4] = {};
  bool in_range = true;
  for (int j = 0; j < key_tiles; ++j) {
    float s[4][4], correction[2];
    for (int i = 0; i < 16; ++i) s[i / 4][i % 4] = scores[16 * j + i];
    if (j == 0 || j >= running_from) {
      softmax.update(s, kLog2e, correction, Unmasked{});
      scale_rows(o, correction);
    } else {
      softmax.exponentiate(s, kLog2e, 0);
      softmax.exponentiate(s, kLog2e, 1);
      softmax.add(s, 0);
      softmax.add(s, 1);
      if (j + 1 == running_from) in_range = softmax.sums_in_range();
    }
    for (int i = 0; i < 16; ++i) o[0][i % 4] += s[i / 4][i % 4] * values[16 * j + i];
  }
  in_range = in_range && softmax.in_range(o);
  for (int e = 0; e < 4; ++e) o_out[e] = o[0][e] / softmax.sum[e / 2];
  for (int r = 0; r < 2; ++r) lse[r] = softmax.log_sum_exp(r, 1.0f);
  return in_range;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("first_reference")
    return compile_device_code(("types.cuh", "softmax.cuh"), _ROWS, Path(folder))


def run(
    library: ctypes.CDLL, scores: npt.NDArray[np.float32], running_from: int
) -> tuple[bool, float, float]:
    """Whether the rows stayed in range, and the errors of O (relative) and lse against float64."""
    values = np.random.default_rng(1).normal(size=scores.shape).astype(np.float32)
    o, lse = np.zeros(4, np.float32), np.zeros(2, np.float32)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (scores, values, o, lse)]
    with np.errstate(all="ignore"):
        kept = library.run(len(scores), pointers[0], pointers[1], running_from, *pointers[2:])
        exact = scores.astype(np.float64).reshape(-1, 4, 2, 2)  # [key tile, pair, row, column]
        shifted = np.exp(exact - exact.max(axis=(0, 1, 3), keepdims=True))
        weighted = (shifted * values.reshape(exact.shape)).sum(axis=(0, 1))
        expected = weighted / shifted.sum(axis=(0, 1, 3))[:, None]
        expected_lse = np.log(shifted.sum(axis=(0, 1, 3))) + exact.max(axis=(0, 1, 3))
        error = np.abs(o.reshape(2, 2) - expected).max()
        return bool(kept), float(error), float(np.abs(lse - expected_lse).max())


@pytest.mark.parametrize("running_from", [1000, 20])
@pytest.mark.parametrize("growth", [0.0, 0.3, 0.8, -5.0])
def test_any_reference_gives_the_same_softmax(library: ctypes.CDLL, growth: float, running_from: int) -> None:
    scores = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    scores += growth * np.arange(40, dtype=np.float32)[:, None]
    kept, error, lse_error = run(library, scores, running_from)
    assert kept and error < 2e-5 and lse_error < 2e-5


@pytest.mark.parametrize("running_from", [1000, 20, 5])
@pytest.mark.parametrize("jump", [20.0, 40.0, 45.0, 80.0, 100.0, 200.0, 1e4, np.inf])
@pytest.mark.parametrize("at", [2, 10, 30])
def test_what_leaves_the_range_is_noticed(
    library: ctypes.CDLL, jump: float, at: int, running_from: int
) -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, 16)).astype(np.float32)
    scores[at, rng.integers(16)] += jump
    scores[at + 3, rng.integers(16)] -= jump if np.isfinite(jump) else 0
    kept, error, lse_error = run(library, scores, running_from)
    assert not kept or (error < 2e-5 and lse_error < 1e-5 * (1 + jump))
    assert kept or jump > 40  # and only what does


def test_rising_beyond_what_a_correction_holds(library: ctypes.CDLL) -> None:
    """What the first reference gave is scaled down by less than fp32 holds, and must not be lost."""
    scores = np.zeros((40, 16), np.float32)
    scores[3:20] += 86.0  # sums near 2^127
    scores[20:] += 88.5  # the running maximum from here on: the correction is 0
    kept, error, _ = run(library, scores, 20)
    assert not kept or error < 2e-5
