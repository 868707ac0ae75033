// Tiles of 16-bit elements in shared memory, and their transfer from and to global memory.
//
// ldmatrix and the 16-byte copies move 16-byte chunks, eight lanes at a time, one from each of eight rows (or eight
// neighbours of one row). They are free of bank conflicts when the eight chunks fall into eight different groups of
// four banks. A row of a multiple of 64 elements spans all banks, so chunk c of row r is stored at c XOR (r mod 8);
// any other row is padded by one chunk, which makes its length an odd number of chunks.
#pragma once

#include "cp_async.cuh"
#include "integer.cuh"
#include "tensor.cuh"
#include "types.cuh"

template <int kHeadDim>
struct SharedTile {
  static constexpr int kColumns =
      round_up(kHeadDim, 16);  // what the matrix instructions read; the excess is zero
  static constexpr int kChunks = kColumns / 8;
  static constexpr bool kSwizzled = kColumns % 64 == 0;
  static constexpr int kPitch = kSwizzled ? kColumns : kColumns + 8;  // elements

  // Byte offset of a chunk in a tile whose base is aligned to 128 bytes.
  __device__ static constexpr uint32_t offset(int row, int chunk) {
    return row * kPitch * 2 + (kSwizzled ? chunk ^ (row & 7) : chunk) * 16;
  }

  // Address of the chunk `chunks` (even) to the right of chunk 0 or 1 of a row, given the address of that one.
  __device__ static constexpr uint32_t right(uint32_t address, int chunks) {
    return kSwizzled ? (address ^ ((chunks & 7) * 16)) + (chunks & ~7) * 16 : address + chunks * 16;
  }
};

// How kThreads threads share the chunks of a tile: a thread keeps its columns and walks down the rows. As many
// threads stand side by side as give each the same number of chunks, up to the 128 bytes of a cache line.
template <int kHeadDim, int kRows, int kThreads>
struct TileTransfer {
  using Tile = SharedTile<kHeadDim>;
  static constexpr int kAbreast = Tile::kChunks % 8 == 0 ? 8 : Tile::kChunks % 4 == 0 ? 4 : 2;
  static constexpr int kRowStep = kThreads / kAbreast;
  static constexpr int kPasses = ceil_div(kRows, kRowStep);
  static constexpr bool kRagged = kRows % kRowStep != 0;
  static constexpr bool kPadded = Tile::kColumns != kHeadDim;
  static_assert(!Tile::kSwizzled || kRowStep % 8 == 0, "every pass has the same swizzle");

  int row = threadIdx.x / kAbreast;
  int chunk = threadIdx.x % kAbreast;

  // This thread's first chunk of the tile of `tensor` that begins at `row_begin`.
  template <typename Pointer>
  __device__ __forceinline__ auto first_chunk(Pointer tensor, const int64_t (&stride)[3], int batch,
                                              int row_begin, int head) const {
    return row_address(tensor, stride, batch, row_begin + row, head) + 16 * chunk;
  }

  // global [rows, head_dim] -> shared. `global` is this thread's first chunk, `row_stride` in bytes.
  // Rows from `rows` on, and the columns that pad the head dimension, become zero and are not read.
  __device__ __forceinline__ void load(uint32_t shared, const char *global, int64_t row_stride,
                                       int rows) const {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int r = row + pass * kRowStep;
      if (!kRagged || r < kRows) {
        const char *source = global + pass * (kRowStep * row_stride);
#pragma unroll
        for (int c = 0; c < Tile::kChunks; c += kAbreast) {
          const uint32_t target = shared + Tile::offset(row, chunk + c) + pass * kRowStep * Tile::kPitch * 2;
          const bool inside = r < rows && (!kPadded || (chunk + c) * 8 < kHeadDim);
          cp_async_or_zero(target, source + c * 16, inside);
        }
      }
    }
  }

  // shared -> global [rows, head_dim], for the rows below `rows`.
  __device__ __forceinline__ void store(char *global, int64_t row_stride, const char *shared,
                                        int rows) const {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int r = row + pass * kRowStep;
      if ((!kRagged || r < kRows) && r < rows) {
#pragma unroll
        for (int c = 0; c < Tile::kChunks; c += kAbreast) {
          if (!kPadded || (chunk + c) * 8 < kHeadDim) {
            *reinterpret_cast<uint4 *>(global + pass * (kRowStep * row_stride) + c * 16) =
                *reinterpret_cast<const uint4 *>(shared + Tile::offset(r, chunk + c));
          }
        }
      }
    }
  }
};
