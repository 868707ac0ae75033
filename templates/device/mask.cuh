// Masks given as an interval of kept keys per row, on one warp's 16 rows in accumulator layout (see mma.cuh).
//
// Limits are relative to the thread's first column: `key - (first key of the tile + 2 * (lane % 4))`,
// one for each of the two rows that the thread holds. Of a row it holds columns 8 j and 8 j + 1, so what it keeps is a
// bit for every j; ptxas turns such words into predicates with one R2P for seven of them, instead of a compare each.
#pragma once

#include "types.cuh"

// The lowest `count` bits, of at most 24: ptxas finds R2P in words that leave the sign alone.
constexpr int kMaskBits = 24;

__device__ __forceinline__ uint32_t low_bits(int count) { return (1u << min(max(count, 0), kMaskBits)) - 1u; }

// s = -inf where the bit of its column is 0; `bits(e, begin)` has those of columns 8 j + e % 2, j from `begin` on.
template <int kTiles, typename Bits>
__device__ __forceinline__ void mask_columns(float (&s)[kTiles][4], Bits bits) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
#pragma unroll
    for (int begin = 0; begin < kTiles; begin += kMaskBits) {
      const uint32_t kept = bits(e, begin);
#pragma unroll
      for (int j = begin; j < kTiles && j < begin + kMaskBits; ++j) {
        s[j][e] = kept & (1u << (j - begin)) ? s[j][e] : negative_infinity();
      }
    }
  }
}

// Drops the keys after the last kept one.
template <int kTiles>
__device__ __forceinline__ void mask_after(float (&s)[kTiles][4], const int (&last)[2]) {
  // kept: 8 j + e % 2 <= last
  mask_columns(s, [&](int e, int begin) { return low_bits(((last[e / 2] - e % 2) >> 3) + 1 - begin); });
}

// Drops the keys before the first kept one.
template <int kTiles>
__device__ __forceinline__ void mask_before(float (&s)[kTiles][4], const int (&first)[2]) {
  // dropped: 8 j + e % 2 < first
  mask_columns(s, [&](int e, int begin) { return ~low_bits(((first[e / 2] - e % 2 + 7) >> 3) - begin); });
}
