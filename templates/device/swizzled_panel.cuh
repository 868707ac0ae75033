// 16-bit elements in 128-byte-swizzled panels (wgmma.cuh): accumulators stored for TMA and WGMMA to read, operands
// fetched for WGMMA to take from registers.
#pragma once

#include "mma.cuh"
#include "types.cuh"

// A warp's 16 rows, of the 64 that its warpgroup owns, go to panels of 64 rows x 64 columns that follow one another.
// PTX: "Warp Level Matrix Store Instruction: stmatrix"; lane i names row i % 8 of matrix i / 8.
template <typename Element, int kTiles>
__device__ __forceinline__ void store_to_panels(void *panels, const float (&x)[kTiles][4], int warp,
                                                int lane) {
  const int row = warp * 16 + lane % 16;
  const uint32_t row_shared = shared_address(panels) + row * 128;
#pragma unroll
  for (int j = 0; j < kTiles; j += 2) {
    const int chunk = (j + lane / 16) % 8;
    const uint32_t target = row_shared + (j / 8) * (64 * 128) + ((chunk ^ (row % 8)) * 16);
    const uint32_t upper = pack<Element>(x[j][0], x[j][1]), lower = pack<Element>(x[j][2], x[j][3]);
    if (j + 1 < kTiles) {
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(target),
                   "r"(upper), "r"(lower), "r"(pack<Element>(x[j + 1][0], x[j + 1][1])),
                   "r"(pack<Element>(x[j + 1][2], x[j + 1][3]))
                   : "memory");
    } else {
      asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(target), "r"(upper),
                   "r"(lower)
                   : "memory");
    }
  }
}

// Columns [16 * step, 16 * step + 16) of a warp's 16 rows in such panels, as the fragment of an A operand.
__device__ __forceinline__ void load_from_panels(uint32_t (&fragment)[4], const void *panels, int step,
                                                 int warp, int lane) {
  const int row = warp * 16 + lane % 16;
  const int chunk = step % 4 * 2 + lane / 16;
  const uint32_t row_shared = shared_address(panels) + step / 4 * (64 * 128) + row * 128;
  ldmatrix(fragment, row_shared + ((chunk ^ (row % 8)) * 16));
}
