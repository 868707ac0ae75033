// Masks given as an interval of kept keys per row, on one warp's 16 rows in accumulator layout (see mma.cuh).
//
// Limits are relative to the thread's first column: `key - (first key of the tile + 2 * (lane % 4))`,
// one for each of the two rows that the thread holds.
#pragma once

#include "types.cuh"

// Drops the keys after the last kept one.
template <int kTiles>
__device__ __forceinline__ void mask_after(float (&s)[kTiles][4], const int (&last)[2]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (8 * j + e % 2 > last[e / 2]) s[j][e] = negative_infinity();
    }
  }
}

// Drops the keys before the first kept one.
template <int kTiles>
__device__ __forceinline__ void mask_before(float (&s)[kTiles][4], const int (&first)[2]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (8 * j + e % 2 < first[e / 2]) s[j][e] = negative_infinity();
    }
  }
}
