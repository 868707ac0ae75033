// attn_fwd_causal_softcap50_bf16_d256_g2_sm80
//
// Attention forward for the spec "gemma2-9b": mask causal, score softcap50, bf16, head_dim 256, 2 query
// heads per K/V head. Tiles of 128 queries x 64 keys, 8 warps, 1 K/V buffer, 131072 bytes of shared memory,
// 1 block per SM.
//
// Printed by flashgen. To compile: nvcc -std=c++17 -arch=sm_80 -I templates/device -cubin FILE.cu
#include "capped_softmax.cuh"
#include "cp_async.cuh"
#include "elementary.cuh"
#include "integer.cuh"
#include "mask.cuh"
#include "mma.cuh"
#include "shared_tile.cuh"
#include "softmax.cuh"
#include "types.cuh"
#include "warp_products.cuh"

namespace {

using Element = bf16;
constexpr int kHeadDimQk = 256;
constexpr int kHeadDimV = 256;
constexpr int kGroup = 2;  // query heads per K/V head
constexpr int kTileQ = 128;
constexpr int kTileKv = 64;
constexpr int kWarps = 8;
constexpr int kBlocksPerSm = 1;
constexpr int kSmemBytes = 131072;
constexpr int kSectionBytes = 32 << 20;  // K and V of the heads that are worked on at a time, to stay in L2

constexpr int kThreads = 32 * kWarps;
constexpr int kWarpBlocks = kTileQ / (16 * kWarps);  // blocks of 16 rows per warp
static_assert(kTileQ == 16 * kWarps * kWarpBlocks && kTileKv % 16 == 0);

using QkTile = SharedTile<kHeadDimQk>;
using VTile = SharedTile<kHeadDimV>;
using QReader = TileReader<kHeadDimQk, kTileQ, kThreads>;
using KReader = TileReader<kHeadDimQk, kTileKv, kThreads>;
using VReader = TileReader<kHeadDimV, kTileKv, kThreads>;
using OWriter = TileWriter<kHeadDimV, kTileQ, kThreads>;

struct SharedStorage {
  union {
    uint16_t q[kTileQ * QkTile::kPitch];
    uint16_t o[kTileQ * VTile::kPitch];  // written when Q is no longer needed
  };
  uint16_t k[kTileKv * QkTile::kPitch];
  uint16_t v[kTileKv * VTile::kPitch];
};
static_assert(sizeof(SharedStorage) == kSmemBytes);

struct AttentionParams {
  const void *q, *k, *v;  // [batch, seqlen, heads, head_dim], head_dim contiguous, rows aligned to 16 bytes
  void *o;
  float *lse;                                                  // [batch, heads_q, seqlen_q], may be null
  int64_t q_stride[3], k_stride[3], v_stride[3], o_stride[3];  // of batch, seq, head, in elements
  int32_t batch, heads_q, heads_kv, seqlen_q, seqlen_kv;
  float scale;  // positive
};

// The q tile of one block.
struct Work {
  int batch, head, q_begin;
};

// Later queries see more keys: they go first, so that short tiles fill the end. The heads that are walked
// together form a section whose K and V fit in L2.
__device__ __forceinline__ Work find_work(const AttentionParams &params, int block) {
  const int q_tiles = ceil_div(params.seqlen_q, kTileQ);
  const int heads = params.batch * params.heads_q;
  const int section_keys = kSectionBytes / (2 * (kHeadDimQk + kHeadDimV));
  const int section_heads = max(section_keys / max(params.seqlen_kv, 1), 1) * kGroup;
  const int width_before = min(section_heads, heads);
  const int first_head = block / (width_before * q_tiles) * width_before;
  const int width = min(width_before, heads - first_head);
  const int place = block - first_head * q_tiles;
  const int q_tile = q_tiles - 1 - place / width;
  const int batch_head = first_head + place % width;
  return {batch_head / params.heads_q, batch_head % params.heads_q, q_tile * kTileQ};
}

// What all elements of one head share.
struct HeadTerms {
  ScaledTanh bend;
};

__device__ __forceinline__ HeadTerms head_terms(const AttentionParams &params, int batch, int head) {
  const ScaledTanh bend = scaled_tanh(50.0f, params.scale * 0.02f);
  return {bend};
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    attn_fwd_causal_softcap50_bf16_d256_g2_sm80(const __grid_constant__ AttentionParams params) {
  extern __shared__ __align__(128) char shared[];
  SharedStorage &storage = *reinterpret_cast<SharedStorage *>(shared);

  __builtin_assume(threadIdx.x < kThreads);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int seqlen_q = params.seqlen_q;
  const int seqlen_kv = params.seqlen_kv;

  const Work work = find_work(params, blockIdx.x);
  const int head_kv = work.head / kGroup;
  const int q_rows = min(kTileQ, seqlen_q - work.q_begin);

  const HeadTerms terms = head_terms(params, work.batch, work.head);
  // Which keys. Row i stands at position i + q_offset of the key timeline.
  const int q_offset = seqlen_kv - seqlen_q;
  const int q_first = work.q_begin + q_offset;
  const int q_last = q_first + q_rows - 1;
  const auto last_key = [&](int q) { return min(q, seqlen_kv - 1); };
  const int kv_begin = 0;
  const int kv_end = last_key(q_last) + 1;
  const int tile_begin = kv_begin / kTileKv;
  const int tile_end = kv_begin < kv_end ? ceil_div(kv_end, kTileKv) : tile_begin;
  // Every row keeps every key of the tiles below full_end.
  const int full_end = max(last_key(q_first) + 1, 0) / kTileKv;

  // K and V are read from the last tile to the first.
  const int kv_last = (tile_end - 1) * kTileKv;
  QReader q_reader(params.q, params.q_stride, work.batch, work.q_begin, work.head);
  KReader k_reader(params.k, params.k_stride, work.batch, kv_last, head_kv);
  VReader v_reader(params.v, params.v_stride, work.batch, kv_last, head_kv);

  // What this lane reads and computes: rows warp_row + 16 * i + lane / 4 + {0, 8} of the tile.
  const int warp_row = warp * 16 * kWarpBlocks;
  const uint32_t q_shared = shared_address(storage.q);
  const uint32_t k_shared = shared_address(storage.k);
  const uint32_t v_shared = shared_address(storage.v);
  const uint32_t q_tile = q_shared + warp_row * QkTile::kPitch * 2;
  const uint32_t q_lane = QkTile::lane_by_column(lane);
  const uint32_t k_lane = QkTile::lane_by_row(lane);
  const uint32_t v_lane = VTile::lane_by_column(lane);
  float o[kWarpBlocks][VTile::kColumns / 8][4] = {};
  CappedSoftmax softmax[kWarpBlocks];

  q_reader.load(q_shared, q_rows);
  if (tile_begin < tile_end) k_reader.load(k_shared, seqlen_kv - kv_last);
  cp_async_commit();

  for (int tile = tile_end - 1; tile >= tile_begin; --tile) {
    // K has landed. V lands during Q K^T.
    cp_async_wait<0>();
    __syncthreads();
    v_reader.load(v_shared, seqlen_kv - tile * kTileKv);
    cp_async_commit();

    // S = Q K^T
    float s[kWarpBlocks][kTileKv / 8][4] = {};
    multiply_qk<Element, kHeadDimQk>(s, q_tile, q_lane, k_shared, k_lane);

    // S = -inf outside of the kept keys of each row
    if (tile >= full_end) {
      const int thread = forget(threadIdx.x);  // as little as possible is held for the tiles that are masked
      const int column = tile * kTileKv + 2 * (thread % 4);
#pragma unroll
      for (int i = 0; i < kWarpBlocks; ++i) {
        const int row = q_first + thread / 32 * 16 * kWarpBlocks + 16 * i + thread % 32 / 4;
        mask_after(s[i], {last_key(row) - column, last_key(row + 8) - column});
      }
    }

    // V has landed and everyone has read K. The next K lands during the softmax and P V.
    cp_async_wait<0>();
    __syncthreads();
    if (tile > tile_begin) k_reader.load(k_shared, kTileKv);
    cp_async_commit();

    // P = exp(score(S) - m),  O = diag(exp(m_old - m)) O
#pragma unroll
    for (int i = 0; i < kWarpBlocks; ++i) {
      float correction[2];
      softmax[i].update(s[i], terms.bend, correction, Masked{});
      scale_rows(o[i], correction);
    }

    // O += P V
    multiply_pv<Element, kHeadDimV>(o, s, v_shared, v_lane);
  }

  // O = diag(1 / l) O through shared memory,  lse = m + log(l)
  // Where O goes is found again: held through the loop, it would cost registers that the loop needs.
  const Work done = find_work(params, forget(blockIdx.x));
  const int o_rows = min(kTileQ, params.seqlen_q - done.q_begin);
  const int64_t lse_row = static_cast<int64_t>(done.batch) * params.heads_q + done.head;
  cp_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarpBlocks; ++i) {
    float inverse[2];
    softmax[i].settle();
    softmax[i].finish(inverse);
    scale_rows(o[i], inverse);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp_row + 16 * i + lane / 4 + 8 * r;
#pragma unroll
      for (int j = 0; j < VTile::kChunks; ++j) {
        char *pair = reinterpret_cast<char *>(storage.o) + VTile::offset(row, j) + 4 * (lane % 4);
        *reinterpret_cast<uint32_t *>(pair) = pack<Element>(o[i][j][2 * r], o[i][j][2 * r + 1]);
      }
      if (params.lse != nullptr && lane % 4 == 0 && row < o_rows) {
        params.lse[lse_row * params.seqlen_q + done.q_begin + row] = softmax[i].log_sum_exp(r, 1.0f);
      }
    }
  }
  __syncthreads();
  OWriter o_writer(params.o, params.o_stride, done.batch, done.q_begin, done.head);
  o_writer.store(reinterpret_cast<const char *>(storage.o), o_rows);
}
