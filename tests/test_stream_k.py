"""The order stream_k without a GPU: how tiles are divided, and what blocks leave for one another."""

from __future__ import annotations

import ctypes
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from host_kernel import COMPILER, compile_device_code
from hypothesis import given
from hypothesis import strategies as st

from flashgen.plan.order import Division, divide


@given(st.integers(0, 5000), st.integers(1, 600), st.integers(1, 300))
def test_tiles_are_cut_where_it_pays(tiles: int, key_tiles: int, blocks: int) -> None:
    division = divide(tiles, key_tiles, blocks)
    if division.shares:
        assert division.whole == tiles - tiles % blocks and tiles % blocks < division.shares <= blocks
        assert division.longest_share < key_tiles
    else:
        assert division.whole == tiles


def test_a_lone_tile_is_cut_into_as_many_parts_as_are_collected_in_the_time_of_one() -> None:
    assert divide(1, 800, 132) == Division(0, 20, 40 + 40)
    assert divide(68, 128, 132).shares == 132


# Each block is a thread of the host, which does what the producer and one thread of a consumer do together: a
# key tile has eight keys for each of two rows.
_BLOCKS = """
#include <thread>
#include <vector>
extern "C" void run(int tiles, int key_tiles, int whole_tiles, int count, int blocks, const float *scores,
                    const float *values, float *results, uint32_t *flags, Partial<1> *partials) {
  std::vector<std::thread> threads;
  for (int block = blocks - 1; block >= 0; --block) threads.emplace_back([=] {
    const Shares shares = {(tiles - whole_tiles) * key_tiles, count};
    auto work = [=](int tile, int begin, int end) {
      OnlineSoftmax softmax;
      float o[1][4] = {};
      for (int j = begin; j < end; ++j) {
        float s[1][4], correction[2];
        for (int e = 0; e < 4; ++e) s[0][e] = scores[(tile * key_tiles + j) * 4 + e];
        softmax.update(s, kLog2e, correction, Masked{});
        scale_rows(o, correction);
        for (int e = 0; e < 4; ++e) o[0][e] += s[0][e] * values[(tile * key_tiles + j) * 4 + e];
      }
      if (begin > 0) {
        partials[block].store(o, softmax, 0);
        raise_flag(flags + block);
        return;
      }
      int missing = key_tiles - end;
      for (int other = block + 1; missing > 0; ++other) {
        lower_flag(flags + other);
        partials[other].add_to(o, softmax, 0);
        missing -= shares.length(other);
      }
      float inverse[2];  // not by `finish`, which sums over a quad
      for (int r = 0; r < 2; ++r) inverse[r] = softmax.sum[r] == 0.0f ? 0.0f : 1.0f / softmax.sum[r];
      scale_rows(o, inverse);
      for (int e = 0; e < 4; ++e) results[tile * 4 + e] += o[0][e];
    };
    for (int tile = block; tile < whole_tiles; tile += blocks) work(tile, 0, key_tiles);
    if (block >= count) return;
    int unit = shares.begin(block);
    const int end = unit + shares.length(block);
    while (unit < end) {
      const int begin = unit % key_tiles, length = std::min(key_tiles - begin, end - unit);
      work(whole_tiles + unit / key_tiles, begin, begin + length);
      unit += length;
    }
  });
  for (std::thread &thread : threads) thread.join();
}
extern "C" void begins(int units, int count, int *out) {
  for (int i = 0; i <= count; ++i) out[i] = Shares{units, count}.begin(i);
}
extern "C" int partial_bytes() { return sizeof(Partial<16>); }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("stream_k")
    return compile_device_code(("types.cuh", "softmax.cuh", "stream_k.cuh"), _BLOCKS, Path(folder))


@pytest.mark.parametrize(("units", "count"), [(7, 3), (68 * 128, 132), (5, 5), (1000, 7)])
def test_shares_are_as_equal_as_can_be(library: ctypes.CDLL, units: int, count: int) -> None:
    begins = (ctypes.c_int * (count + 1))()
    library.begins(units, count, begins)
    lengths = [after - before for before, after in pairwise(begins)]
    assert begins[0] == 0 and begins[count] == units and max(lengths) - min(lengths) <= 1


def test_a_partial_is_as_large_as_the_launch_allocates(library: ctypes.CDLL) -> None:
    from flashgen.runtime.parameters import partial_floats

    assert library.partial_bytes() == 4 * partial_floats(128)


@pytest.mark.parametrize(
    ("tiles", "key_tiles", "blocks"), [(12, 16, 8), (3, 40, 8), (1, 64, 8), (21, 30, 16), (2, 13, 12)]
)
def test_parts_of_a_tile_come_together(library: ctypes.CDLL, tiles: int, key_tiles: int, blocks: int) -> None:
    division = divide(tiles, key_tiles, blocks)
    whole, shares = division.whole, division.shares
    assert shares
    rng = np.random.default_rng(tiles)
    scores = rng.normal(size=(tiles, key_tiles, 4), scale=5).astype(np.float32)
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    scores[0, :, 2:] = -np.inf  # a row without keys
    scores[0, key_tiles // 2 :, :2] = -np.inf
    values = rng.normal(size=scores.shape).astype(np.float32)
    results = np.zeros((tiles, 4), np.float32)
    flags = np.zeros(blocks, np.uint32)
    partials = np.full(blocks * 4 * (128 * 10), np.nan, np.float32)
    arrays = (scores, values, results, flags, partials)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in arrays]
    library.run(tiles, key_tiles, whole, shares, blocks, *pointers)
    weights = np.exp(scores.astype(np.float64)).reshape(tiles, key_tiles, 2, 2)
    total = weights.sum(axis=(1, 3))  # [tiles, rows]
    expected = (weights * values.reshape(weights.shape)).sum(axis=1) / np.maximum(total, 1e-300)[..., None]
    np.testing.assert_allclose(results.reshape(tiles, 2, 2), expected, rtol=2e-5, atol=2e-5)
    assert not flags.any()
