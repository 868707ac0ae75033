// The two matrix products of attention for one warp: kBlocks x 16 rows, operands in shared tiles.
//
// Fragments are fetched one step ahead of the mma that uses them, so that the latency of ldmatrix hides behind the
// tensor cores. An address argument is the one this lane gives to ldmatrix for the tile's first 16x16 block.
#pragma once

#include "mma.cuh"
#include "shared_tile.cuh"
#include "types.cuh"

// Rows from `row` on as mma's A operand, or keys of V as its transposed B operand: 8x8 matrices in column order.
template <int kHeadDim>
__device__ __forceinline__ uint32_t row_operand_offset(int row, int lane) {
  return SharedTile<kHeadDim>::offset(row + lane % 16, lane / 16);
}

// Keys of K as mma's B operand: both halves of 16 columns, then the same of the next eight keys.
template <int kHeadDim>
__device__ __forceinline__ uint32_t key_operand_offset(int lane) {
  return SharedTile<kHeadDim>::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

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

// Q fragments of the whole head dimension, for kernels that keep Q in registers.
template <int kHeadDim, int kBlocks, int kSteps>
__device__ __forceinline__ void load_rows(uint32_t (&q)[kSteps][kBlocks][4], uint32_t q_address) {
  using Tile = SharedTile<kHeadDim>;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      ldmatrix(q[k][i], Tile::right(q_address + i * 16 * Tile::kPitch * 2, 2 * k));
    }
  }
}

// S += Q K^T, Q in registers. s: [kBlocks x 16 rows, kTiles x 8 keys].
template <typename Element, int kHeadDim, int kBlocks, int kTiles, int kSteps>
__device__ __forceinline__ void multiply_qk(float (&s)[kBlocks][kTiles][4],
                                            const uint32_t (&q)[kSteps][kBlocks][4], uint32_t k_address) {
  using Tile = SharedTile<kHeadDim>;
  constexpr int kPairs = kTiles / 2;
  uint32_t b[2][4];
  ldmatrix(b[0], k_address);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int step = k * kPairs + j;
      const int next_k = j + 1 < kPairs ? k : k + 1, next_j = j + 1 < kPairs ? j + 1 : 0;
      if (next_k < kSteps) {
        ldmatrix(b[(step + 1) % 2], Tile::right(k_address + next_j * 16 * Tile::kPitch * 2, 2 * next_k));
      }
      multiply_pair<Element>(s, j, q[k], b[step % 2]);
    }
  }
}

// S += Q K^T, Q in shared memory. s: [kBlocks x 16 rows, kTiles x 8 keys].
template <typename Element, int kHeadDim, int kBlocks, int kTiles>
__device__ __forceinline__ void multiply_qk(float (&s)[kBlocks][kTiles][4], uint32_t q_address,
                                            uint32_t k_address) {
  using Tile = SharedTile<kHeadDim>;
  constexpr int kSteps = Tile::kColumns / 16;
  constexpr int kPairs = kTiles / 2;
  uint32_t a[2][kBlocks][4];
  uint32_t b[2][4];
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) ldmatrix(a[0][i], q_address + i * 16 * Tile::kPitch * 2);
  ldmatrix(b[0], k_address);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int step = k * kPairs + j;
      const int next_k = j + 1 < kPairs ? k : k + 1, next_j = j + 1 < kPairs ? j + 1 : 0;
      if (next_k < kSteps) {
        ldmatrix(b[(step + 1) % 2], Tile::right(k_address + next_j * 16 * Tile::kPitch * 2, 2 * next_k));
      }
      if (j == 0 && k + 1 < kSteps) {
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          ldmatrix(a[(k + 1) % 2][i], Tile::right(q_address + i * 16 * Tile::kPitch * 2, 2 * (k + 1)));
        }
      }
      multiply_pair<Element>(s, j, a[k % 2], b[step % 2]);
    }
  }
}

// O += P V. p: [kBlocks x 16 rows, kTiles x 8 keys] in fp32, rounded here to be the A operand;
// o: [kBlocks x 16 rows, kColumns x 8 columns].
template <typename Element, int kHeadDim, int kBlocks, int kTiles, int kColumns>
__device__ __forceinline__ void multiply_pv(float (&o)[kBlocks][kColumns][4],
                                            const float (&p)[kBlocks][kTiles][4], uint32_t v_address) {
  using Tile = SharedTile<kHeadDim>;
  constexpr int kSteps = kTiles / 2;
  constexpr int kPairs = kColumns / 2;
  uint32_t a[kBlocks][4];
  uint32_t b[2][4];
  ldmatrix_transposed(b[0], v_address);
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
      const int step = k * kPairs + j;
      const int next_k = j + 1 < kPairs ? k : k + 1, next_j = j + 1 < kPairs ? j + 1 : 0;
      if (next_k < kSteps) {
        ldmatrix_transposed(b[(step + 1) % 2],
                            Tile::right(v_address + next_k * 16 * Tile::kPitch * 2, 2 * next_j));
      }
      multiply_pair<Element>(o, j, a, b[step % 2]);
    }
  }
}
