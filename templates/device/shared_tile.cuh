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
      round_up(kHeadDim, 16);  // the matrix instructions' depth; padded with zeros
  static constexpr int kChunks = kColumns / 8;
  static constexpr bool kSwizzled = kColumns % 64 == 0;
  static constexpr int kPitch = kSwizzled ? kColumns : kColumns + 8;  // elements

  // Byte offset of a chunk in a tile whose base is aligned to 128 bytes.
  __device__ static constexpr uint32_t offset(int row, int chunk) {
    return row * kPitch * 2 + (kSwizzled ? chunk ^ (row & 7) : chunk) * 16;
  }

  // Byte offset of the row part that lane i hands to ldmatrix for the first 16x16 block of a tile. The fragments of
  // A, and the transposed ones of B, want the four 8x8 matrices column by column; those of B, whose registers go to
  // mma in pairs, row by row.
  __device__ static constexpr uint32_t lane_by_column(int lane) { return offset(lane % 16, lane / 16); }
  __device__ static constexpr uint32_t lane_by_row(int lane) {
    return offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }

  // The same for the block `row_block` further down and `column_block` further right. What depends on the lane is one
  // register for each of the four swizzles of a block, the same for every tile of this head dimension.
  __device__ static constexpr uint32_t block(uint32_t tile, uint32_t lane, int row_block, int column_block) {
    const int chunk = 2 * column_block;
    const uint32_t swizzled = kSwizzled ? (lane ^ ((chunk & 7) * 16)) + (chunk & ~7) * 16 : lane + chunk * 16;
    return tile + row_block * 16 * kPitch * 2 + swizzled;
  }
};

// How kThreads threads share the chunks of a tile: a thread keeps its columns and takes every kRowStep-th row. As many
// threads stand side by side as give each the same number of chunks, up to the 128 bytes of a cache line.
template <int kHeadDim, int kRows, int kThreads>
struct TileShare {
  using Tile = SharedTile<kHeadDim>;
  static constexpr int kAbreast = Tile::kChunks % 8 == 0 ? 8 : Tile::kChunks % 4 == 0 ? 4 : 2;
  static constexpr int kRowStep = kThreads / kAbreast;
  static constexpr int kPasses = ceil_div(kRows, kRowStep);
  static constexpr int kExcess =
      kPasses * kRowStep - kRows;  // rows of the last pass that are not of the tile
  static constexpr bool kPadded = Tile::kColumns != kHeadDim;
  static_assert(!Tile::kSwizzled || kRowStep % 8 == 0, "every pass has the same swizzle");

  int row = threadIdx.x / kAbreast;
  int chunk = threadIdx.x % kAbreast;

  // Whether this thread has a chunk in the tile, `c` to the right of its first, in rows of head_dim elements.
  __device__ __forceinline__ bool has_row(int pass) const {
    return kExcess == 0 || row + pass * kRowStep < kRows;
  }
  __device__ __forceinline__ bool has_column(int c) const { return !kPadded || (chunk + c) * 8 < kHeadDim; }
};

// global [rows, head_dim] -> shared, one tile after the other, from the last rows of the tensor to the first. The
// thread's source is one pointer that moves up by the same step from row to row and from tile to tile.
template <int kHeadDim, int kRows, int kThreads>
struct TileReader : TileShare<kHeadDim, kRows, kThreads> {
  using Share = TileShare<kHeadDim, kRows, kThreads>;
  using Tile = typename Share::Tile;
  const char *source;
  int64_t step;    // bytes between this thread's rows
  int64_t excess;  // bytes that the last pass begins beyond the tile

  // Begins with the tile at row `row_begin`.
  __device__ __forceinline__ TileReader(const void *tensor, const int64_t (&stride)[3], int batch,
                                        int row_begin, int head)
      : step(2 * Share::kRowStep * stride[1]), excess(2 * Share::kExcess * stride[1]) {
    const int last = row_begin + this->row + (Share::kPasses - 1) * Share::kRowStep;
    source = row_address(tensor, stride, batch, last, head) + 16 * this->chunk;
  }

  // Loads a tile and moves on to the one above it. Rows from `rows` on, and the columns that pad the head dimension,
  // become zero and are not read.
  __device__ __forceinline__ void load(uint32_t shared, int rows) {
    // A step down is a multiple of 8 rows, and one to the right a multiple of 8 chunks, or nothing is swizzled.
    const uint32_t first = shared + Tile::offset(this->row, this->chunk);
#pragma unroll
    for (int pass = Share::kPasses - 1; pass >= 0; --pass) {
      if (this->has_row(pass)) {
#pragma unroll
        for (int c = 0; c < Tile::kChunks; c += Share::kAbreast) {
          const uint32_t target = first + pass * Share::kRowStep * Tile::kPitch * 2 + c * 16;
          const bool inside = this->row + pass * Share::kRowStep < rows && this->has_column(c);
          cp_async_or_zero(target, source + c * 16, inside);
        }
      }
      source -= step;
    }
    if constexpr (Share::kExcess > 0) source += excess;
  }

  // Loads the tile that lies `tiles` below the one that is next, and stays where it is.
  __device__ __forceinline__ void load_below(uint32_t shared, int tiles, int rows) const {
    TileReader below = *this;
    below.source += tiles * (Share::kPasses * step - excess);
    below.load(shared, rows);
  }
};

// shared -> global [rows, head_dim]
template <int kHeadDim, int kRows, int kThreads>
struct TileWriter : TileShare<kHeadDim, kRows, kThreads> {
  using Share = TileShare<kHeadDim, kRows, kThreads>;
  using Tile = typename Share::Tile;
  char *target;
  int64_t step;  // bytes between this thread's rows

  __device__ __forceinline__ TileWriter(void *tensor, const int64_t (&stride)[3], int batch, int row_begin,
                                        int head)
      : target(row_address(tensor, stride, batch, row_begin + this->row, head) + 16 * this->chunk),
        step(2 * Share::kRowStep * stride[1]) {}

  // Stores the rows below `rows`.
  __device__ __forceinline__ void store(const char *shared, int rows) const {
#pragma unroll
    for (int pass = 0; pass < Share::kPasses; ++pass) {
      const int r = this->row + pass * Share::kRowStep;
      if (this->has_row(pass) && r < rows) {
#pragma unroll
        for (int c = 0; c < Tile::kChunks; c += Share::kAbreast) {
          if (this->has_column(c)) {
            *reinterpret_cast<uint4 *>(target + pass * step + c * 16) =
                *reinterpret_cast<const uint4 *>(shared + Tile::offset(r, this->chunk + c));
          }
        }
      }
    }
  }
};
