// attn_fwd_causal_softcap50_bf16_d256_g2_sm90a
//
// Attention forward for the spec "gemma2-9b":
// mask causal, bf16, head_dim 256, 2 query heads per K/V head.
// Tiles of 128 queries x 64 keys, 2 computing warpgroups and a producer, 2 K/V buffers, 1 more of V; 231424 bytes of shared memory.
//
// Printed by flashgen. To compile: nvcc -std=c++17 -arch=sm_90a -I templates/device -cubin FILE.cu
#include "capped_softmax.cuh"
#include "elementary.cuh"
#include "integer.cuh"
#include "mask.cuh"
#include "mbarrier.cuh"
#include "softmax.cuh"
#include "swizzled_panel.cuh"
#include "tma.cuh"
#include "types.cuh"
#include "wgmma.cuh"

struct AttentionParams {
  TensorMap q, k, v, o;    // (head_dim, seqlen, heads, batch)
  float *lse;              // [batch, heads_q, seqlen_q], or null
  uint32_t *tile_counter;  // 0 before the launch, 0 after it
  int batch, heads_q, heads_kv, seqlen_q, seqlen_kv;
  int tiles;              // units of work in all: q tiles, or clusters of them
  int tiles_per_head;     // the same, of one head
  int heads_per_section;  // heads whose keys and values share L2
  float scale;            // positive
  int *links;  // [tiles, warpgroups]: its block's last tile before that left the range, -1; or kKept
};

namespace {

using Element = bf16;
constexpr int kTileQ = 128;
constexpr int kTileKv = 64;
constexpr int kStages = 2;
constexpr int kVStages = 3;
constexpr int kQStages = 1;
constexpr int kHeadDimV = 256;
constexpr int kGroup = 2;  // query heads per K/V head
constexpr int kWarpgroups = 2;  // that compute; each owns 64 rows of the q tile
constexpr int kThreads = 128 * (kWarpgroups + 1);
constexpr int kPanelsQk = 4;  // of 64 columns
constexpr int kPanelsV = 4;

constexpr int kQBytes = 64 * kPanelsQk * 128;  // of one warpgroup
constexpr int kKBytes = kTileKv * kPanelsQk * 128;
constexpr int kVBytes = kTileKv * kPanelsV * 128;

// A unit of work: a q tile of a head, and the key tiles [begin, end) that any of its rows needs.
struct Tile {
  int q, head, batch, begin, end, index;
};
constexpr int kAllOnce = -1, kNoMore = -2;  // in the place of a batch: all tiles were handed over once; were all done
constexpr int kKept = -2;

// Tells the compiler that all lanes of a warp hold the same value or tile, so that its loops are uniform.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffff, value, 0); }

__device__ __forceinline__ Tile uniform(const Tile &tile) {
  return {uniform(tile.q), uniform(tile.head), uniform(tile.batch), uniform(tile.begin), uniform(tile.end), uniform(tile.index)};
}

struct alignas(1024) SharedStorage {
  char q[kQStages][kWarpgroups][kPanelsQk][64 * 128];
  char k[kStages][kPanelsQk][kTileKv * 128];
  char v[kVStages][kPanelsV][kTileKv * 128];
  Barrier q_full[kQStages][kWarpgroups], q_empty[kQStages][kWarpgroups];
  Barrier k_full[kStages], k_empty[kStages];
  Barrier v_full[kVStages], v_empty[kVStages];
  Tile tile[kQStages][kWarpgroups];  // travels with q_full; batch < 0: no more
  Tile current[kWarpgroups][4];  // of each warp
  int repeat[kWarpgroups];  // the last tile that left the range; -1: none. `links` has the ones before
  int repeated_for;         // the warpgroup whose tiles are repeated now
  int repeating;            // whether any are
  Barrier reported;         // by each warpgroup, after its last tile
};
static_assert(sizeof(SharedStorage) + 1024 <= 231424, "more shared memory than planned");

// S[64 x kTileKv] (+)= Q[64 x 16] K^T
__device__ __forceinline__ void wgmma_scores(float (&d)[8][4], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n .reg .pred accumulate;\n setp.ne.b32 accumulate, %34, 0;\n"
      " wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16\n"
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,\n"
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31},\n"
      " %32, %33, accumulate, 1, 1, 0, 0;\n}"
      : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]),
        "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),
        "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
        "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]),
        "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]),
        "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
        "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),
        "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])
      : "l"(a), "l"(b), "r"(accumulate));
}

