// The two matrix products of attention for one warp: kBlocks x 16 rows, operands in shared tiles.
//
// Fragments are fetched one step ahead of the mma that uses them, so that the latency of ldmatrix hides behind the
// tensor cores. A tile is given by its shared address (of Q: of the warp's first row) and by what SharedTile says of
// this lane: lane_by_column for Q and V, lane_by_row for K.
#pragma once

#include "mma.cuh"
#include "shared_tile.cuh"
#include "types.cuh"

// Columns [16 * pair, 16 * pair + 16) of C += A B, over 16 of the common dimension.
template <typename Element, int kBlocks, int kTiles>
__device__ __forceinline__ void multiply_pair(float (&c)[kBlocks][kTiles][4], int pair,
                                              const uint32_t (&a)[kBlocks][4], const uint32_t (&b)[4]) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    mma<Element>(c[i][2 * pair], a[i], b[0], b[1]);
    mma<Element>(c[i][2 * pair + 1], a[i], b[2], b[3]);
  }
}

// Columns [16 * k, 16 * k + 16) of Q.
template <int kHeadDim, int kBlocks>
__device__ __forceinline__ void load_rows(uint32_t (&a)[kBlocks][4], uint32_t q_tile, uint32_t q_lane,
                                          int k) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) ldmatrix(a[i], SharedTile<kHeadDim>::block(q_tile, q_lane, i, k));
}

// S += Q K^T, Q in registers. s: [kBlocks x 16 rows, kTiles x 8 keys].
template <typename Element, int kHeadDim, int kBlocks, int kTiles, int kSteps>
__device__ __forceinline__ void multiply_qk(float (&s)[kBlocks][kTiles][4],
                                            const uint32_t (&q)[kSteps][kBlocks][4], uint32_t k_tile,
                                            uint32_t k_lane) {
  using Tile = SharedTile<kHeadDim>;
  constexpr int kPairs = kTiles / 2;
  uint32_t b[2][4];
  ldmatrix(b[0], Tile::block(k_tile, k_lane, 0, 0));
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int now = (k * kPairs + j) % 2;
      const int next_k = j + 1 < kPairs ? k : k + 1, next_j = j + 1 < kPairs ? j + 1 : 0;
      if (next_k < kSteps) ldmatrix(b[1 - now], Tile::block(k_tile, k_lane, next_j, next_k));
      multiply_pair<Element>(s, j, q[k], b[now]);
    }
  }
}

// S += Q K^T, Q in shared memory. s: [kBlocks x 16 rows, kTiles x 8 keys].
template <typename Element, int kHeadDim, int kBlocks, int kTiles>
__device__ __forceinline__ void multiply_qk(float (&s)[kBlocks][kTiles][4], uint32_t q_tile, uint32_t q_lane,
                                            uint32_t k_tile, uint32_t k_lane) {
  using Tile = SharedTile<kHeadDim>;
  constexpr int kSteps = Tile::kColumns / 16;
  constexpr int kPairs = kTiles / 2;
  uint32_t a[2][kBlocks][4];
  uint32_t b[2][4];
  load_rows<kHeadDim>(a[0], q_tile, q_lane, 0);
  ldmatrix(b[0], Tile::block(k_tile, k_lane, 0, 0));
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int now = (k * kPairs + j) % 2;
      const int next_k = j + 1 < kPairs ? k : k + 1, next_j = j + 1 < kPairs ? j + 1 : 0;
      if (next_k < kSteps) ldmatrix(b[1 - now], Tile::block(k_tile, k_lane, next_j, next_k));
      if (j == 0 && k + 1 < kSteps) load_rows<kHeadDim>(a[(k + 1) % 2], q_tile, q_lane, k + 1);
      multiply_pair<Element>(s, j, a[k % 2], b[now]);
    }
  }
}

// O += P V. p: [kBlocks x 16 rows, kTiles x 8 keys] in fp32, rounded here to be the A operand;
// o: [kBlocks x 16 rows, kColumns x 8 columns].
template <typename Element, int kHeadDim, int kBlocks, int kTiles, int kColumns>
__device__ __forceinline__ void multiply_pv(float (&o)[kBlocks][kColumns][4],
                                            const float (&p)[kBlocks][kTiles][4], uint32_t v_tile,
                                            uint32_t v_lane) {
  using Tile = SharedTile<kHeadDim>;
  constexpr int kSteps = kTiles / 2;
  constexpr int kPairs = kColumns / 2;
  uint32_t a[kBlocks][4];
  uint32_t b[2][4];
  ldmatrix_transposed(b[0], Tile::block(v_tile, v_lane, 0, 0));
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        a[i][e] = pack<Element>(p[i][2 * k + e / 2][e % 2 * 2], p[i][2 * k + e / 2][e % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int now = (k * kPairs + j) % 2;
      const int next_k = j + 1 < kPairs ? k : k + 1, next_j = j + 1 < kPairs ? j + 1 : 0;
      if (next_k < kSteps) ldmatrix_transposed(b[1 - now], Tile::block(v_tile, v_lane, next_k, next_j));
      multiply_pair<Element>(o, j, a, b[now]);
    }
  }
}