// O[64 x kHeadDimV] (+)= P[64 x 16] V[16 x kHeadDimV]
__device__ __forceinline__ void wgmma_output(float (&d)[32][4], const uint32_t (&a)[4], uint64_t b,
                                             int accumulate) {
  asm volatile(
      "{\n .reg .pred accumulate;\n setp.ne.b32 accumulate, %133, 0;\n"
      " wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16\n"
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,\n"
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,\n"
      " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,\n"
      " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63,\n"
      " %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79,\n"
      " %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95,\n"
      " %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111,\n"
      " %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127},\n"
      " {%128, %129, %130, %131}, %132, accumulate, 1, 1, 1;\n}"
      : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]),
        "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),
        "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
        "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]),
        "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]),
        "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
        "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),
        "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]),
        "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]),
        "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]),
        "+f"(d[10][0]), "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]),
        "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]),
        "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]),
        "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3]),
        "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]),
        "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]), "+f"(d[15][3]),
        "+f"(d[16][0]), "+f"(d[16][1]), "+f"(d[16][2]), "+f"(d[16][3]),
        "+f"(d[17][0]), "+f"(d[17][1]), "+f"(d[17][2]), "+f"(d[17][3]),
        "+f"(d[18][0]), "+f"(d[18][1]), "+f"(d[18][2]), "+f"(d[18][3]),
        "+f"(d[19][0]), "+f"(d[19][1]), "+f"(d[19][2]), "+f"(d[19][3]),
        "+f"(d[20][0]), "+f"(d[20][1]), "+f"(d[20][2]), "+f"(d[20][3]),
        "+f"(d[21][0]), "+f"(d[21][1]), "+f"(d[21][2]), "+f"(d[21][3]),
        "+f"(d[22][0]), "+f"(d[22][1]), "+f"(d[22][2]), "+f"(d[22][3]),
        "+f"(d[23][0]), "+f"(d[23][1]), "+f"(d[23][2]), "+f"(d[23][3]),
        "+f"(d[24][0]), "+f"(d[24][1]), "+f"(d[24][2]), "+f"(d[24][3]),
        "+f"(d[25][0]), "+f"(d[25][1]), "+f"(d[25][2]), "+f"(d[25][3]),
        "+f"(d[26][0]), "+f"(d[26][1]), "+f"(d[26][2]), "+f"(d[26][3]),
        "+f"(d[27][0]), "+f"(d[27][1]), "+f"(d[27][2]), "+f"(d[27][3]),
        "+f"(d[28][0]), "+f"(d[28][1]), "+f"(d[28][2]), "+f"(d[28][3]),
        "+f"(d[29][0]), "+f"(d[29][1]), "+f"(d[29][2]), "+f"(d[29][3]),
        "+f"(d[30][0]), "+f"(d[30][1]), "+f"(d[30][2]), "+f"(d[30][3]),
        "+f"(d[31][0]), "+f"(d[31][1]), "+f"(d[31][2]), "+f"(d[31][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

// What all elements of one head share.
struct HeadTerms {
  ScaledTanh bend;
};

__device__ __forceinline__ HeadTerms head_terms(const AttentionParams &params, int batch, int head) {
  const ScaledTanh bend = scaled_tanh(50.0f, params.scale * 0.02f);
  return {bend};
}

// Rows of a head: query positions.
__device__ __forceinline__ int row_count(const AttentionParams &params) { return params.seqlen_q; }

// Query i stands at position i + q_offset of the key timeline.
__device__ __forceinline__ int q_offset(const AttentionParams &params) {
  return params.seqlen_kv - params.seqlen_q;
}

// The last key that the query at position q keeps.
__device__ __forceinline__ int last_key(int q, int seqlen_q, int seqlen_kv) { return min(q, seqlen_kv - 1); }

// Key tiles [begin, end) that some row of a range needs; every row needs those in [unmasked_begin, unmasked_end)
// whole.
struct KeyTiles {
  int begin, end, unmasked_begin, unmasked_end;
};

__device__ __forceinline__ KeyTiles key_tiles(int row_begin, int row_end, const AttentionParams &params, const HeadTerms &terms) {
  const int seqlen_q = params.seqlen_q, seqlen_kv = params.seqlen_kv;
  const int q0 = q_offset(params) + row_begin;
  const int q1 = q_offset(params) + (min(row_end, row_count(params)) - 1);
  KeyTiles tiles;
  tiles.begin = 0;
  tiles.end = max(last_key(q1, seqlen_q, seqlen_kv) + kTileKv, 0) / kTileKv;
  tiles.unmasked_begin = 0;
  tiles.unmasked_end = max(last_key(q0, seqlen_q, seqlen_kv) + 1, 0) / kTileKv;
  return tiles;
}

__device__ __forceinline__ Tile tile_at(int index, const AttentionParams &params) {
  // Longest tiles first, in sections of heads whose keys and values stay in L2 together.
  const int section_tiles = params.heads_per_section * params.tiles_per_head;
  const int section = index / section_tiles;
  const int first_head = section * params.heads_per_section;
  const int heads = min(params.heads_per_section, params.batch * params.heads_q - first_head);
  const int place = index - section * section_tiles;
  const int from_last = place / heads;
  const int batch_head = first_head + place - from_last * heads;
  int q = params.tiles_per_head - 1 - from_last;
  const int head = batch_head % params.heads_q, batch = batch_head / params.heads_q;
  const HeadTerms terms = head_terms(params, batch, head);
  const KeyTiles keys = key_tiles(q * kTileQ, (q + 1) * kTileQ, params, terms);
  return {q, head, batch, keys.begin, keys.end, index};
}

// One thread feeds the block: K, Q and V in the order in which they are consumed.
__device__ __forceinline__ void produce(SharedStorage &shared, const AttentionParams &params) {
  RingPosition<kQStages> q_ring;
  RingPosition<kStages> k_ring;
  RingPosition<kVStages> v_ring;
  // After a tile, each warpgroup stages its O in the next buffer of V: handed over like a V, with nothing in it.
  int to_stage = 0;
  auto hand_over_staging = [&](int left) {
#pragma unroll 1
    for (; to_stage > left; --to_stage) {
      shared.v_empty[v_ring.stage].wait(v_ring.parity ^ 1);
      shared.v_full[v_ring.stage].arrive();
      v_ring.advance();
    }
  };
  auto load_k = [&](const Tile &tile, int j) {
    Barrier &full = shared.k_full[k_ring.stage];
    shared.k_empty[k_ring.stage].wait(k_ring.parity ^ 1);
    full.arrive_expect(kKBytes);
#pragma unroll
    for (int panel = 0; panel < kPanelsQk; ++panel) {
      char *target = shared.k[k_ring.stage][panel];
      tma_load(target, &params.k, &full, panel * 64, j * kTileKv, tile.head / kGroup, tile.batch);
    }
    k_ring.advance();
  };
  auto load_v = [&](const Tile &tile, int j) {
    hand_over_staging(0);
    Barrier &full = shared.v_full[v_ring.stage];
    shared.v_empty[v_ring.stage].wait(v_ring.parity ^ 1);
    full.arrive_expect(kVBytes);
#pragma unroll
    for (int panel = 0; panel < kPanelsV; ++panel) {
      char *target = shared.v[v_ring.stage][panel];
      tma_load(target, &params.v, &full, panel * 64, j * kTileKv, tile.head / kGroup, tile.batch);
    }
    v_ring.advance();
  };

  int index = blockIdx.x;
  const int stride = gridDim.x;
  auto hand_over = [&](int batch) {
#pragma unroll 1
    for (int warpgroup = 0; warpgroup < kWarpgroups; ++warpgroup) {
      shared.q_empty[q_ring.stage][warpgroup].wait(q_ring.parity ^ 1);
      shared.tile[q_ring.stage][warpgroup].batch = batch;
      shared.q_full[q_ring.stage][warpgroup].arrive();
    }
    q_ring.advance();
  };
  // After all other tiles, those that some warpgroup did not keep.
  auto next_to_repeat = [&]() {
    if (shared.repeating == 0) {
      hand_over_staging(0);
      hand_over(kAllOnce);
      shared.reported.wait(0);
      shared.repeating = 1;
    }
    for (;;) {
      const int warpgroup = shared.repeated_for;
      const int repeated = shared.repeat[warpgroup];
      if (repeated < 0) {
        if (warpgroup + 1 == kWarpgroups) return -1;
        ++shared.repeated_for;
        continue;
      }
      const int *links = params.links + static_cast<int64_t>(repeated) * kWarpgroups;
      shared.repeat[warpgroup] = links[warpgroup];
      bool before = false;  // repeated for another warpgroup already
#pragma unroll 1
      for (int i = 0; i < warpgroup; ++i) before = before || links[i] != kKept;
      if (!before) return repeated;
    }
  };
  for (;;) {
    int place = index;
    if (index >= params.tiles && (place = next_to_repeat()) < 0) break;
    const Tile tile = tile_at(place, params);
    if (tile.begin < tile.end) load_k(tile, tile.begin);  // before Q, whose buffer may still be in use
#pragma unroll
    for (int warpgroup = 0; warpgroup < kWarpgroups; ++warpgroup) {
      Barrier &full = shared.q_full[q_ring.stage][warpgroup];
      shared.q_empty[q_ring.stage][warpgroup].wait(q_ring.parity ^ 1);
      shared.tile[q_ring.stage][warpgroup] = tile;
      full.arrive_expect(kQBytes);
#pragma unroll
      for (int panel = 0; panel < kPanelsQk; ++panel) {
        tma_load(shared.q[q_ring.stage][warpgroup][panel], &params.q, &full, panel * 64,
                 tile.q * kTileQ + warpgroup * 64, tile.head, tile.batch);
      }
    }
    q_ring.advance();
    hand_over_staging(kWarpgroups - 1);  // to the first warpgroup to end, before the next K; see load_v for the others
#pragma unroll 1  // it waits all the time: registers are what it must save
    for (int j = tile.begin + 1; j < tile.end; ++j) {
      load_k(tile, j);
      load_v(tile, j - 1);
    }
    // Every tile draws one successor, so `tiles` draws wrap the counter back to zero for the next launch. It is drawn when
    // the tile is nearly done: drawn at its start, it would wait for this block while others are free.
    if (index < params.tiles) index = stride + atomicInc(params.tile_counter, params.tiles - 1);
    if (tile.begin < tile.end) load_v(tile, tile.end - 1);
    hand_over_staging(0);  // of the tile before, where this one has no keys
    to_stage = kWarpgroups;
  }
  hand_over_staging(0);
  hand_over(kNoMore);
}

// S = Q K^T, by descriptors of the tiles: a batch of wgmma that is committed and not waited for.
__device__ __forceinline__ void issue_scores(float (&s)[kTileKv / 8][4], uint64_t q, uint64_t k) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 16; ++step) {
    const int column_bytes = (step % 4) * 32;
    wgmma_scores(s, advance(q, (step / 4) * 64 * 128 + column_bytes),
                 advance(k, (step / 4) * kTileKv * 128 + column_bytes), step > 0);
  }
  wgmma_commit();
}

// O += P V, likewise.
__device__ __forceinline__ void issue_output(float (&o)[kHeadDimV / 8][4],
                                             const uint32_t (&p)[kTileKv / 16][4], uint64_t v) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kTileKv / 16; ++step) {
    wgmma_output(o, p[step], advance(v, step * 16 * 128), 1);
  }
  wgmma_commit();
}

// A warpgroup computes its 64 rows of every tile that the producer hands it.
__device__ __forceinline__ void consume(SharedStorage &shared, const AttentionParams &params, int warpgroup) {
  const int warp = (threadIdx.x / 32) % 4;
  const int lane = threadIdx.x % 32;
  const int own_barrier = 1 + kWarpgroups + warpgroup;

  RingPosition<kQStages> q_ring;
  RingPosition<kStages> k_ring;
  RingPosition<kVStages> v_ring;
  auto is_repeating = [&]() { return __shfl_sync(0xffffffff, shared.repeating, 0) != 0; };
  // A buffer of V that only other warpgroups use, for V or for O: not read here, but given back.
  auto skip_v = [&]() {
    shared.v_full[v_ring.stage].wait(v_ring.parity);
    __syncwarp();
    if (lane == 0) shared.v_empty[v_ring.stage].arrive();
    v_ring.advance();
  };
  // Key tiles that only other warpgroups of the block need: not read here, but given back.
  auto skip_k = [&]() {
    shared.k_full[k_ring.stage].wait(k_ring.parity);
    __syncwarp();  // all its lanes have seen it
    if (lane == 0) shared.k_empty[k_ring.stage].arrive();
    k_ring.advance();
  };

  int staged = -1;  // the buffer of V that holds O of the tile before, until it is stored
  auto give_back = [&]() {
    if (threadIdx.x % 128 == 0 && staged >= 0) {
      tma_store_wait_read();
      shared.v_empty[staged].arrive(4);  // for its warps
    }
  };
  // Those of the warpgroups after this one. They count as uses of the ring, like V's.
  auto pass_staging = [&]() {
    if (staged < 0) return;
    for (int i = warpgroup + 1; i < kWarpgroups; ++i) skip_v();
    staged = -1;
  };
  for (;;) {
    shared.q_full[q_ring.stage][warpgroup].wait(q_ring.parity);
    Tile tile = uniform(shared.tile[q_ring.stage][warpgroup]);
    if (tile.batch < kAllOnce) break;  // of a condition inside the next block, ptxas takes the loop for divergent
    if (tile.batch == kAllOnce) {
      named_barrier_sync<128>(own_barrier);
      if (threadIdx.x % 128 == 0) shared.reported.arrive();
      if (lane == 0) shared.q_empty[q_ring.stage][warpgroup].arrive();
      q_ring.advance();
      continue;
    }
    int row_begin = tile.q * kTileQ + warpgroup * 64;
    int row = row_begin + warp * 16 + lane / 4;  // and row + 8
    if (lane == 0) shared.current[warpgroup][warp] = tile;
    const HeadTerms terms = head_terms(params, tile.batch, tile.head);
    KeyTiles keys = key_tiles(row_begin, row_begin + 64, params, terms);
    if (row_begin >= row_count(params) || keys.begin >= keys.end) keys.begin = keys.end = tile.begin;
    const int skipped_before = keys.begin - tile.begin;
    const int skipped_after = tile.end - keys.end;
    if (skipped_before > 0) {
      give_back();
      pass_staging();
    }
    for (int i = 0; i < skipped_before; ++i) {
      skip_k();
      if (i > 0) skip_v();
    }

    const bool repeating = is_repeating();  // with the running maximum as reference
    if (repeating) keys.unmasked_end = keys.begin;  // none is taken as whole
    bool in_range = true;
    float o[kHeadDimV / 8][4] = {};
    CappedSoftmax softmax;

    if (keys.begin < keys.end) {
      const int column = 2 * (lane % 4);
      const int q = q_offset(params) + row;
      const int q_below = q + 8;
      const int last[2] = {last_key(q, params.seqlen_q, params.seqlen_kv) - column,
                           last_key(q_below, params.seqlen_q, params.seqlen_kv) - column};
      const uint64_t q_descriptor = wgmma_descriptor(shared.q[q_ring.stage][warpgroup], 0);
      float s[kTileKv / 8][4];
      uint32_t p[kTileKv / 16][4];  // accumulators rounded in pairs are the fragments of an A operand
      float correction[2];

      // S = -inf outside of the mask
      auto finish_scores = [&](int j) {
        if (j < keys.unmasked_end) return;
        const int tile_last[2] = {last[0] - j * kTileKv, last[1] - j * kTileKv};
        mask_after(s, tile_last);
      };
      auto round_probabilities = [&]() {
#pragma unroll
        for (int j = 0; j < kTileKv / 8; ++j) {
          p[j / 2][j % 2 * 2] = pack<Element>(s[j][0], s[j][1]);
          p[j / 2][j % 2 * 2 + 1] = pack<Element>(s[j][2], s[j][3]);
        }
      };

      shared.k_full[k_ring.stage].wait(k_ring.parity);
      issue_scores(s, q_descriptor, wgmma_descriptor(shared.k[k_ring.stage], 0));
      give_back();
      wgmma_wait<0>();
      pin_registers(s);
      if (lane == 0) shared.k_empty[k_ring.stage].arrive();
      k_ring.advance();
      if (lane == 0 && keys.end - keys.begin == 1) shared.q_empty[q_ring.stage][warpgroup].arrive();
      finish_scores(keys.begin);
      softmax.update(s, terms.bend, correction, Masked{});
      round_probabilities();
      pass_staging();
      if (skipped_before > 0) skip_v();

      if (keys.end - keys.begin > 1) shared.k_full[k_ring.stage].wait(k_ring.parity);
      // The short loop is for key tiles that all rows keep whole, once the reference is set.
      int j = keys.begin + 1;
      bool owed = false;  // whether O is still to be taken to the present maximum
      bool settled = keys.begin < keys.unmasked_end;
      while (j < keys.end) {
        if (settled && j < keys.unmasked_end) {
          in_range &= softmax.has_maximum();
          softmax.choose(terms.bend, params.seqlen_kv);
          if (owed) scale_rows(o, correction);
          correction[0] = correction[1] = 1.0f;
          owed = false;
          for (; j < min(keys.end, keys.unmasked_end); ++j) {
            // The tensor cores run S_j = Q K_j^T, and O += P V of the tile before, during the softmax of S_j.
            issue_scores(s, q_descriptor, wgmma_descriptor(shared.k[k_ring.stage], 0));
            shared.v_full[v_ring.stage].wait(v_ring.parity);
            issue_output(o, p, wgmma_descriptor(shared.v[v_ring.stage], kTileKv * 128));
            wgmma_wait<1>();
            pin_registers(s);
            if (lane == 0) shared.k_empty[k_ring.stage].arrive();
            k_ring.advance();
            if (lane == 0 && j + 1 == keys.end) shared.q_empty[q_ring.stage][warpgroup].arrive();
            softmax.exponentiate(s, terms.bend, 0);
            // Waiting for the next K here, in a loop, keeps ptxas from hoisting the wait for O further up.
            if (j + 1 < keys.end) shared.k_full[k_ring.stage].wait(k_ring.parity);
            wgmma_wait<0>();
            pin_registers(o);
            pin_registers(p);
            if (lane == 0) shared.v_empty[v_ring.stage].arrive();
            v_ring.advance();
            softmax.exponentiate(s, terms.bend, 1);
            softmax.add(s, 0);
            softmax.add(s, 1);
            round_probabilities();
          }
          if (j >= keys.end) break;
          in_range &= softmax.sums_in_range();  // before they are scaled down
          in_range &= softmax.polynomial_served(terms.bend);
        }
        // The tensor cores run S_j = Q K_j^T, and O += P V of the tile before, during the softmax of S_j.
        issue_scores(s, q_descriptor, wgmma_descriptor(shared.k[k_ring.stage], 0));
        scale_rows(o, correction);
        shared.v_full[v_ring.stage].wait(v_ring.parity);
        issue_output(o, p, wgmma_descriptor(shared.v[v_ring.stage], kTileKv * 128));
        wgmma_wait<1>();
        pin_registers(s);
        if (lane == 0) shared.k_empty[k_ring.stage].arrive();
        k_ring.advance();
        if (lane == 0 && j + 1 == keys.end) shared.q_empty[q_ring.stage][warpgroup].arrive();
        finish_scores(j);
        softmax.raise_maximum(s, terms.bend, correction, Masked{});
        // Waiting for the next K here, in a loop, keeps ptxas from hoisting the wait for O further up.
        if (j + 1 < keys.end) shared.k_full[k_ring.stage].wait(k_ring.parity);
        wgmma_wait<0>();
        pin_registers(o);
        pin_registers(p);
        if (lane == 0) shared.v_empty[v_ring.stage].arrive();
        v_ring.advance();
        softmax.exponentiate(s, terms.bend, correction);
        round_probabilities();
        owed = true;
        settled = j < keys.unmasked_end;
        ++j;
      }
      if (owed) scale_rows(o, correction);
      shared.v_full[v_ring.stage].wait(v_ring.parity);
      issue_output(o, p, wgmma_descriptor(shared.v[v_ring.stage], kTileKv * 128));
      wgmma_wait<0>();
      pin_registers(o);
      if (lane == 0) shared.v_empty[v_ring.stage].arrive();
      v_ring.advance();
    } else {
      if (lane == 0) shared.q_empty[q_ring.stage][warpgroup].arrive();
      give_back();
      pass_staging();
    }
    for (int i = 0; i < skipped_after; ++i) {
      skip_k();
      skip_v();
    }

    in_range &= softmax.in_range(o);
    in_range &= softmax.polynomial_served(terms.bend);
    // Read again, not kept: registers are short in the loops.
    __syncwarp();
    tile = uniform(shared.current[warpgroup][warp]);
    row_begin = tile.q * kTileQ + warpgroup * 64;
    row = row_begin + warp * 16 + lane / 4;
    // O = O / l, lse = m + log l
    float inverse[2];
    softmax.settle();
    softmax.finish(inverse);
    scale_rows(o, inverse);
    for (int i = 0; i < warpgroup; ++i) skip_v();  // the warpgroups take the next buffers of V in turn
    staged = v_ring.stage;
    shared.v_full[staged].wait(v_ring.parity);  // empty, that is
    v_ring.advance();
    char *staging = shared.v[staged][0];
    const bool kept = !named_barrier_any<128>(own_barrier, !in_range);
    // Tiles of which some rows were not kept are repeated, for their warpgroups; the others have stored theirs.
    int &link = params.links[static_cast<int64_t>(tile.index) * kWarpgroups + warpgroup];
    const bool wanted = repeating ? link != kKept : kept;
    if (threadIdx.x % 128 == 0 && !repeating) {
      link = kept ? kKept : shared.repeat[warpgroup];
      if (!kept) shared.repeat[warpgroup] = tile.index;
    }
    if (wanted && params.lse != nullptr && lane % 4 == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int lse_row = row + 8 * r;
        const int head = tile.head, q = lse_row;
        if (q < params.seqlen_q) {
          params.lse[(static_cast<int64_t>(tile.batch) * params.heads_q + head) * params.seqlen_q + q] =
              softmax.log_sum_exp(r, 1.0f);
        }
      }
    }
    store_to_panels<Element>(staging, o, warp, lane);
    fence_async_proxy();
    named_barrier_sync<128>(own_barrier);
    if (threadIdx.x % 128 == 0 && wanted) {
#pragma unroll
      for (int panel = 0; panel < kPanelsV; ++panel) {
        tma_store(&params.o, staging + panel * 64 * 128, panel * 64, row_begin, tile.head, tile.batch);
      }
      tma_store_commit();
    }
    q_ring.advance();
  }
  give_back();  // before the block and its shared memory go
  pass_staging();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attn_fwd_causal_softcap50_bf16_d256_g2_sm90a(const __grid_constant__ AttentionParams params) {
  extern __shared__ char dynamic_shared[];
  const uint32_t misalignment = shared_address(dynamic_shared) % 1024;
  SharedStorage &shared = *reinterpret_cast<SharedStorage *>(dynamic_shared + (1024 - misalignment) % 1024);

  if (threadIdx.x == 0) {
    for (int i = 0; i < kQStages; ++i) {
      for (int j = 0; j < kWarpgroups; ++j) {
        shared.q_full[i][j].init(1);
        shared.q_empty[i][j].init(4);
      }
    }
    for (int i = 0; i < kStages; ++i) {
      shared.k_full[i].init(1);
      shared.v_full[i].init(1);
      shared.k_empty[i].init(4 * kWarpgroups);  // one arrival of each warp
      shared.v_empty[i].init(4 * kWarpgroups);
    }
    for (int i = kStages; i < kVStages; ++i) {
      shared.v_full[i].init(1);
      shared.v_empty[i].init(4 * kWarpgroups);
    }
    for (int i = 0; i < kWarpgroups; ++i) shared.repeat[i] = -1;
    shared.repeated_for = shared.repeating = 0;
    shared.reported.init(kWarpgroups);
    fence_barrier_init();
    prefetch_tensor_map(&params.q);
    prefetch_tensor_map(&params.k);
    prefetch_tensor_map(&params.v);
    prefetch_tensor_map(&params.o);
  }
  __syncthreads();

  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    give_registers<40>();
    if (threadIdx.x == 0) produce(shared, params);
  } else {
    take_registers<232>();
    consume(shared, params, warpgroup - 1);
  }
}
